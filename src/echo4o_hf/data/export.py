"""Echo-4o-Image in the formats of trainers: the official one's Parquet files, webdataset, imagefolder, JSON lines."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .export_formats import Sample, check_row, write_imagefolder, write_jsonl, write_webdataset

FORMATS = ("bagel", "webdataset", "imagefolder", "jsonl")
SHARDED = ("bagel", "webdataset")


@dataclass(frozen=True)
class ExportReport:
    """What an export holds and what it left out; written as `OUTPUT.report.json` beside the folder `OUTPUT`."""

    format: str
    output: str  # absolute
    rows: int
    left_out: list[tuple[str, str]]  # id, reason
    entries: list[str]  # names in the output folder


def export(
    format: str,
    output: str | Path,
    data_dir: str | Path | None = None,
    *,
    subset: str = "all",
    revision: str | None = None,
    on_error: str = "raise",
    overwrite: bool = False,
    max_shard_size: str | int | None = None,
) -> ExportReport:
    """Write Echo-4o-Image, or one subset, into a new folder in another format, every picture decoded before.

    The rows are streamed: nothing but the export is stored. Pictures keep their encoded bytes. An interrupted export
    leaves no `output`; started again it begins anew.

    Args:
        format: One of `FORMATS`; what each writes is said at its `write_…` function.
        output: Folder to make. It may exist when it is empty.
        data_dir: Folder in the Hub's layout or of `echo4o data build`; without it the Hub's repository.
        subset: One of the three subsets, or "all".
        revision: Of the Hub's repository.
        on_error: "raise" stops at the first row that cannot be written, "skip" leaves such rows out.
        overwrite: Replace an earlier export in `output`.
        max_shard_size: Size of a file about, as "500MB" or bytes; for bagel and webdataset.

    Raises:
        ValueError: an unknown format, bad data, or no row to write.
        FileExistsError: `output` holds an export and `overwrite` is not set, or it holds other files.
    """
    from datasets import load_dataset

    _check_arguments(format, on_error, max_shard_size)
    folder = Path(output).absolute()
    _refuse_foreign(folder, overwrite)
    data_dir = None if data_dir is None else str(data_dir)
    rows = load_dataset(
        "echo-4o-image",
        subset,
        data_dir=data_dir,
        split="train",
        streaming=True,
        revision=revision,
        on_error=on_error,
        decode=False,
    )
    return export_rows(format, rows, folder, on_error=on_error, overwrite=overwrite, max_shard_size=max_shard_size)


def export_rows(
    format: str,
    rows: Iterable[Mapping[str, Any]],
    output: str | Path,
    *,
    on_error: str = "raise",
    overwrite: bool = False,
    max_shard_size: str | int | None = None,
) -> ExportReport:
    """`export` for rows in hand: the dataset's columns, pictures as `{"bytes", "path"}`."""
    from datasets.utils.py_utils import convert_file_size_to_int

    _check_arguments(format, on_error, max_shard_size)
    output = Path(output).absolute()
    _refuse_foreign(output, overwrite)
    shard_bytes = convert_file_size_to_int("500MB" if max_shard_size is None else max_shard_size)
    partial = output.with_name(f".{output.name}.echo4o-export")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    checked = _Checked(rows, format, on_error)
    try:
        if format == "bagel":
            from .export_bagel import write_bagel

            write_bagel(checked, partial, output, shard_bytes)
        elif format == "webdataset":
            write_webdataset(checked, partial, shard_bytes)
        elif format == "imagefolder":
            write_imagefolder(checked, partial)
        else:
            write_jsonl(checked, partial, output)
        if not checked.rows:
            raise ValueError(f"no row to write{_some(checked.left_out)}")
        names = sorted(path.name for path in partial.iterdir())
        report = ExportReport(format, str(output), checked.rows, checked.left_out, names)
        _put_in_place(partial, output, report)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


class _Checked:
    """Iterates over the samples of the rows that can be written, counts them and keeps the others' reasons."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], format: str, on_error: str) -> None:
        self.source, self.format, self.on_error = rows, format, on_error
        self.rows = 0
        self.left_out: list[tuple[str, str]] = []

    def __iter__(self) -> Iterator[Sample]:
        from datasets.utils.tqdm import tqdm

        keys: set[str] = set()
        for row in tqdm(self.source, desc=f"Exporting as {self.format}", unit=" rows"):
            try:
                sample = check_row(row)
                if sample.key in keys:
                    raise ValueError("a second row with this id")
            except ValueError as error:
                if self.on_error == "raise":
                    raise ValueError(f"{row['id']}: {error}; on_error='skip' leaves such rows out") from error
                self.left_out.append((row["id"], str(error)))
                continue
            keys.add(sample.key)
            self.rows += 1
            yield sample


def _check_arguments(format: str, on_error: str, max_shard_size: str | int | None) -> None:
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    if max_shard_size is not None and format not in SHARDED:
        raise ValueError(f"max_shard_size is for {' and '.join(SHARDED)}; {format} writes a file per picture")


def _report_path(output: Path) -> Path:
    return output.with_name(output.name + ".report.json")


def _refuse_foreign(output: Path, overwrite: bool) -> None:
    """Only an empty folder or, to overwrite, an earlier export with nothing added to it may be replaced."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise FileExistsError(f"{output} is not a folder; name another output")
    if os.path.ismount(output):
        raise FileExistsError(f"{output} is a mount point; name a folder in it")
    earlier = _earlier_entries(_report_path(output))
    if not output.exists() or not any(output.iterdir()):
        return
    foreign = sorted({path.name for path in output.iterdir()} - earlier)
    if foreign:
        raise FileExistsError(f"{output} holds files that no export wrote ({', '.join(foreign[:3])}); name another")
    if not overwrite:
        raise FileExistsError(f"{output} holds an export already; set overwrite to replace it")


def _earlier_entries(path: Path) -> set[str]:
    """The entries that the report of an earlier export names; none without a report."""
    if not path.exists():
        return set()
    try:
        return set(json.loads(path.read_text(encoding="utf-8"))["entries"])
    except (ValueError, KeyError, TypeError) as error:
        raise FileExistsError(f"{path} is no report of an export; name another output") from error


def _put_in_place(partial: Path, output: Path, report: ExportReport) -> None:
    written = partial.with_name(partial.name + ".json")
    written.write_text(json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if output.exists():
        earlier = partial.with_name(partial.name + "-replaced")
        shutil.rmtree(earlier, ignore_errors=True)
        os.replace(output, earlier)
        os.replace(partial, output)
        shutil.rmtree(earlier)
    else:
        os.replace(partial, output)
    os.replace(written, _report_path(output))


def _some(left_out: list[tuple[str, str]]) -> str:
    if not left_out:
        return ": the source has none"
    first = "; ".join(f"{row_id}: {reason}" for row_id, reason in left_out[:3])
    return f": all {len(left_out)} are left out ({first})"
