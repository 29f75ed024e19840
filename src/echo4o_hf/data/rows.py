"""From records to rows: which pictures a record means, and their bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple

from .layout import Picture, Pictures, Wanted, container_folders, file_name, folders_of, stem, telling_folders, wanted
from .records import Record
from .source import Folder, Repository


class Row(NamedTuple):
    """A record and its pictures; `output` is None while it is not known which archive holds it."""

    record: Record
    inputs: tuple[Picture, ...]
    output: Picture | None


def locate(
    records: list[Record], pictures: Pictures, known: frozenset[str], problems: list[str], pending: bool = False
) -> list[Row]:
    """The rows of the records whose pictures are found; the others go to `problems`.

    Args:
        records: All records of a subset.
        pictures: The pictures to find them in.
        known: `Files.folders` of the subset.
        problems: Where missing pictures are added.
        pending: Outputs that are not found may still be in an archive that has not been read.
    """
    claimed = {wanted(path, known) for record in records for path in (*record.inputs, record.output)}
    rows = []
    for record in records:
        missing: list[str] = []
        inputs = [_find(path, pictures, known, claimed, missing) for path in record.inputs]
        unread: list[str] = []
        output = _find(record.output, pictures, known, claimed, unread if pending else missing)
        problems.extend(f"{record}: {text}" for text in missing)
        if not missing:
            rows.append(Row(record, tuple(picture for picture in inputs if picture), output))
    return rows


def _find(
    path: str, pictures: Pictures, known: frozenset[str], claimed: set[Wanted], problems: list[str]
) -> Picture | None:
    want = wanted(path, known)
    found = pictures.find(want)
    if found and file_name(found[0].name) != want.name:  # it has another ending: unless it is another record's
        found = [picture for picture in found if Wanted(want.folders, file_name(picture.name)) not in claimed]
    if not found:
        problems.append(f"image is missing: {path}")
    elif len(found) > 1:
        problems.append(f"several images fit {path}: {', '.join(map(str, found))}")
    return found[0] if found else None


class Outputs:
    """The rows whose outputs are in one archive, by its members' names."""

    def __init__(self, archive: str, rows: Iterable[Row], known: frozenset[str]) -> None:
        self._folders = container_folders(archive)
        self._rows: dict[str, list[tuple[Wanted, Row]]] = defaultdict(list)
        self._seen: set[str] = set()
        for row in rows:
            self._rows[stem(row.record.output)].append((wanted(row.record.output, known), row))

    @property
    def matched(self) -> int:
        """Number of rows met so far."""
        return len(self._seen)

    def match(self, member: str, problems: list[str]) -> list[Row]:
        """The row that this member is the output of; rows that name exactly this file go before others."""
        folders = self._folders | folders_of(member)
        fitting = [(want, row) for want, row in self._rows.get(stem(member), []) if want.folders <= folders]
        exact = [row for want, row in fitting if want.name == file_name(member)]
        found = exact or [row for _, row in fitting]
        again = [row for row in found if row.record.id in self._seen]
        problems.extend(f"{row.record}: several images fit {row.record.output}, one is {member}" for row in again)
        self._seen.update(row.record.id for row in found)
        return [row for row in found if row not in again]


class Reader:
    """Bytes of pictures in any order; an archive's file stays open."""

    def __init__(self, source: Folder | Repository) -> None:
        self.source = source
        self._files: dict[str, IO[bytes]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, picture: Picture) -> bytes:
        """All bytes of one picture."""
        if picture.size < 0:
            with self.source.open(picture.container) as file:
                return file.read()
        if picture.container not in self._files:
            self._files[picture.container] = self._stack.enter_context(open(picture.container, "rb"))
        file = self._files[picture.container]
        file.seek(picture.offset)
        return file.read(picture.size)


def example(row: Row, reader: Reader, name: str = "", output: bytes | None = None) -> dict[str, Any]:
    """A row of the dataset; `output`, from the member `name`, where it has been read already.

    Pictures are named by id, references by the folder and file that the record gives.
    """
    record = row.record
    if output is None:
        assert row.output is not None
        name, output = row.output.name, reader.read(row.output)
    ending = PurePosixPath(name).suffix.lower()
    inputs = [
        {
            "bytes": reader.read(picture),
            "path": "/".join([record.subset, *telling_folders(path)[-1:], file_name(path)]),
        }
        for path, picture in zip(record.inputs, row.inputs, strict=True)
    ]
    return {
        "id": record.id,
        "subset": record.subset,
        "task_type": record.task_type,
        "category": record.category,
        "instruction": record.instruction,
        "input_images": inputs,
        "output_image": {"bytes": output, "path": f"{record.id.removesuffix(ending)}{ending}"},
    }
