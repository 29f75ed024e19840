"""Each export is read back with the program it is for."""

import contextlib
import glob
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from datasets import load_dataset
from hub_layout import write_hub_layout
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from echo4o_hf.data import export_bagel
from echo4o_hf.data.builder import logger
from echo4o_hf.data.export import FORMATS, export, export_rows
from echo4o_hf.data.export_formats import check_row, sample_key

Row = dict[str, Any]

# Unicode, line ends of every kind, quotes, a trailing backslash, and what looks like a split or a path.
INSTRUCTION = 'Ein blauer Würfel 「青い」\nin a "test"\r\n\u2028\x85\ttree 🦊 file://etc \\'


def encode(number: int, format: str = "JPEG") -> bytes:
    """A picture of noise that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format)
    return data.getvalue()


def make_row(number: int, references: int = 0, format: str = "JPEG", **columns: Any) -> Row:
    subset = "multi_reference" if references else "surreal_fantasy"
    row = {
        "id": f"{subset}/{number:05d}",
        "subset": subset,
        "task_type": "multi_reference" if references else "t2i",
        "category": "hum_sce" if references else "T1",
        "instruction": f"{INSTRUCTION} {number}",
        "input_images": [{"bytes": encode(100 * number + i, format), "path": None} for i in range(references)],
        "output_image": {"bytes": encode(100 * number + 99, format), "path": None},
    }
    return {**row, **columns}


HOSTILE = [
    make_row(1),
    make_row(2, id="surreal_fantasy/test-00002 (copy).v2.été"),
    make_row(3, id="surreal_fantasy/../../" + "x" * 300),
    make_row(4, references=4),
    make_row(5, references=2),
    make_row(6, format="PNG"),
    make_row(7, references=2, format="WEBP"),
    make_row(8, id="multi_reference/eval/00001", references=1),
]
BY_ID = {row["id"]: row for row in HOSTILE}


def pictures_of(row: Row) -> list[bytes]:
    """The references, then the image, as they were encoded."""
    return [picture["bytes"] for picture in (*row["input_images"], row["output_image"])]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def corrupt(row: Row, column: str = "output_image") -> Row:
    """The row with a picture cut off before its end; of the references the last one."""
    picture = row[column][-1] if column == "input_images" else row[column]
    picture = {"bytes": picture["bytes"][:-300], "path": None}
    return {**row, column: [*row[column][:-1], picture] if column == "input_images" else picture}


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "100% test" / "out"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


# Keys


IDS = st.lists(st.text("abAB01_-/. é", max_size=12) | st.text(max_size=200), unique=True, max_size=30)


@given(IDS)
def test_keys_are_unique_plain_and_stable(ids: list[str]) -> None:
    keys = [sample_key(sample_id) for sample_id in ids]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", key) for key in keys)
    assert len({key.lower() for key in keys}) == len(ids)  # also on a disk that ignores case
    assert [sample_key(sample_id) for sample_id in reversed(ids)] == keys[::-1]


def test_ids_that_differ_in_little_have_different_keys() -> None:
    ids = ["".join(letters) for length in range(6) for letters in itertools.product("aA-/_", repeat=length)]
    assert len({sample_key(sample_id).lower() for sample_id in ids}) == len(ids)


def test_a_key_can_be_read() -> None:
    assert sample_key("surreal_fantasy/00000") == "surreal_fantasy-00000"
    assert sample_key("multi_reference/hum_sce/00012") == "multi_reference-hum_sce-00012"
    # Frozen: a change would rename the pictures of everybody's exports.
    assert sample_key("surreal_fantasy/0 1.v2") == "surreal_fantasy-0-1-v2--76608e16cf5f7bf1"


def test_a_hashed_key_is_no_other_ids_key() -> None:
    hashed = sample_key("A")
    assert sample_key(hashed) != hashed
    assert sample_key(hashed.lower().replace("--", "/")) != hashed.lower()


# webdataset


@pytest.fixture
def shards(output: Path) -> list[str]:
    report = export_rows("webdataset", HOSTILE, output)
    assert report.rows == len(HOSTILE)
    assert not report.left_out
    return sorted(glob.glob(glob.escape(str(output)) + "/*.tar"))


def test_the_webdataset_package_reads_all_shards_together(shards: list[str]) -> None:
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    read = {json.loads(sample["json"])["id"]: sample for sample in samples}
    assert read.keys() == BY_ID.keys()
    for row_id, row in BY_ID.items():
        sample = read[row_id]
        assert sample["__key__"] == sample_key(row_id)
        assert sample["txt"].decode() == row["instruction"]
        extension = {6: "png", 7: "webp"}.get(HOSTILE.index(row) + 1, "jpg")
        names = [*(f"input_{i}.{extension}" for i in range(len(row["input_images"]))), extension]
        assert [sample[name] for name in names] == pictures_of(row)
        labels = {name: row[name] for name in ("id", "subset", "task_type", "category")}
        assert json.loads(sample["json"]) == labels


def test_the_webdataset_package_decodes_the_pictures(shards: list[str]) -> None:
    (name,) = [name for name in shards if "multi_reference-4" in name]
    (sample,) = webdataset.WebDataset([name], shardshuffle=False).decode("pil")
    assert sample["txt"] == HOSTILE[3]["instruction"]
    assert sample["json"]["id"] == HOSTILE[3]["id"]
    for member, data in zip([*(f"input_{i}.jpg" for i in range(4)), "jpg"], pictures_of(HOSTILE[3]), strict=True):
        assert (np.asarray(sample[member]) == pixels(data)).all()


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_reads_the_shards_of_one_shape(shards: list[str], streaming: bool) -> None:
    found = {}
    for name in shards:
        for sample in load_dataset("webdataset", data_files=[name], split="train", streaming=streaming):
            found[sample["json"]["id"]] = sample
    assert found.keys() == BY_ID.keys()
    for row_id, row in BY_ID.items():
        assert found[row_id]["txt"] == row["instruction"]
        members = sorted(name for name in found[row_id] if re.search(r"(jpg|png|webp)$", name))
        for member, data in zip(members, pictures_of(row), strict=True):
            assert (np.asarray(found[row_id][member].convert("RGB")) == pixels(data)).all()


def test_datasets_reads_a_whole_folder_of_one_subset(output: Path) -> None:
    rows = [make_row(number) for number in range(9)]
    export_rows("webdataset", rows, output, max_shard_size=3000)
    assert len(list(output.iterdir())) > 1
    read = load_dataset("webdataset", data_dir=str(output), split="train")
    assert [sample["json"]["id"] for sample in read] == [row["id"] for row in rows]


def test_equal_rows_are_equal_shards(tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_rows("webdataset", HOSTILE, tmp_path / name)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


# imagefolder


@pytest.mark.parametrize("streaming", [False, True])
def test_imagefolder_gives_pictures_references_and_instructions(output: Path, streaming: bool) -> None:
    export_rows("imagefolder", HOSTILE, output)
    read = list(load_dataset("imagefolder", data_dir=str(output), split="train", streaming=streaming))
    assert {sample["id"] for sample in read} == BY_ID.keys()
    for sample in read:
        row = BY_ID[sample["id"]]
        for column in ("instruction", "subset", "task_type", "category"):
            assert sample[column] == row[column]
        for image, data in zip([*sample["input_images"], sample["image"]], pictures_of(row), strict=True):
            assert (np.asarray(image.convert("RGB")) == pixels(data)).all()


def test_imagefolder_finds_references_behind_many_rows_without(output: Path) -> None:
    # datasets takes the columns' types from the first ten megabytes.
    few = [make_row(number, instruction="x" * 1_000_000) for number in range(12)]
    export_rows("imagefolder", [*few, make_row(12, references=2)], output)
    read = load_dataset("imagefolder", data_dir=str(output), split="train", streaming=True)
    assert [len(sample["input_images"]) for sample in read] == [2] + [0] * 12


def test_imagefolder_without_references_has_no_column_for_them(output: Path) -> None:
    export_rows("imagefolder", HOSTILE[:3], output)
    read = load_dataset("imagefolder", data_dir=str(output), split="train")
    assert set(read.column_names) == {"image", "instruction", "id", "subset", "task_type", "category"}
    assert len(read) == 3


# jsonl


def test_jsonl_names_the_pictures_by_absolute_paths(output: Path) -> None:
    export_rows("jsonl", HOSTILE, output)
    lines = (output / "data.jsonl").read_text(encoding="utf-8").splitlines()
    records = {record["id"]: record for record in map(json.loads, lines)}
    assert len(lines) == len(records) == len(HOSTILE)
    for row_id, row in BY_ID.items():
        record = records[row_id]
        paths = [*record["input_images"], record["output_image"]]
        assert all(os.path.isabs(path) for path in paths)
        assert [Path(path).read_bytes() for path in paths] == pictures_of(row)
        assert all(record[name] == row[name] for name in ("instruction", "subset", "task_type", "category"))


def test_jsonl_loads_with_datasets(output: Path) -> None:
    export_rows("jsonl", HOSTILE, output)
    read = load_dataset("json", data_files=glob.escape(str(output)) + "/data.jsonl", split="train")
    assert {row["id"]: row["instruction"] for row in read} == {row["id"]: row["instruction"] for row in HOSTILE}


def test_relative_output_gives_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = export_rows("jsonl", HOSTILE[:1], "out")
    assert report.output == str(tmp_path / "out")
    assert json.loads((tmp_path / "out/data.jsonl").read_text())["output_image"].startswith(
        str(tmp_path / "out/images")
    )


# bagel


def official_t2i_rows(entry: dict[str, Any]) -> Iterator[tuple[bytes, dict[str, str]]]:
    """What the official trainer takes from a text-to-image folder: every row group of every file."""
    names = [name for name in os.listdir(entry["data_dir"]) if name.endswith(".parquet")]
    assert len(names) == len(os.listdir(entry["data_dir"])) == entry["num_files"]
    for name in sorted(names):
        file = pq.ParquetFile(os.path.join(entry["data_dir"], name))
        for group in range(file.num_row_groups):
            for _, row in file.read_row_group(group).to_pandas().iterrows():
                assert row.index.tolist() == ["image", "captions"]
                assert isinstance(row["captions"], str)
                yield row["image"], json.loads(row["captions"])


def official_multi_reference_rows(entry: dict[str, Any]) -> Iterator[tuple[list[bytes], str]]:
    """What it takes from a multi-reference folder: the row groups that `parquet_info` counts for each path."""
    info = json.loads(Path(entry["parquet_info_path"]).read_text())
    paths = [os.path.join(entry["data_dir"], name) for name in os.listdir(entry["data_dir"])]
    assert sorted(paths) == sorted(info)
    for path in sorted(paths):
        file = pq.ParquetFile(path)
        assert info[path] == {"num_row_groups": file.num_row_groups, "num_rows": file.metadata.num_rows}
        for group in range(info[path]["num_row_groups"]):
            for _, row in file.read_row_group(group).to_pandas().iterrows():
                assert row.index.tolist() == ["image_list", "instruction_list"]
                assert len(row["instruction_list"]) == 1
                assert not isinstance(row["instruction_list"][0], str)
                (instruction,) = row["instruction_list"][0]
                yield list(row["image_list"]), instruction


def test_bagel_has_what_the_official_trainer_reads(output: Path) -> None:
    export_rows("bagel", HOSTILE, output)
    info = json.loads((output / "dataset_info.json").read_text())
    assert {group: list(folders) for group, folders in info.items()} == {
        "multi_reference": ["echo4o_multi_reference"],
        "t2i_pretrain": ["echo4o_surreal_fantasy"],
    }
    single = [row for row in HOSTILE if not row["input_images"]]
    entry = info["t2i_pretrain"]["echo4o_surreal_fantasy"]
    assert entry["num_total_samples"] == len(single)
    read = list(official_t2i_rows(entry))
    assert read == [(row["output_image"]["bytes"], {"caption": row["instruction"]}) for row in single]

    several = [row for row in HOSTILE if row["input_images"]]
    entry = info["multi_reference"]["echo4o_multi_reference"]
    assert entry["num_total_samples"] == len(several)
    assert list(official_multi_reference_rows(entry)) == [(pictures_of(row), row["instruction"]) for row in several]


def test_bagel_cuts_files_and_row_groups(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_bagel, "ROWS_PER_GROUP", 3)
    rows = [make_row(number, references=2) for number in range(11)]
    size = sum(map(len, pictures_of(rows[0])))
    export_rows("bagel", rows, output, max_shard_size=5 * size)
    entry = json.loads((output / "dataset_info.json").read_text())["multi_reference"]["echo4o_multi_reference"]
    info = json.loads(Path(entry["parquet_info_path"]).read_text())
    counts = [(count["num_row_groups"], count["num_rows"]) for count in info.values()]
    assert counts == [(2, 6), (2, 5)]
    assert list(official_multi_reference_rows(entry)) == [(pictures_of(row), row["instruction"]) for row in rows]


def test_bagel_cuts_row_groups_of_large_pictures(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [make_row(number) for number in range(5)]
    monkeypatch.setattr(export_bagel, "BYTES_PER_GROUP", len(rows[0]["output_image"]["bytes"]) * 3 // 2)
    export_rows("bagel", rows, output)
    file = pq.ParquetFile(output / "t2i/surreal_fantasy/00000.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [2, 2, 1]


# What is left out


@pytest.mark.parametrize("format", FORMATS)
def test_a_broken_picture_stops_the_export(format: str, output: Path) -> None:
    rows = [HOSTILE[0], corrupt(HOSTILE[3], "input_images")]
    with pytest.raises(ValueError, match=r"^multi_reference/00004: reference 4 of 4: OSError: .*truncated.*skip"):
        export_rows(format, rows, output)
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("format", FORMATS)
def test_broken_pictures_are_left_out_and_reported(format: str, output: Path) -> None:
    gif, text = {"bytes": encode(0, "GIF"), "path": None}, {"bytes": b"no picture", "path": None}
    rows = [
        HOSTILE[0],
        corrupt(HOSTILE[1]),
        corrupt(HOSTILE[3], "input_images"),
        make_row(20, output_image=gif),
        make_row(21, output_image=text),
        make_row(22, output_image=None),
        HOSTILE[0],
        HOSTILE[4],
    ]
    report = export_rows(format, rows, output, on_error="skip")
    assert report.rows == 2
    reasons = ["output image: .*truncated", "reference 4 of 4: ", "GIF is none of", "cannot identify", "missing"]
    reasons.append("a second row with this id")
    bad = [row["id"] for row in rows[1:7]]
    assert [row_id for row_id, _ in report.left_out] == bad
    for (_, reason), expected in zip(report.left_out, reasons, strict=True):
        assert re.search(expected, reason)
    written = json.loads((output.parent / "out.report.json").read_text())
    assert written["rows"] == 2
    assert [tuple(item) for item in written["left_out"]] == report.left_out
    assert written["entries"] == sorted(path.name for path in output.iterdir())


def test_a_picture_in_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "picture.JPG"
    path.write_bytes(encode(1))
    assert check_row(make_row(1, output_image={"bytes": None, "path": str(path)})).image.data == encode(1)
    with pytest.raises(ValueError, match="output image: FileNotFoundError"):
        check_row(make_row(1, output_image={"bytes": None, "path": str(tmp_path / "gone.jpg")}))


@pytest.mark.parametrize("format", FORMATS)
def test_no_rows_are_an_error(format: str, output: Path) -> None:
    with pytest.raises(ValueError, match="no row to write: the source has none"):
        export_rows(format, [], output)
    with pytest.raises(ValueError, match=r"no row to write: all 1 are left out \(surreal_fantasy/00001: output image"):
        export_rows(format, [corrupt(HOSTILE[0])], output, on_error="skip")
    assert list(output.parent.iterdir()) == []


# The output folder


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_is_replaced_as_a_whole_only_when_asked(format: str, output: Path) -> None:
    export_rows(format, HOSTILE[:2], output)
    before = hashes(output.parent)
    with pytest.raises(FileExistsError, match="holds an export already; overwrite"):
        export_rows(format, HOSTILE[:1], output)
    assert hashes(output.parent) == before
    export_rows(format, HOSTILE[:1], output, overwrite=True)
    replaced = hashes(output.parent)
    fresh = output.with_name("fresh")
    export_rows(format, HOSTILE[:1], fresh)
    assert replaced.keys() == {name.replace("fresh", "out") for name in hashes(output.parent) if "fresh" in name}
    assert replaced != before


def test_a_failed_export_leaves_the_earlier_one(output: Path) -> None:
    export_rows("jsonl", HOSTILE[:2], output)
    before = hashes(output.parent)
    with pytest.raises(ValueError, match="truncated"):
        export_rows("bagel", [HOSTILE[0], corrupt(HOSTILE[1])], output, overwrite=True)
    assert hashes(output.parent) == before


def test_foreign_files_are_never_touched(output: Path) -> None:
    output.mkdir(parents=True)
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"no export wrote \(thesis.txt\)"):
        export_rows("jsonl", HOSTILE, output, overwrite=True)
    (output / "thesis.txt").unlink()
    export_rows("jsonl", HOSTILE, output)  # empty: fine
    (output / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes.txt"):
        export_rows("jsonl", HOSTILE, output, overwrite=True)
    assert (output / "notes.txt").read_text() == "mine"


def test_a_foreign_report_file_and_a_file_as_output_are_refused(output: Path) -> None:
    output.parent.mkdir(parents=True)
    report = output.with_name("out.report.json")
    report.write_text('{"mine": 1}')
    with pytest.raises(FileExistsError, match="is no report of an export"):
        export_rows("jsonl", HOSTILE, output)
    assert report.read_text() == '{"mine": 1}'
    with pytest.raises(FileExistsError, match="is not a folder"):
        export_rows("jsonl", HOSTILE, report)
    with pytest.raises(FileExistsError, match="mount point"):
        export_rows("jsonl", HOSTILE, "/proc")


KILLED = """
import io, os, sys
from PIL import Image
from echo4o_hf.data.export import export_rows

picture = io.BytesIO()
Image.new("RGB", (8, 8)).save(picture, "PNG")
image = {"bytes": picture.getvalue(), "path": None}
columns = {"subset": "multi_reference", "task_type": "", "category": "", "instruction": ""}

def rows():
    for number in range(40):
        yield {"id": f"multi_reference/{number}", **columns, "input_images": [image], "output_image": image}
    os._exit(9)

export_rows("bagel", rows(), sys.argv[1])
"""


def test_a_killed_export_starts_anew(output: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(output)]
    assert subprocess.run(command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 9
    assert not output.exists()
    assert (output.parent / ".out.echo4o-export/multi_reference").is_dir()  # what it had written, under another name
    export_rows("bagel", HOSTILE[:3], output)
    assert sorted(path.name for path in output.iterdir()) == ["dataset_info.json", "t2i"]
    assert sorted(path.name for path in output.parent.iterdir()) == ["out", "out.report.json"]


@pytest.mark.parametrize("format", FORMATS)
def test_an_interrupted_export_leaves_nothing(format: str, output: Path) -> None:
    def rows() -> Iterator[Row]:
        yield from HOSTILE
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_rows(format, rows(), output)
    assert list(output.parent.iterdir()) == []


def test_two_exports_into_one_folder_at_a_time_are_refused(output: Path) -> None:
    def rows() -> Iterator[Row]:
        with pytest.raises(FileExistsError, match="another export is writing"):
            export_rows("jsonl", HOSTILE, output)
        yield from HOSTILE

    assert export_rows("jsonl", rows(), output).rows == len(HOSTILE)


@pytest.mark.parametrize("call", range(4))
def test_cut_off_while_it_is_put_in_place(call: int, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is there afterwards, the next export neither mistakes it for foreign files nor mixes with it."""
    export_rows("jsonl", HOSTILE[:2], output)
    calls, replace = iter(range(9)), os.replace

    def cut_off(*paths: Path) -> None:
        if next(calls) == call:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", cut_off)
        export_rows("bagel", HOSTILE[:3], output, overwrite=True)
    export_rows("webdataset", HOSTILE[:3], output, overwrite=True)
    assert sorted(path.name for path in output.parent.iterdir()) == ["out", "out.report.json"]
    assert all(path.suffix == ".tar" for path in output.iterdir())


def test_arguments_are_checked(output: Path) -> None:
    with pytest.raises(ValueError, match="format must be one of bagel, .*got 'parquet'"):
        export_rows("parquet", HOSTILE, output)
    with pytest.raises(ValueError, match="on_error must be .*got 'ignore'"):
        export_rows("jsonl", HOSTILE, output, on_error="ignore")
    with pytest.raises(ValueError, match="max_shard_size is for bagel and webdataset"):
        export_rows("jsonl", HOSTILE, output, max_shard_size="1MB")
    assert not output.parent.exists()


# From the dataset's own layouts


@pytest.mark.parametrize("format", FORMATS)
def test_export_reads_the_hubs_layout(format: str, tmp_path: Path, output: Path) -> None:
    expected = write_hub_layout(tmp_path / "hub")
    report = export(format, output, tmp_path / "hub")
    assert (report.format, report.rows, report.left_out) == (format, len(expected), [])
    several = [row for row in expected if row.subset == "multi_reference"]
    assert export(format, output, tmp_path / "hub", subset="multi_reference", overwrite=True).rows == len(several)


def test_every_row_of_the_hubs_layout_arrives(tmp_path: Path, output: Path) -> None:
    expected = {row.id: row for row in write_hub_layout(tmp_path / "hub")}
    export("jsonl", output, tmp_path / "hub")
    records = [json.loads(line) for line in (output / "data.jsonl").read_text().splitlines()]
    assert {record["id"] for record in records} == expected.keys()
    for record in records:
        row = expected[record["id"]]
        assert (record["instruction"], record["category"]) == (row.instruction, row.category)
        assert Path(record["output_image"]).read_bytes() == row.output
        assert [Path(path).read_bytes() for path in record["input_images"]] == row.inputs


def test_what_the_loader_leaves_out_is_reported(tmp_path: Path, output: Path) -> None:
    damages = ("missing", "undecodable", "broken line", "no field", "twice")
    expected = write_hub_layout(tmp_path / "hub", damages=damages)
    with pytest.raises(ValueError, match="problems in hub"):
        export("jsonl", output, tmp_path / "hub", subset="surreal_fantasy")
    assert list(output.parent.glob("*")) == []
    report = export("jsonl", output, tmp_path / "hub", subset="surreal_fantasy", on_error="skip")
    assert report.rows == len([row for row in expected if row.subset == "surreal_fantasy"])
    found = dict(report.left_out)
    assert len(found) == len(report.left_out) == len(damages)
    reasons = {"00000": "image is missing", "00001": "does not decode", "00005": "conflict.jsonl:7"}
    assert all(reason in found[f"surreal_fantasy/{name}"] for name, reason in reasons.items())
    assert sum("conflict.jsonl" in place for place in found) == 2  # lines that name no id
    assert json.loads((output.parent / "out.report.json").read_text())["left_out"] == [
        list(x) for x in report.left_out
    ]


def test_the_loaders_log_is_as_before_after_an_export(tmp_path: Path, output: Path) -> None:
    before = (logger.level, logger.propagate, logger.handlers[:])
    write_hub_layout(tmp_path / "hub", damages=("missing",))
    export("jsonl", output, tmp_path / "hub", on_error="skip")
    assert (logger.level, logger.propagate, logger.handlers) == before
