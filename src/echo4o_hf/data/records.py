"""The records in the metadata of Echo-4o-Image: one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from .layout import file_name, stem, telling_folders


class Record(NamedTuple):
    """One line of metadata; `inputs` and `output` are paths as they stand there."""

    id: str
    subset: str
    task_type: str
    category: str
    instruction: str
    inputs: tuple[str, ...]
    output: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.id})"


def read_records(subset: str, files: Iterable[tuple[str, Iterable[bytes]]]) -> tuple[list[Record], list[str]]:
    """The records of one subset in the order of its metadata, and what is wrong with the lines that give none.

    Args:
        subset: Name of the subset.
        files: Names of the metadata files, each with its lines.
    """
    records: list[Record] = []
    problems: list[str] = []
    for file, lines in files:
        for line, text in enumerate(lines, 1):
            try:
                if text.strip():
                    records.append(_record(subset, file, line, text))
            except ValueError as error:
                problems.append(f"{file}:{line}: {error}")
    return _with_ids(subset, records, problems), problems


def _record(subset: str, file: str, line: int, text: bytes) -> Record:
    try:
        fields = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"a record must be a JSON object, got {_short(fields)}")
    several = subset == "multi_reference"
    inputs = fields.get("input_images") or []
    if not isinstance(inputs, list) or (several and not inputs):
        raise ValueError(f"'input_images' must be a list of paths, got {_short(fields.get('input_images'))}")
    output = _text(fields, "output_image")
    categories = telling_folders(output)
    if several and not categories:
        raise ValueError(f"'output_image' must lie in the folder of a category, got {_short(output)}")
    return Record(
        id="",
        subset=subset,
        task_type=_text({"task_type": subset if several else "t2i", **fields}, "task_type"),
        category=categories[-1] if several else _text(fields, "type"),
        instruction=_text(fields, "instruction"),
        inputs=tuple(_text({"input_images": path}, "input_images") for path in inputs),
        output=output,
        file=file,
        line=line,
    )


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"'{name}' must be a text, got {_short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"'{name}' is not valid Unicode ({error.reason})") from error
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _with_ids(subset: str, records: list[Record], problems: list[str]) -> list[Record]:
    """Name records by their output: by its stem, and where that is not unique all by more of the path."""
    ids: list[str] = []
    for name in (_short_name, _name_with_folders, _name_with_folders_and_ending):
        names = {record.output: name(record) for record in records}
        ids = [f"{subset}/{names[record.output]}" for record in records]
        if len(set(names.values())) == len(names):
            break
    first: dict[str, Record] = {}
    for record, identifier in zip(records, ids, strict=True):
        record = record._replace(id=identifier)
        if identifier in first:
            problems.append(f"{record}: has the output image of {first[identifier]}")
        first.setdefault(identifier, record)
    return list(first.values())


def _short_name(record: Record) -> str:
    category = telling_folders(record.output)[-1:] if record.inputs else []
    return "/".join([*category, stem(record.output)])


def _name_with_folders(record: Record) -> str:
    return "/".join([*telling_folders(record.output), stem(record.output)])


def _name_with_folders_and_ending(record: Record) -> str:
    return "/".join([*telling_folders(record.output), file_name(record.output)])
