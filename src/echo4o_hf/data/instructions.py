"""Ids and instructions alone: read from the metadata or the Parquet files, without touching a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from .builder import REPO_ID, REVISION, SHOWN
from .layout import SUBSETS, Files, find_subsets
from .records import read_records
from .source import Folder, Repository, open_source

COLUMNS = ["id", "subset", "instruction"]

logger = datasets.utils.logging.get_logger("datasets.echo_4o_image")


def read_instructions(
    data_dir: str | Path | None, subsets: Sequence[str] | None, revision: str | None, on_error: str
) -> Iterator[dict[str, str]]:
    """Rows of "id", "subset" and "instruction", equal to those of `load_dataset`, whatever is wrong with pictures.

    Raises:
        ValueError: a subset is not there, or its metadata has mistakes (`on_error="skip"` logs those).
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    source = open_source(None if data_dir is None else str(data_dir), REPO_ID, revision or REVISION, None)
    found = find_subsets(source.files(), source.name)
    names = SUBSETS if subsets is None else subsets
    for name in names:
        if name not in found:
            raise ValueError(
                f"{source.name} has no folder for the subset {name}, only for {', '.join(found) or 'none'}"
            )
    for name in names:
        if found[name].tables:
            yield from _from_tables(source, found[name].tables)
        else:
            yield from _from_metadata(source, name, found[name], on_error)


def _from_tables(source: Folder | Repository, paths: Sequence[str]) -> Iterator[dict[str, str]]:
    for path in paths:
        try:
            with source.open_anywhere(path) as file:
                for batch in pq.ParquetFile(file).iter_batches(columns=COLUMNS):
                    yield from batch.to_pylist()
        except pa.ArrowException as error:
            raise ValueError(f"{path} is not one of our Parquet files: {error}") from error


def _from_metadata(source: Folder | Repository, subset: str, files: Files, on_error: str) -> Iterator[dict[str, str]]:
    with ExitStack() as stack:
        lines = ((path, stack.enter_context(open(source.local(path), "rb"))) for path in files.metadata)
        records, problems = read_records(subset, lines)
    if problems and on_error == "raise":
        shown = "\n".join(problems[:SHOWN])
        raise ValueError(f"{len(problems)} problems in {source.name} (on_error='skip' reads the rest):\n{shown}")
    if problems:
        logger.warning("left out because of %d problems:\n%s", len(problems), "\n".join(problems))
    for record in records:
        yield {"id": record.id, "subset": subset, "instruction": record.instruction}
