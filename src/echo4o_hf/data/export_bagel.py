"""The Parquet files of the official trainer, and the JSON files that describe them to it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .export_formats import Sample, sample_key

ROWS_PER_GROUP = 64  # the trainer reads whole row groups, and shards multi-reference data by them
BYTES_PER_GROUP = 64 * 2**20

SCHEMAS = {
    "t2i": pa.schema([("image", pa.binary()), ("captions", pa.string())]),
    "multi_reference": pa.schema(
        [("image_list", pa.list_(pa.binary())), ("instruction_list", pa.list_(pa.list_(pa.string())))]
    ),
}


def write_bagel(samples: Iterable[Sample], folder: Path, final: Path, shard_bytes: int) -> None:
    """The official trainer's Parquet files, and what its `dataset_info` must say about them.

    `t2i/SUBSET/*.parquet`: `image` (encoded) and `captions` (JSON text of a dict). `multi_reference/SUBSET/*.parquet`:
    `image_list` (encoded, the target last) and `instruction_list` ([[instruction]]), with `parquet_info/SUBSET.json`:
    row groups and rows of each file. `dataset_info.json` lists the folders with their files and samples. All paths
    are absolute, because the trainer passes over files that `parquet_info` names differently: do not move the export.

    Text-to-image files are what the trainer deals out to ranks and workers: choose `max_shard_size` so that there are
    enough. Its published limit of 10 240 tokens per sample drops samples with two or more full-size references.

    The stock `unified_edit` dataset takes neighbours in `image_list` for steps of an edit, which is right for one
    reference only. `dataset_info.json` therefore lists these folders as a group `multi_reference`, for a dataset
    class whose context is all pictures but the last.
    """
    shards: dict[tuple[str, str], _ParquetShards] = {}
    with ExitStack() as stack:
        for sample in samples:
            kind = "multi_reference" if sample.references else "t2i"
            part = (kind, sample_key(sample.subset))
            if part not in shards:
                shards[part] = stack.enter_context(_ParquetShards(folder.joinpath(*part), SCHEMAS[kind], shard_bytes))
            size = sum(len(picture.data) for picture in (sample.image, *sample.references))
            shards[part].write(_bagel_row(sample), size)
    info: dict[str, dict[str, Any]] = {}
    for (kind, subset), files in sorted(shards.items()):
        entry: dict[str, Any] = {
            "data_dir": str(final / kind / subset),
            "num_files": len(files.written),
            "num_total_samples": sum(count["num_rows"] for count in files.written.values()),
        }
        if kind == "multi_reference":
            entry["parquet_info_path"] = str(final / "parquet_info" / f"{subset}.json")
            counts = {os.path.join(entry["data_dir"], name): count for name, count in files.written.items()}
            _write_json(folder / "parquet_info" / f"{subset}.json", counts)
        info.setdefault("t2i_pretrain" if kind == "t2i" else kind, {})[f"echo4o_{subset}"] = entry
    _write_json(folder / "dataset_info.json", info)


def _bagel_row(sample: Sample) -> dict[str, Any]:
    if not sample.references:
        return {
            "image": sample.image.data,
            "captions": json.dumps({"caption": sample.instruction}, ensure_ascii=False),
        }
    pictures = [*sample.references, sample.image]
    return {"image_list": [picture.data for picture in pictures], "instruction_list": [[sample.instruction]]}


class _ParquetShards:
    """Parquet files in a new folder, cut by bytes, with small row groups; `written`: their counts by name."""

    def __init__(self, folder: Path, schema: Any, shard_bytes: int) -> None:
        self.folder, self.schema, self.shard_bytes = folder, schema, shard_bytes
        self.written: dict[str, dict[str, int]] = {}
        self.rows: list[dict[str, Any]] = []
        self.group_size = self.file_size = 0
        self.file: Any = None
        folder.mkdir(parents=True)

    def __enter__(self) -> _ParquetShards:
        return self

    def write(self, row: dict[str, Any], size: int) -> None:
        self.rows.append(row)
        self.group_size += size
        if len(self.rows) >= ROWS_PER_GROUP or self.group_size >= min(BYTES_PER_GROUP, self.shard_bytes):
            self._write_group()

    def _write_group(self) -> None:
        if self.file is None:
            self.name = f"{len(self.written):05d}.parquet"
            self.written[self.name] = {"num_row_groups": 0, "num_rows": 0}
            # Pictures are compressed already, and their smallest and largest bytes say nothing.
            settings = {"compression": "none", "use_dictionary": False, "write_statistics": False}
            self.file = pq.ParquetWriter(self.folder / self.name, self.schema, **settings)
        self.file.write_table(pa.Table.from_pylist(self.rows, self.schema), row_group_size=len(self.rows))
        self.written[self.name]["num_row_groups"] += 1
        self.written[self.name]["num_rows"] += len(self.rows)
        self.file_size += self.group_size
        self.rows, self.group_size = [], 0
        if self.file_size >= self.shard_bytes:
            self._close_file()

    def _close_file(self) -> None:
        self.file.close()
        self.file, self.file_size = None, 0

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        if error is None and self.rows:
            self._write_group()
        if self.file is not None:
            self._close_file()


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
