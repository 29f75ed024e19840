"""`load_dataset("echo-4o-image", ...)`: rows as they were written, whatever the layout, and damage by its name."""

import io
import json
import logging
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from hub_layout import DAMAGES, SURREAL, Expected, Traps, encode, write_archive, write_hub_layout, write_lines
from PIL import Image

import echo4o_hf  # noqa: F401  (registers the builder)
from echo4o_hf.data.builder import FEATURES, SUBSETS, Echo4oImage

LAYOUTS = {
    "archives": Traps(),
    "extracted": Traps(extracted=1.0),
    "mixed": Traps(extracted=0.5),
    "plain": Traps(False, False, False, False, False, False),
}


def load(folder: Path, name: str = "all", **options):
    return load_dataset("echo-4o-image", name, data_dir=str(folder), split="train", **options)


def contents(row: dict) -> Expected:
    """A row loaded with decode=False, as the fixture describes it."""
    assert row["id"].startswith(f"{row['subset']}/")
    return Expected(
        row["id"],
        row["task_type"],
        row["category"],
        row["instruction"],
        row["output_image"]["bytes"],
        [image["bytes"] for image in row["input_images"]],
    )


def by_id(rows) -> list[Expected]:
    return sorted(rows, key=lambda row: row.id)


@pytest.fixture(params=LAYOUTS, ids=LAYOUTS)
def layout(request, tmp_path) -> tuple[Path, list[Expected]]:
    folder = tmp_path / "data"
    return folder, write_hub_layout(folder, traps=LAYOUTS[request.param])


def test_eager_rows_in_the_order_of_the_metadata(layout):
    folder, expected = layout
    assert [contents(row) for row in load(folder, decode=False)] == expected
    for subset in SUBSETS:
        rows = load(folder, subset, decode=False)
        assert [contents(row) for row in rows] == [row for row in expected if row.subset == subset]


def test_streaming_gives_the_same_rows(layout):
    folder, expected = layout
    for _ in range(2):  # the second time, what the archives hold is known
        stream = load(folder, streaming=True, decode=False)
        assert by_id(map(contents, stream)) == by_id(expected)


def test_one_subset_given_as_the_folder(tmp_path):
    expected = write_hub_layout(tmp_path)
    for name, subset in zip(
        (hub_folder.name for hub_folder in sorted(tmp_path.iterdir())), sorted(SUBSETS), strict=True
    ):
        rows = load(tmp_path / name, subset, decode=False)
        assert [contents(row) for row in rows] == [row for row in expected if row.subset == subset]


def test_pictures_decode(tmp_path):
    expected = write_hub_layout(tmp_path)
    for dataset in (load(tmp_path), load(tmp_path, streaming=True)):
        assert dataset.features == FEATURES
        rows = {row["id"]: row for row in dataset}
        for row in expected:
            pixels = np.asarray(Image.open(io.BytesIO(row.output)))
            assert (np.asarray(rows[row.id]["output_image"]) == pixels).all()
            assert [image.size for image in rows[row.id]["input_images"]] == [(24, 24)] * len(row.inputs)


NAMED = {  # what the message says of each damage
    "missing": r"\(surreal_fantasy/00000\): image is missing: /Echo-4o-Image/Surrel-Fantasy-Image/images/00000\.jpg",
    "undecodable": r"\(surreal_fantasy/00001\): surreal_fantasy/00001\.jpg does not decode",
    "large": r"\(surreal_fantasy/00002\): surreal_fantasy/00002\.png 240 x 240 pixels are more than max_pixels=40000",
    "broken line": r"conflict\.jsonl:\d: not valid JSON",
    "no field": r"conflict\.jsonl:\d: 'instruction' must be a text, got 7",
    "twice": r"conflict\.jsonl:7 \(surreal_fantasy/00005\): has the output image of .*conflict\.jsonl:\d",
    "unsafe": r"half-\.tar\.gz: member '\.\./escaped\.jpg' leads out of its folder",
    "truncated": r"0-half\.tar\.gz: truncated or damaged archive",
}
assert NAMED.keys() == set(DAMAGES)


def damaged(folder: Path, *damages: str) -> list[Expected]:
    """A dataset whose ids and endings the messages above name."""
    return write_hub_layout(folder, traps=Traps(shuffled=False, endings=True), damages=damages)


@pytest.mark.parametrize("streaming", [False, True], ids=["eager", "streaming"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage, streaming, tmp_path):
    expected = damaged(tmp_path, damage)
    options = {"streaming": streaming, "max_pixels": 40000}
    with pytest.raises(ValueError, match=NAMED[damage]) as error:
        list(load(tmp_path, "surreal_fantasy", **options))
    if damage != "truncated" and not (streaming and damage == "undecodable"):  # there the consumer decodes
        assert str(error.value).startswith("1 problem in ")
    other = load(tmp_path, "multi_reference", **options)
    assert len(list(other)) == len([row for row in expected if row.subset == "multi_reference"])


@pytest.mark.parametrize("streaming", [False, True], ids=["eager", "streaming"])
def test_skipping_yields_the_rest_and_logs_the_ids(streaming, tmp_path, caplog):
    damages = [damage for damage in DAMAGES if damage != "truncated"]
    expected = [row for row in damaged(tmp_path, *damages) if row.subset == "surreal_fantasy"]
    options = {"on_error": "skip", "max_pixels": 40000, "decode": False, "streaming": streaming}
    with caplog.at_level(logging.WARNING):
        rows = [contents(row) for row in load(tmp_path, "surreal_fantasy", **options)]
    assert by_id(rows) == by_id(expected)
    log = "\n".join(record.getMessage() for record in caplog.records)
    for damage in damages:
        assert re.search(NAMED[damage], log), damage
    assert [line for line in log.splitlines() if re.match(r"\d+ problems? in .*, left out:", line)]


@pytest.mark.parametrize("streaming", [False, True], ids=["eager", "streaming"])
def test_a_category_without_its_archive_is_missing_and_not_replaced(streaming, tmp_path):
    expected = write_hub_layout(tmp_path, traps=Traps(endings=False))
    (archive,) = tmp_path.glob("*/multi_refer_images_output/hum_sce/*.tar.gz")
    archive.unlink()
    with pytest.raises(ValueError, match=r"3 problems .*\n.*\(multi_reference/hum_sce/0000\d\): image is missing"):
        list(load(tmp_path, "multi_reference", streaming=streaming))
    rows = load(tmp_path, "multi_reference", streaming=streaming, on_error="skip", decode=False)
    assert by_id(map(contents, rows)) == by_id(row for row in expected if row.category == "hum_obj")


def test_several_processes_and_slices(tmp_path):
    expected = write_hub_layout(tmp_path, rows=12)
    builder = Echo4oImage(config_name="all", data_dir=str(tmp_path))
    builder.download_and_prepare(num_proc=2)
    assert builder.as_dataset(split="train")["id"][:] == [row.id for row in expected]
    part = load_dataset("echo-4o-image", "all", data_dir=str(tmp_path), split="train[3:7]")
    assert part["id"][:] == [row.id for row in expected[3:7]]


def test_damage_found_by_several_processes_is_one_error(tmp_path):
    damaged(tmp_path, "undecodable", "large")
    with pytest.raises(ValueError, match="^2 problems in") as error:
        load(tmp_path, "all", num_proc=2, max_pixels=40000)
    assert re.search(NAMED["undecodable"], str(error.value)) and re.search(NAMED["large"], str(error.value))


def test_held_out_rows_depend_on_the_id_alone(tmp_path):
    expected = write_hub_layout(tmp_path, rows=20)
    for streaming in (False, True):
        options = {"data_dir": str(tmp_path), "validation_fraction": 0.25, "streaming": streaming}
        splits = load_dataset("echo-4o-image", "all", **options)
        held, kept = ({row["id"] for row in splits[name]} for name in ("validation", "train"))
        assert held | kept == {row.id for row in expected} and not held & kept
        assert 5 < len(held) < 25
        more = load_dataset("echo-4o-image", "all", **{**options, "validation_fraction": 0.5})
        assert held < {row["id"] for row in more["validation"]}
    assert set(load_dataset("echo-4o-image", "all", data_dir=str(tmp_path))) == {"train"}


def test_ids_where_stems_are_not_unique(tmp_path):
    rng = random.Random(1)
    below = tmp_path / SURREAL
    pictures = {name: encode(16, rng) for name in ("a/00000.jpg", "b/00000.jpg", "b/00000.png", "b/00001.jpg")}
    for category in "ab":
        members = [(name[2:], data) for name, data in pictures.items() if name.startswith(category)]
        write_archive(below / "images" / category / f"{category}.tar.gz", members)
    lines = [
        json.dumps(
            {"instruction": name, "output_image": f"/Echo-4o-Image/{SURREAL}/images/{name}", "type": "T1"}
        ).encode()
        for name in pictures
    ]
    write_lines(below / "x.jsonl", lines)
    for streaming in (False, True):
        rows = list(load(tmp_path, "surreal_fantasy", decode=False, streaming=streaming))
        assert {row["id"]: row["output_image"]["bytes"] for row in rows} == {
            f"surreal_fantasy/{name}": data for name, data in pictures.items()
        }
    write_lines(below / "x.jsonl", [*lines, lines[0].replace(b"a/00000.jpg", b"a/00001.jpg")])
    for streaming in (False, True):  # b has that number, a has not
        with pytest.raises(ValueError, match="image is missing: .*a/00001.jpg"):
            list(load(tmp_path, "surreal_fantasy", streaming=streaming))


def test_another_ending_is_never_another_records_picture(tmp_path):
    rng = random.Random(1)
    below = tmp_path / SURREAL
    write_archive(below / "images" / "0-1.tar.gz", [("00000.png", encode(16, rng, "PNG"))])
    lines = [
        json.dumps({"instruction": "x", "output_image": f"images/00000.{end}", "type": "T1"}) for end in ("jpg", "png")
    ]
    write_lines(below / "x.jsonl", [line.encode() for line in lines])
    for streaming in (False, True, True):
        with pytest.raises(ValueError, match=r"1 problem .*\n.*image is missing: images/00000.jpg"):
            list(load(tmp_path, "surreal_fantasy", streaming=streaming))
        rows = load(tmp_path, "surreal_fantasy", streaming=streaming, on_error="skip")
        assert [row["id"] for row in rows] == ["surreal_fantasy/00000.png"]


def test_the_last_of_several_streams_reports_what_is_missing(tmp_path):
    damaged(tmp_path, "missing")
    stream = load(tmp_path, "surreal_fantasy", streaming=True)
    assert stream.num_shards == 2
    assert len(list(stream.shard(2, 0))) == 2  # the other archive may hold it
    with pytest.raises(ValueError, match=NAMED["missing"]):
        list(stream.shard(2, 1))
    with pytest.raises(ValueError, match=NAMED["missing"]):  # known from now on, before the first row
        load(tmp_path, "surreal_fantasy", streaming=True)


def test_two_images_for_one_record_are_an_error(tmp_path):
    write_hub_layout(tmp_path, traps=Traps(shuffled=False, endings=False))
    first = tmp_path / SURREAL / "images" / "0-half.tar.gz"
    (first.parent / "copy.tar.gz").write_bytes(first.read_bytes())
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"00000\): several images fit .*00000.jpg: .*00000.jpg, .*00000.jpg"):
            list(load(tmp_path, "surreal_fantasy", streaming=streaming))


def test_an_extracted_image_goes_before_its_archive(tmp_path):
    expected = write_hub_layout(tmp_path, traps=Traps(shuffled=False, endings=False))
    (tmp_path / SURREAL / "images" / "00000.jpg").write_bytes(expected[0].output)
    for streaming in (False, True):
        rows = load(tmp_path, "surreal_fantasy", streaming=streaming, decode=False)
        assert by_id(map(contents, rows)) == by_id(row for row in expected if row.subset == "surreal_fantasy")


def test_a_changed_folder_is_read_again_and_an_unchanged_one_not(tmp_path):
    write_hub_layout(tmp_path, traps=Traps(shuffled=False))
    first = load(tmp_path, "surreal_fantasy")
    encoded = load(tmp_path, "surreal_fantasy", decode=False)
    assert first.cache_files == encoded.cache_files and first._fingerprint != encoded._fingerprint
    assert isinstance(encoded[0]["output_image"]["bytes"], bytes)
    metadata = tmp_path / SURREAL / "conflict.jsonl"
    metadata.write_bytes(b"".join(metadata.read_bytes().splitlines(keepends=True)[1:]))
    assert load(tmp_path, "surreal_fantasy").num_rows == first.num_rows - 1


def test_bytes_survive_files_of_the_same_name(tmp_path, monkeypatch):
    expected = write_hub_layout(tmp_path / "data", traps=Traps(endings=False))
    for row in expected:
        path = tmp_path / f"{row.id}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not this one")
    monkeypatch.chdir(tmp_path)
    assert [contents(row) for row in load(tmp_path / "data", decode=False)] == expected


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": None}, "one of surreal_fantasy"),
        ({"name": None, "decode": False}, "NAME.*, one of surreal_fantasy"),
        ({"name": None, "validation_fraction": 2}, "between 0 and 1, got 2"),
        ({"name": "surreal"}, "surreal_fantasy"),
        ({"on_error": "ignore"}, "on_error must be 'raise' or 'skip', got 'ignore'"),
        ({"max_pixels": 0}, "max_pixels must be positive, got 0"),
        ({"validation_fraction": 1.5}, "between 0 and 1, got 1.5"),
        ({"data_files": "x.jsonl"}, "data_files is not used"),
    ],
)
def test_wrong_options(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_dataset("echo-4o-image", **{"name": "all", "data_dir": str(tmp_path), **options})


def test_folders_that_hold_no_copy(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no folder for the subset surreal_fantasy"):
        load(tmp_path)
    (tmp_path / SURREAL).mkdir()
    (tmp_path / SURREAL / "conflict.jsonl").touch()
    with pytest.raises(ValueError, match="no record of the subset surreal_fantasy in 1 "):
        load(tmp_path, "surreal_fantasy")


@pytest.mark.parametrize("imports", ["import echo4o_hf; import datasets", "import datasets; import echo4o_hf"])
def test_import_orders_in_an_empty_folder(imports, tmp_path):
    write_hub_layout(tmp_path / "data")
    (tmp_path / "empty").mkdir()
    code = f"""{imports}
print(datasets.get_dataset_config_names("echo-4o-image"))
print(len(list(datasets.load_dataset("echo-4o-image", "all", data_dir="../data", split="train", streaming=True))))
try:
    datasets.load_dataset("echo-4o-video")
except Exception as error:
    print(type(error).__name__)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "empty", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0] == str([*SUBSETS, "all"])
    assert run.stdout.splitlines()[1:] == ["18", "ConnectionError"]  # other names are looked for as ever: here offline


def test_a_folder_of_that_name_is_loaded_by_datasets(tmp_path, monkeypatch):
    (tmp_path / "echo-4o-image").mkdir()
    (tmp_path / "echo-4o-image" / "x.jsonl").write_text('{"a": 1}')
    monkeypatch.chdir(tmp_path)
    assert load_dataset("echo-4o-image", split="train")["a"][:] == [1]


@pytest.fixture
def tables(tmp_path) -> tuple[Path, list[Expected]]:
    """The Parquet layout: two files of one subset, one of another."""
    expected = write_hub_layout(tmp_path / "data")
    folder = tmp_path / "packed"
    for subset in ("multi_reference", "surreal_fantasy"):
        rows = load(tmp_path / "data", subset, decode=False)
        (folder / subset).mkdir(parents=True)
        for index in range(2):
            rows.shard(2, index, contiguous=True).to_parquet(folder / subset / f"train-{index:05d}-of-00002.parquet")
    return folder, [row for row in expected if row.subset != "instruction_following"]


@pytest.mark.parametrize("streaming", [False, True], ids=["eager", "streaming"])
def test_our_parquet_files(tables, streaming):
    folder, expected = tables
    for subset in ("multi_reference", "surreal_fantasy"):
        rows = load(folder, subset, streaming=streaming, decode=False)
        assert [contents(row) for row in rows] == [row for row in expected if row.subset == subset]
    (folder / "surreal_fantasy" / "train-00000-of-00002.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(ValueError, match="surreal_fantasy/train-00000-of-00002.parquet: not one of our Parquet files"):
        list(load(folder, "surreal_fantasy", streaming=streaming))
