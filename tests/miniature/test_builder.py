"""`load_dataset("echo4o-miniature")`: drawn on the spot, the same in every way of reading."""

import io
from collections import Counter

import pytest
from datasets import load_dataset
from PIL import Image

import echo4o_hf  # noqa: F401  (registers the builder)
from echo4o_hf.data.config import FEATURES
from echo4o_hf.miniature.builder import DRAW
from echo4o_hf.miniature.items import is_held_out
from echo4o_hf.miniature.judge import find_objects
from echo4o_hf.miniature.wording import parse_caption

NAME = "echo4o-miniature"


def rows(name: str | None = None, rows: int = 24, **options) -> list[dict]:
    return list(load_dataset(NAME, name, split="train", rows=rows, decode=False, **options))


@pytest.mark.parametrize("subset", [*DRAW, "all"])
def test_streaming_gives_the_rows_of_an_eager_load(subset):
    assert rows(subset) == rows(subset, streaming=True)


def test_columns_are_those_of_echo_4o_image():
    dataset = load_dataset(NAME, split="train[:9]", rows=24)
    assert dataset.features == FEATURES
    assert len(dataset) == 9
    row = dataset[7]
    assert row["subset"] == row["task_type"] == "multi_reference"
    assert row["output_image"].size == (64, 64)
    assert 2 <= len(row["input_images"]) <= 3


def test_all_is_the_default_and_made_of_the_subsets_rows():
    mixed = rows()
    assert Counter(row["subset"] for row in mixed) == {
        "instruction_following": 18,
        "surreal_fantasy": 3,
        "multi_reference": 3,
    }
    assert len({row["id"] for row in mixed}) == 24
    for subset, count in Counter(row["subset"] for row in mixed).items():
        assert [row for row in mixed if row["subset"] == subset] == rows(subset)[:count]


def test_a_row_depends_on_its_number_and_the_seed_alone():
    few, more = rows("instruction_following", 5), rows("instruction_following", 9)
    assert few == more[:5]
    other = rows("instruction_following", 5, seed=1)
    assert all(one["output_image"] != two["output_image"] for one, two in zip(few, other, strict=True))


def test_streams_have_shards_for_several_processes():
    stream = load_dataset(NAME, split="train", streaming=True)
    assert stream.n_shards == 16
    shards = [list(stream.shard(4, index).take(2)) for index in range(4)]
    assert len({row["id"] for shard in shards for row in shard}) == 8


def test_captions_are_clean_and_never_a_benchmark_items():
    for row in rows("instruction_following", 60):
        clauses = parse_caption(row["instruction"])
        wanted = Counter({(one.class_name, one.color): one.count for one in clauses})
        picture = Image.open(io.BytesIO(row["output_image"]["bytes"]))
        assert Counter((one.shape, one.color) for one in find_objects(picture)) == wanted
    assert not any(is_held_out(row["instruction"]) for row in rows(rows=200))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (None, {"rows": 0}, "rows=0"),
        (None, {"seed": -1}, "seed=-1"),
        ("all", {"data_dir": "shapes"}, "neither data_dir nor data_files"),
        ("all", {"revision": "v1"}, "'v1'"),
        ("surreal", {}, "surreal"),
    ],
)
def test_what_cannot_be_drawn_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(NAME, name, **options)
