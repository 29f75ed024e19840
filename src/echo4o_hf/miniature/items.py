"""Shapes-140: the fixed benchmark items of the shapes world, and the item type in GenEval++'s schema.

One line of `items.jsonl`:
    {"tag": "counting", "prompt": "three red hearts", "include": [{"class": "heart", "count": 3, "color": "red"}],
     "exclude": [{"class": "heart", "count": 4}]}
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from echo4o_hf.miniature.wording import REGIONS, SIZES, Clause, parse_caption

TAGS = (
    "color_attr",
    "counting",
    "color_count_attr",
    "color_spatial_attr",
    "spatial_count_attr",
    "size_spatial_attr",
    "multi_object_count_attr",
)
SCORE_NAME = "Shapes-140"


@dataclass(frozen=True)
class Item:
    """One benchmark question; `exclude` holds (class, count) pairs: fewer than `count` of `class` may appear."""

    tag: str
    prompt: str
    include: tuple[Clause, ...]
    exclude: tuple[tuple[str, int], ...] = ()

    @property
    def spec(self) -> frozenset[Clause]:
        """What is asked for, whatever the wording and the order."""
        return frozenset(self.include)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Item:
        """Parse one row of GenEval++'s schema.

        Raises:
            ValueError: a key is missing or unknown, or a value is not one the schema knows.
        """
        _check_keys("item", row, {"tag", "prompt", "include"}, {"exclude"})
        if row["tag"] not in TAGS:
            raise ValueError(f"tag must be one of {', '.join(TAGS)}; got {row['tag']!r}")
        if not isinstance(row["prompt"], str) or not row["prompt"].strip():
            raise ValueError(f"prompt must be a text that is not empty; got {row['prompt']!r}")
        if not isinstance(row["include"], list) or not row["include"]:
            raise ValueError(f"include must be a list of at least one clause; got {row['include']!r}")
        exclude = row.get("exclude", [])
        if not isinstance(exclude, list):
            raise ValueError(f"exclude must be a list of clauses; got {exclude!r}")
        return cls(
            row["tag"],
            row["prompt"],
            tuple(_clause(entry) for entry in row["include"]),
            tuple((clause.class_name, clause.count) for clause in (_clause(entry, set()) for entry in exclude)),
        )

    def to_dict(self) -> dict[str, Any]:
        """The row that `from_dict` parses."""
        row: dict[str, Any] = {"tag": self.tag, "prompt": self.prompt, "include": []}
        for clause in self.include:
            values = {"class": clause.class_name, "count": clause.count, "color": clause.color}
            values |= {"region": clause.region, "size": clause.size}
            row["include"].append({key: value for key, value in values.items() if value is not None})
        if self.exclude:
            row["exclude"] = [{"class": name, "count": count} for name, count in self.exclude]
        return row


def read_items(path: str | Path) -> list[Item]:
    """Items of a jsonl file.

    Raises:
        ValueError: a line is no item; the message carries the file and the line number.
    """
    return _parse_lines(Path(path).read_text(encoding="utf-8").splitlines(), str(path))


@lru_cache
def load_items() -> tuple[Item, ...]:
    """The 140 items of Shapes-140, 20 per tag, in the order of `TAGS`."""
    resource = files("echo4o_hf.miniature") / "items.jsonl"
    return tuple(_parse_lines(resource.read_text(encoding="utf-8").splitlines(), "items.jsonl"))


def is_held_out(item: Item | str) -> bool:
    """Whether an item or a caption asks for the same as a benchmark item, in whatever words and order."""
    if isinstance(item, Item):
        return item.spec in _held_out_specs() or is_held_out(item.prompt)
    clauses = parse_caption(item)
    return clauses is not None and frozenset(clauses) in _held_out_specs()


@lru_cache
def _held_out_specs() -> frozenset[frozenset[Clause]]:
    return frozenset(item.spec for item in load_items())


def _parse_lines(lines: Iterable[str], name: str) -> list[Item]:
    items = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, got {type(row).__name__}")
            items.append(Item.from_dict(row))
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: {error}") from error
    return items


def _clause(row: Any, optional: Iterable[str] = ("color", "region", "size")) -> Clause:
    if not isinstance(row, dict):
        raise ValueError(f"a clause must be an object, got {row!r}")
    _check_keys("clause", row, {"class", "count"}, set(optional))
    count = row["count"]
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"count must be a positive whole number; got {count!r} in {row}")
    for key in {"class", "color"} & row.keys():
        if not isinstance(row[key], str) or not row[key]:
            raise ValueError(f"{key} must be a text that is not empty; got {row[key]!r} in {row}")
    for key, allowed in (("region", REGIONS), ("size", SIZES)):
        if key in row and row[key] not in allowed:
            raise ValueError(f"{key} must be one of {', '.join(allowed)}; got {row[key]!r} in {row}")
    return Clause(row["class"], count, row.get("color"), row.get("region"), row.get("size"))


def _check_keys(what: str, row: dict[str, Any], required: set[str], optional: set[str]) -> None:
    if missing := required - row.keys():
        raise ValueError(f"{what} lacks {', '.join(sorted(missing))}: {row}")
    if unknown := row.keys() - required - optional:
        raise ValueError(f"{what} has unknown {', '.join(sorted(unknown))}: {row}")
