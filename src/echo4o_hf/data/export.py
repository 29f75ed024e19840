"""Echo-4o-Image in the formats of trainers: the official one's Parquet files, webdataset, imagefolder, JSON lines."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .export_formats import Sample, check_row, write_imagefolder, write_jsonl, write_webdataset

FORMATS = ("bagel", "webdataset", "imagefolder", "jsonl")
SHARDED = ("bagel", "webdataset")


@dataclass(frozen=True)
class ExportReport:
    """What an export holds and what it left out; written as `OUTPUT.report.json` beside the folder `OUTPUT`."""

    format: str
    output: str  # absolute
    rows: int
    left_out: list[tuple[str, str]]  # id, or file and line where there is none; reason
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
    _refuse_foreign(Path(output).absolute(), overwrite)
    left_out: list[tuple[str, str]] = []
    with _skipped_by_builder(left_out):
        rows = load_dataset(
            "echo-4o-image",
            subset,
            data_dir=None if data_dir is None else str(data_dir),
            split="train",
            streaming=True,
            revision=revision,
            on_error=on_error,
            decode=False,
        )
        return _write(format, rows, output, on_error, overwrite, max_shard_size, left_out)


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
    _check_arguments(format, on_error, max_shard_size)
    return _write(format, rows, output, on_error, overwrite, max_shard_size, [])


def _write(
    format: str,
    rows: Iterable[Mapping[str, Any]],
    output: str | Path,
    on_error: str,
    overwrite: bool,
    max_shard_size: str | int | None,
    left_out: list[tuple[str, str]],
) -> ExportReport:
    from datasets.utils.py_utils import convert_file_size_to_int

    output = Path(output).absolute()
    shard_bytes = convert_file_size_to_int("500MB" if max_shard_size is None else max_shard_size)
    checked = _Checked(rows, format, on_error, left_out)
    with _staging(output, overwrite) as folder:
        if format == "bagel":
            from .export_bagel import write_bagel

            write_bagel(checked, folder, output, shard_bytes)
        elif format == "webdataset":
            write_webdataset(checked, folder, shard_bytes)
        elif format == "imagefolder":
            write_imagefolder(checked, folder)
        else:
            write_jsonl(checked, folder, output)
        if not checked.rows:
            raise ValueError(f"no row to write{_some(left_out)}")
        names = sorted(path.name for path in folder.iterdir())
        report = ExportReport(format, str(output), checked.rows, left_out, names)
        _put_in_place(folder, output, report)
    return report


@contextmanager
def _staging(output: Path, overwrite: bool) -> Iterator[Path]:
    """An empty folder beside `output` to write in, for one export at a time; what a killed one left is removed."""
    folder = output.with_name(f".{output.name}.echo4o-export")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(f"{folder}.lock", timeout=0)
        with lock:
            try:
                _refuse_foreign(output, overwrite)
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                Path(lock.lock_file).unlink(missing_ok=True)
    except Timeout as error:
        raise FileExistsError(f"another export is writing {output}") from error


class _Checked:
    """Iterates over the samples of the rows that can be written and counts them; the others go to `left_out`."""

    def __init__(
        self, rows: Iterable[Mapping[str, Any]], format: str, on_error: str, left_out: list[tuple[str, str]]
    ) -> None:
        self.source, self.format, self.on_error, self.left_out = rows, format, on_error, left_out
        self.rows = 0

    def __iter__(self) -> Iterator[Sample]:
        from datasets.utils.tqdm import tqdm

        keys: set[str] = set()
        for row, check in tqdm(_in_threads(self.source), desc=f"Exporting as {self.format}", unit=" rows"):
            try:
                sample = check.result()
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


def _in_threads(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Future[Sample]]]:
    """Rows in their order, each with its check; a few are checked ahead, because Pillow decodes without the GIL."""
    workers = min(8, os.cpu_count() or 1)
    waiting: deque[tuple[Mapping[str, Any], Future[Sample]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for row in rows:
            waiting.append((row, pool.submit(check_row, row)))
            if len(waiting) > 2 * workers:
                yield waiting.popleft()
        yield from waiting


@contextmanager
def _skipped_by_builder(left_out: list[tuple[str, str]]) -> Iterator[None]:
    """Collect what the builder leaves out with `on_error="skip"`, which it only logs, instead of showing it."""
    from .builder import logger

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            left_out.extend(map(_id_and_reason, record.getMessage().splitlines()[1:]))

    handler, level, propagate = Collect(logging.WARNING), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _id_and_reason(problem: str) -> tuple[str, str]:
    """Of a line of the builder's: `file:7 (id): reason`, or without an id where the record could not be read."""
    place, _, reason = problem.partition(": ")
    named = re.fullmatch(r"(.+?) \((.+)\)", place)
    return (named[2], f"{named[1]}: {reason}") if named else (place, reason)


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
        raise FileExistsError(f"{output} holds an export already; overwrite (--overwrite) replaces it")


def _earlier_entries(path: Path) -> set[str]:
    """The entries that the report of an earlier export names; none without a report."""
    if not path.exists():
        return set()
    try:
        return set(json.loads(path.read_text(encoding="utf-8"))["entries"])
    except (ValueError, KeyError, TypeError) as error:
        raise FileExistsError(f"{path} is no report of an export; name another output") from error


def _put_in_place(folder: Path, output: Path, report: ExportReport) -> None:
    """In an order that leaves, wherever it is cut off, no output or one with its report."""
    earlier, written = (folder.with_name(folder.name + ending) for ending in ("-replaced", ".json"))
    shutil.rmtree(earlier, ignore_errors=True)
    if output.exists():
        os.replace(output, earlier)
    written.write_text(json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(written, _report_path(output))
    os.replace(folder, output)
    shutil.rmtree(earlier, ignore_errors=True)


def _some(left_out: list[tuple[str, str]]) -> str:
    if not left_out:
        return ": the source has none"
    first = "; ".join(f"{row_id}: {reason}" for row_id, reason in left_out[:3])
    return f": all {len(left_out)} are left out ({first})"
