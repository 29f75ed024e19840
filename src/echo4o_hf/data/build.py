"""The Parquet copy of Echo-4o-Image: `<subset>/train-00000-of-000NN.parquet`, and a card.

Pictures stay as they were encoded; datasets and the Hub's viewer read it without this package. Rows come from the
streaming reader, one archive after the other, so that only references are unpacked on the way. Finished files are
recorded in `.build/`: a build that was stopped goes on after the last one, and ends with the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets.arrow_writer import get_parquet_column_options
from datasets.config import DEFAULT_CDC_OPTIONS
from datasets.utils import tqdm
from datasets.utils.py_utils import convert_file_size_to_int
from filelock import FileLock
from huggingface_hub import HfApi

from echo4o_hf.data.archives import digest
from echo4o_hf.data.build_record import Record, Settings, Shard, replacing
from echo4o_hf.data.builder import FEATURES, REPO_ID, REVISION, SHOWN, Echo4oImage
from echo4o_hf.data.layout import SUBSETS, Files, find_subsets
from echo4o_hf.data.pictures import picture_problem
from echo4o_hf.data.source import Folder, Repository, open_source

ROW_GROUP_ROWS = 100
ROW_GROUP_BYTES = 32 * 2**20  # what datasets asks the Hub for at once when it streams


def build(
    output: str | Path,
    data_dir: str | Path | None = None,
    *,
    subsets: Sequence[str] | None = None,
    revision: str | None = None,
    max_shard_size: int | str = "500MB",
    on_error: str = "raise",
    exclude: frozenset[str] = frozenset(),
    overlap: Mapping[str, Any] | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> dict[str, int]:
    """Write the Parquet copy below `output`; the same call continues one that was stopped.

    Args:
        output: a new folder, or one that this function wrote.
        data_dir: the dataset in any layout that `load_dataset("echo-4o-image")` reads; by default the Hub's copy.
        subsets: which to write, by default all three; others may follow in a later call.
        revision: of the Hub's copy.
        max_shard_size: a file ends with the row whose pictures bring it to this size, as in "500MB".
        on_error: "raise", or "skip" to leave out what cannot be read and log it. "skip" may continue what "raise"
            stopped.
        exclude: ids of rows to leave out.
        overlap: a report of `echo4o_hf.data.overlap.overlap` on the same data, whose counts enter the card.
        push_to_hub: a repository, "you/echo-4o-image", to upload the subsets and the card to; created where there is
            none. Older Parquet files of these subsets are deleted from it.
        private: whether a repository created here is private.

    Returns:
        The number of rows of each subset in `output`.

    Raises:
        ValueError: a wrong argument, a dataset that cannot be read, or `output` holds a build of something else.
        FileExistsError: `output` holds other files where the build would write.
        OSError: a file cannot be written, or another process is building in `output`.
    """
    output, chosen, size = Path(output), _checked_subsets(subsets), _checked_size(max_shard_size)
    if data_dir is not None:
        if revision is not None:
            raise ValueError(f"revision {revision!r} is of the Hub's copy: not to be given with data_dir")
        if output.resolve().is_relative_to(Path(data_dir).resolve()):
            raise ValueError(f"output {str(output)!r} is in data_dir {str(data_dir)!r}; choose a folder outside it")
    source = open_source(None if data_dir is None else str(data_dir), REPO_ID, revision or REVISION, None)
    readers = {subset: _reader(subset, source, on_error) for subset in chosen}
    if push_to_hub is not None:  # first, so that who may not write there need not build to learn it
        HfApi().create_repo(push_to_hub, repo_type="dataset", private=private, exist_ok=True)
    with _locked(output):
        record = Record(output)
        record.check_card()
        if overlap is not None:
            record.contamination = _contamination(overlap, exclude)
        for subset in chosen:
            record.begin(subset, Settings(_state(source, subset), size, on_error, _excluded(exclude)))
        for subset in chosen:
            if not record.is_complete(subset):
                _write_subset(record, subset, readers[subset], _number_of_rows(source, subset), exclude)
            record.name_shards(subset)
        record.write_card()
        if push_to_hub is not None:
            _push(output, record.complete_subsets(), push_to_hub)
        return {subset: record.sizes(subset).rows for subset in record.complete_subsets()}


def _contamination(overlap: Mapping[str, Any], exclude: frozenset[str]) -> dict[str, Any]:
    """What the card says of an overlap: its counts, and whether the rows found are left out."""
    names = ("threshold", "ngram", "counts", "pairs")
    missing = [name for name in names if name not in overlap]
    if missing:
        raise ValueError(f"overlap must be a report of `echo4o data overlap`, this has no {', '.join(missing)}")
    dropped = bool(exclude) and {pair["id"] for pair in overlap["pairs"]} <= exclude
    return {**{name: overlap[name] for name in names[:3]}, "dropped": dropped}


def _reader(subset: str, source: Folder | Repository, on_error: str) -> Echo4oImage:
    """The builder by its class: its name would mean a folder of this name in the working directory."""
    place = {"data_dir": source.root} if isinstance(source, Folder) else {"revision": source.commit}
    return Echo4oImage(config_name=subset, on_error=on_error, decode=False, **place)


def _write_subset(record: Record, subset: str, reader: Echo4oImage, total: int, exclude: frozenset[str]) -> None:
    """Write the files of one subset that are not there yet."""
    rows = reader.as_streaming_dataset(split="train")
    if record.shards(subset):
        rows.load_state_dict(record.shards(subset)[-1].position)
    done = record.sizes(subset).rows
    bar = tqdm(rows, desc=f"Building {subset}", unit=" rows", initial=done, total=total)
    kept = (row for row in bar if row["id"] not in exclude)
    stream = kept if reader.config.on_error == "skip" else _sound(kept, reader.config.max_pixels)
    while True:
        part = record.part(subset, len(record.shards(subset)))
        written = _write_shard(part, stream, record.settings(subset).max_shard_size)
        if written is None:
            break
        record.add(subset, Shard(*written, part.stat().st_size, rows.state_dict()))
    if not record.sizes(subset).rows:
        raise ValueError(f"{subset} has no rows that could be built")
    record.finish(subset)


def _sound(rows: Iterable[dict[str, Any]], max_pixels: int) -> Iterator[dict[str, Any]]:
    """The rows up to the first with a picture that does not decode, which streaming leaves to whoever decodes.

    Raises:
        ValueError: after looking at all of them, with the number of such rows and the first few.
    """
    problems = []
    for row in rows:
        for picture in (*row["input_images"], row["output_image"]):
            problem = picture_problem(picture["bytes"], max_pixels)
            if problem:
                problems.append(f"{row['id']}: {picture['path']} {problem}")
        if not problems:
            yield row
    if problems:
        shown = "\n".join(problems[:SHOWN])
        raise ValueError(f"{len(problems)} damaged pictures; on_error='skip' leaves their rows out:\n{shown}")


def _write_shard(path: Path, rows: Iterator[dict[str, Any]], max_shard_size: int) -> tuple[int, int] | None:
    """Write one file of the next rows; returns their number and the bytes of their table, None where none is left."""
    tables = _row_groups(rows, max_shard_size)
    first = next(tables, None)
    if first is None:
        return None
    number = num_bytes = 0
    schema = FEATURES.arrow_schema
    # As in push_to_hub: parts that two files share are uploaded and stored once, wherever they are in them.
    options = {"use_content_defined_chunking": DEFAULT_CDC_OPTIONS, **get_parquet_column_options(FEATURES, schema)}
    with replacing(path) as file:
        with pq.ParquetWriter(file, schema, write_page_index=True, **options) as writer:
            for table in chain([first], tables):
                writer.write_table(table)
                number += len(table)
                num_bytes += table.nbytes
        os.fsync(file.fileno())  # before the record names it
    return number, num_bytes


def _row_groups(rows: Iterator[dict[str, Any]], max_shard_size: int) -> Iterator[pa.Table]:
    """Tables of the next rows, until their pictures reach the size of a file."""
    shard_size = group_size = 0
    group: list[dict[str, Any]] = []
    for row in rows:
        pictures = [*row["input_images"], row["output_image"]]
        for picture in pictures:
            picture["path"] = PurePosixPath(picture["path"]).name  # as datasets does when it embeds pictures
        group.append(row)
        size = sum(len(picture["bytes"]) for picture in pictures)
        shard_size, group_size = shard_size + size, group_size + size
        if len(group) == ROW_GROUP_ROWS or group_size >= ROW_GROUP_BYTES or shard_size >= max_shard_size:
            yield pa.Table.from_pylist(group, FEATURES.arrow_schema)
            group, group_size = [], 0
        if shard_size >= max_shard_size:
            return
    if group:
        yield pa.Table.from_pylist(group, FEATURES.arrow_schema)


def _push(output: Path, subsets: Sequence[str], repository: str) -> None:
    """Upload what was built; files that are there already, whole or in parts, are not sent again."""
    HfApi().upload_folder(
        repo_id=repository,
        repo_type="dataset",
        folder_path=output,
        allow_patterns=["README.md", *(f"{subset}/train-*.parquet" for subset in subsets)],
        delete_patterns=[f"{subset}/*.parquet" for subset in subsets],  # files of a build with another number of them
        commit_message="Build the Parquet copy",
    )


def _checked_subsets(subsets: Sequence[str] | None) -> list[str]:
    if subsets is None:
        return list(SUBSETS)
    unknown = [subset for subset in subsets if subset not in SUBSETS]
    if unknown or not subsets:
        raise ValueError(f"subsets must be some of {', '.join(SUBSETS)}, got {list(subsets)}")
    return [subset for subset in SUBSETS if subset in subsets]


def _checked_size(size: int | str) -> int:
    number = convert_file_size_to_int(size)
    if number < 1:
        raise ValueError(f"max_shard_size must be positive, got {size!r}")
    return number


def _excluded(ids: frozenset[str]) -> str:
    """Tells one set of ids from another; empty for none."""
    return digest("\n".join(sorted(ids)))[:8] if ids else ""


def _state(source: Folder | Repository, subset: str) -> str:
    """Says which files a subset is read from; those of a folder are known by place, size and time of change."""
    if isinstance(source, Repository):
        return source.state()
    files = _files(source, subset)
    paths = (*files.metadata, *files.archives, *files.pictures, *files.tables)
    state = digest("\n".join(source.identity(path) for path in paths))
    return f"{source.root} ({state[:8]})"


def _number_of_rows(source: Folder | Repository, subset: str) -> int:
    """For the progress bar: records, whether or not they can be read."""
    files, rows = _files(source, subset), 0
    for path in files.tables:
        with source.open_anywhere(path) as file:
            rows += pq.read_metadata(file).num_rows
    if not files.tables:
        for path in files.metadata:
            with open(source.local(path), "rb") as file:
                rows += sum(1 for line in file if line.strip())
    return rows


def _files(source: Folder | Repository, subset: str) -> Files:
    return find_subsets(source.files(), source.name).get(subset, Files())


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Make the folder, and keep it from other builds."""
    (output / ".build").mkdir(parents=True, exist_ok=True)
    lock = output / ".build" / "lock"
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(lock, timeout=1))
        except TimeoutError as error:
            raise OSError(f"another process is building in {output}") from error
        yield
