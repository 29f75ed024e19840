"""Datasets of several shapes as rows: columns, ids, undecoded images, shares of a mixture."""

import io
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import pytest
from PIL import Image
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import echo4o_hf  # noqa: F401
from echo4o_hf.miniature import dataset as miniature
from echo4o_hf.training.arguments import Echo4oTrainingArguments
from echo4o_hf.training.packs import StreamedPacks
from echo4o_hf.training.rows import FEATURES, load_rows

BOTH = pytest.mark.parametrize("streaming", [False, True], ids=["eager", "streaming"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(scope="module")
def hub_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniature, "IMAGES_PER_ARCHIVE", 3)
        miniature.write_dataset(folder, 7)
    return folder


def load(tmp_path: Path, **options) -> datasets.Dataset | datasets.IterableDataset:
    if options.get("streaming"):
        options["max_steps"] = 1
    arguments = Echo4oTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)
    return load_rows(arguments)


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def image(number: int) -> dict:
    return {"bytes": png(number), "path": f"{number}.png"}


def save(folder: Path, columns: dict, features: dict | None = None, shards: int = 1) -> str:
    kinds = {"id": datasets.Value("int64"), "image": datasets.Image(), "references": datasets.List(datasets.Image())}
    kinds |= features or {}
    known = datasets.Features({name: kinds.get(name, datasets.Value("string")) for name in columns})
    rows = datasets.Dataset.from_dict(columns, features=known)
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        rows.shard(shards, shard).to_parquet(folder / f"train-{shard}.parquet")
    return str(folder)


PICTURES = {"image": [image(1), image(2)], "caption": ["one", "two"], "references": [[image(3), image(4)], []]}


@BOTH
def test_columns_of_echo_4o_image(hub_layout: Path, tmp_path: Path, streaming: bool) -> None:
    options = {"dataset": "echo-4o-image", "dataset_config": "all", "data_dir": str(hub_layout)}
    rows = load(tmp_path, **options, streaming=streaming)
    assert rows.features == FEATURES
    examples = {row["id"]: row for row in rows}
    expected = datasets.load_dataset("echo-4o-image", "all", data_dir=str(hub_layout), split="train", decode=False)
    assert len(examples) == len(expected) == 21
    for row in expected:
        kept = {name: row[name] for name in ("id", "instruction", "input_images", "output_image")}
        assert examples[row["id"]] == {**kept, "answer": None}


def test_the_miniature_dataset(tmp_path: Path) -> None:
    row = next(iter(load(tmp_path, dataset="echo4o-miniature", streaming=True)))
    assert list(row) == list(FEATURES)
    assert Image.open(io.BytesIO(row["output_image"]["bytes"])).size == (64, 64)


@BOTH
def test_usual_columns_of_other_datasets(tmp_path: Path, streaming: bool) -> None:
    rows = load(tmp_path, dataset=save(tmp_path / "data", PICTURES), streaming=streaming)
    first, second = rows
    assert first["instruction"] == "one"
    assert first["output_image"] == image(1)
    assert first["input_images"] == [image(3), image(4)]
    assert (second["input_images"], second["answer"]) == ([], None)
    assert rows.features == FEATURES


@BOTH
def test_named_columns_and_single_references(tmp_path: Path, streaming: bool) -> None:
    columns = {"image": [image(1), None], "question": ["what?", "why?"], "reply": ["a", "b"], "key": ["x", "y"]}
    names = {"references_column": "image", "caption_column": "question", "answer_column": "reply", "id_column": "key"}
    rows = load(tmp_path, dataset=save(tmp_path / "data", columns), streaming=streaming, **names)
    empty = {"input_images": [], "output_image": None}
    assert list(rows) == [
        {"id": "x", "instruction": "what?", "answer": "a", **empty, "input_images": [image(1)]},
        {"id": "y", "instruction": "why?", "answer": "b", **empty},
    ]


@BOTH
def test_columns_of_paths_and_bytes(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "one.png").write_bytes(png(1))
    columns = {"image": [str(tmp_path / "one.png")], "references": [[png(2)]], "caption": ["c"]}
    kinds = {"image": datasets.Value("string"), "references": datasets.List(datasets.Value("binary"))}
    (row,) = load(tmp_path, dataset=save(tmp_path / "data", columns, kinds), streaming=streaming)
    assert row["output_image"] == {"bytes": None, "path": str(tmp_path / "one.png")}
    assert row["input_images"] == [{"bytes": png(2), "path": None}]


def test_images_are_neither_decoded_nor_written_again(tmp_path: Path) -> None:
    columns = {**PICTURES, "image": [{"bytes": b"no image", "path": None}, image(2)]}
    folder = save(tmp_path / "data", columns)
    before = datasets.load_dataset(folder, split="train").cache_files
    rows = load(tmp_path, dataset=folder)
    assert rows.cache_files == before
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 1
    assert rows[0]["output_image"]["bytes"] == b"no image"


@BOTH
def test_bytes_stay_beside_a_file_of_their_name(tmp_path: Path, monkeypatch, streaming: bool) -> None:
    folder = save(tmp_path / "data", PICTURES)
    (tmp_path / "1.png").write_bytes(b"another")
    monkeypatch.chdir(tmp_path)
    assert next(iter(load(tmp_path, dataset=folder, streaming=streaming)))["output_image"] == image(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "picture"}, r"image_column='picture', but the columns are \['image', 'text'\]"),
        ({}, r"give caption_column, the columns are \['image', 'text'\]"),
        ({"caption_column": "text", "references_column": "image"}, "give image_column or answer_column"),
        ({"caption_column": "text", "answer_column": "text"}, "one column is named for two things"),
    ],
)
@BOTH
def test_columns_that_are_not_there(tmp_path: Path, streaming: bool, options: dict, message: str) -> None:
    folder = save(tmp_path / "data", {"image": [image(1)], "text": ["one"]})
    with pytest.raises(ValueError, match=message):
        load(tmp_path, dataset=folder, streaming=streaming, **options)


# ---------------------------------------------------------------------------------------------------------------- ids


def test_ids_by_number_and_of_other_kinds(tmp_path: Path) -> None:
    assert load(tmp_path, dataset=save(tmp_path / "data", PICTURES))["id"][:] == ["0", "1"]
    rows = load(tmp_path, dataset=save(tmp_path / "numbered", {**PICTURES, "id": [7, 8]}))
    assert rows["id"][:] == ["7", "8"]
    with pytest.raises(ValueError, match="1 ids are those of several rows, like '7': give id_column"):
        load(tmp_path, dataset=save(tmp_path / "twice", {**PICTURES, "id": [7, 7]}))


def test_ids_of_streamed_rows_are_those_of_any_worker(tmp_path: Path) -> None:
    columns = {"image": [image(place // 2) for place in range(12)], "caption": list("abababababab")}
    rows = load(tmp_path, dataset=save(tmp_path / "data", columns, shards=3), streaming=True)
    alone = sorted(row["id"] for row in rows)
    assert len(set(alone)) == 12
    loader = DataLoader(rows, batch_size=None, num_workers=2)
    assert sorted(row["id"] for row in loader) == alone


# ------------------------------------------------------------------------------------------------------------ mixtures


def numbered(folder: Path, name: str, count: int) -> dict:
    columns = {"id": list(range(count)), "image": [image(place) for place in range(count)], "caption": [name] * count}
    return {"dataset": save(folder / name, columns, shards=3)}


@BOTH
def test_a_mixture_without_weights_shows_every_row_once(tmp_path: Path, hub_layout: Path, streaming: bool) -> None:
    echo = {"dataset": "echo-4o-image", "dataset_config": "multi_reference", "data_dir": str(hub_layout)}
    entries = [numbered(tmp_path, "few", 5), echo, numbered(tmp_path, "more", 9)]
    rows = list(load(tmp_path, mixture=entries, streaming=streaming))
    assert len({row["id"] for row in rows}) == len(rows) == 21
    starts = Counter(row["id"].partition(":")[0] for row in rows)
    assert starts == {"few": 5, "echo-4o-image/multi_reference": 7, "more": 9}
    assert {row["instruction"] for row in rows if row["id"].startswith("few:")} == {"few"}


def test_weights_are_exact_shares(tmp_path: Path) -> None:
    entries = [{**numbered(tmp_path, "a", 10), "weight": 1}, {**numbered(tmp_path, "b", 7), "weight": 2.5}]
    rows = load(tmp_path, mixture=entries)
    ids = rows["id"][:]
    assert len(set(ids)) == len(ids) == 35
    assert Counter(id[0] for id in ids) == {"a": 10, "b": 25}
    assert Counter(id.partition("#")[2] for id in ids if id[0] == "b") == {"": 7, "2": 7, "3": 7, "4": 4}
    by_id = {row["id"]: row for row in rows}
    assert {**by_id["b:3"], "id": ""} == {**by_id["b:3#2"], "id": ""}


def test_streamed_weights_are_chances_and_no_row_is_left_out(tmp_path: Path) -> None:
    entries = [{**numbered(tmp_path, "a", 30), "weight": 1}, {**numbered(tmp_path, "b", 9), "weight": 3}]
    ids = [row["id"] for row in load(tmp_path, mixture=entries, streaming=True)]
    assert len(set(ids)) == 39
    assert Counter(id[0] for id in ids)["a"] / len(ids) == pytest.approx(0.25, abs=0.1)


def test_one_dataset_twice_has_two_names(tmp_path: Path) -> None:
    entry = numbered(tmp_path, "a", 3)
    rows = load(tmp_path, mixture=[entry, {**entry, "dataset_split": "train[:1]"}])
    assert rows["id"][:] == ["a[0]:0", "a[0]:1", "a[0]:2", "a[1]:0"]


def test_weights_for_some_are_an_error(tmp_path: Path) -> None:
    entries = [{"dataset": "a", "weight": 1}, {"dataset": "b"}]
    with pytest.raises(
        ValueError, match=r"give a weight to every dataset of the mixture, or to none: got \[1, None\]"
    ):
        load(tmp_path, mixture=entries)


def test_equal_loads_share_what_is_cached_of_them(tmp_path: Path) -> None:
    entries = [{**numbered(tmp_path, "a", 5), "weight": 1}, {**numbered(tmp_path, "b", 3), "weight": 1}]
    first, again = (load(tmp_path, mixture=entries) for _ in range(2))
    assert first._fingerprint == again._fingerprint


@BOTH
def test_the_seed_decides(tmp_path: Path, streaming: bool) -> None:
    entries = [{**numbered(tmp_path, "a", 30), "weight": 1}, {**numbered(tmp_path, "b", 9), "weight": 3}]
    orders = [[row["id"] for row in load(tmp_path, mixture=entries, streaming=streaming, seed=s)] for s in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert (orders[0] != orders[2]) == streaming  # the order of rows on disk is the planner's


class Words:
    """Counts words, as a builder that draws nothing."""

    oversize = "downscale"

    def num_tokens(self, row: dict) -> int:
        return len(row["instruction"].split())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_archives_and_parquet_files_goes_on(tmp_path: Path, hub_layout: Path, workers: int) -> None:
    echo = {"dataset": "echo-4o-image", "data_dir": str(hub_layout)}
    subsets = ("surreal_fantasy", "multi_reference")
    entries = [{**echo, "dataset_config": name, "weight": 1} for name in subsets]
    rows = load(tmp_path, mixture=[*entries, {**numbered(tmp_path, "a", 9), "weight": 0.5}], streaming=True)

    def loader() -> StatefulDataLoader:
        packs = StreamedPacks(rows, Words(), 40, seed=0, shuffle_window=5)
        return StatefulDataLoader(packs, batch_size=1, collate_fn=ids_of, num_workers=workers)

    first = loader()
    whole, states = [], []
    for pack in islice(first, 30):
        whole.append(pack)
        states.append(first.state_dict())
    assert {id.partition(":")[0] for _, ids in whole for id in ids} >= {*(f"echo-4o-image/{name}" for name in subsets)}
    assert whole[-1][0] > 0
    for cut in (0, 1, 4, 9, 17):
        again = loader()
        again.load_state_dict(states[cut])
        assert list(islice(again, 5)) == whole[cut + 1 : cut + 6]


def ids_of(batch: list) -> tuple[int, list[str]]:
    ((epoch, rows),) = batch
    return epoch, [row["id"] for row in rows]
