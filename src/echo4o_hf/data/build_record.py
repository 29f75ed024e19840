"""What a build has written so far: enough to continue it, and to leave alone what others wrote."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from echo4o_hf.data.card import Sizes, card_text
from echo4o_hf.data.layout import SUBSETS


@dataclass(frozen=True)
class Settings:
    """What the bytes of a subset depend on: `source` tells copies of the dataset apart, `exclude` sets of ids."""

    source: str
    max_shard_size: int
    on_error: str
    exclude: str

    def check_continues(self, before: Settings, subset: str, output: Path) -> None:
        """Raise a ValueError unless a build begun with `before` may go on with these settings."""
        other = [name for name, value in asdict(self).items() if value != getattr(before, name)]
        if before.on_error == "raise" and "on_error" in other:
            other.remove("on_error")  # what "raise" has let pass is what "skip" lets pass
        if other:
            pairs = ", ".join(f"{name} {getattr(before, name)!r}, now {getattr(self, name)!r}" for name in other)
            raise ValueError(
                f"{output} holds a build of {subset} with other settings: {pairs}. Give the same ones, "
                "or build in another folder; a source whose files have changed counts as another"
            )


@dataclass(frozen=True)
class Shard:
    """A finished file: `size` is its bytes, `num_bytes` those of its Arrow table, `position` the reader's after it."""

    rows: int
    num_bytes: int
    size: int
    position: dict[str, Any]


class Record:
    """What has been built in a folder, kept in its `.build/record.json`.

    The files of a subset lie beside it until their number is known.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self._file = output / ".build" / "record.json"
        saved: dict[str, Any] = {"cards": [], "subsets": {}}
        if self._file.is_file():
            saved = json.loads(self._file.read_text(encoding="utf-8"))
        self._cards: list[str] = saved["cards"]
        self._subsets: dict[str, dict[str, Any]] = saved["subsets"]
        self.contamination: dict[str, Any] | None = saved.get("contamination")

    def shards(self, subset: str) -> list[Shard]:
        """The finished files of a subset, in their order."""
        return [Shard(**shard) for shard in self._subsets[subset]["shards"]]

    def settings(self, subset: str) -> Settings:
        """What the subset is built with."""
        return Settings(**self._subsets[subset]["settings"])

    def sizes(self, subset: str) -> Sizes:
        """What the card says of a subset."""
        shards = self.shards(subset)
        return Sizes(*(sum(getattr(shard, name) for shard in shards) for name in ("rows", "num_bytes", "size")))

    def is_complete(self, subset: str) -> bool:
        """Whether the finished files are the whole subset."""
        return bool(self._subsets[subset]["complete"])

    def complete_subsets(self) -> list[str]:
        """The subsets that the folder holds as a whole, in the usual order."""
        return [subset for subset in SUBSETS if subset in self._subsets and self.is_complete(subset)]

    def part(self, subset: str, index: int) -> Path:
        """Name of a finished file while the number of files is not known."""
        return self._file.with_name(f"{subset}-{index:05d}.parquet")

    def names(self, subset: str) -> list[Path]:
        """The names of a complete subset's files."""
        number = len(self.shards(subset))
        return [self.output / subset / f"train-{index:05d}-of-{number:05d}.parquet" for index in range(number)]

    def begin(self, subset: str, settings: Settings) -> None:
        """Find what an earlier build left of a subset.

        Raises:
            ValueError: it was begun with other settings.
            FileExistsError: the subset's folder holds files of somebody else.
        """
        entry = self._subsets.setdefault(subset, {"settings": asdict(settings), "shards": [], "complete": False})
        settings.check_continues(self.settings(subset), subset, self.output)
        entry["settings"] = asdict(settings)
        names = self.names(subset) if entry["complete"] else []
        _refuse(set((self.output / subset).glob("*")) - set(names))
        sound = [self._is_there(subset, index) for index in range(len(entry["shards"]))]
        if not all(sound):  # files were removed since: build from the first of them
            for index, name in enumerate(names):
                if name.exists():
                    os.replace(name, self.part(subset, index))
            entry.update(shards=entry["shards"][: sound.index(False)], complete=False)
            self._save()

    def _is_there(self, subset: str, index: int) -> bool:
        places = [self.part(subset, index), *(self.names(subset)[index : index + 1])]
        size = self.shards(subset)[index].size
        return any(path.is_file() and path.stat().st_size == size for path in places)

    def add(self, subset: str, shard: Shard) -> None:
        """Record one more finished file."""
        self._subsets[subset]["shards"].append(asdict(shard))
        self._save()

    def finish(self, subset: str) -> None:
        """Record that the subset's last file has been added."""
        self._subsets[subset]["complete"] = True
        self._save()

    def name_shards(self, subset: str) -> None:
        """Move the files of a complete subset to their names."""
        for index, name in enumerate(self.names(subset)):
            part = self.part(subset, index)
            if part.exists():
                name.parent.mkdir(exist_ok=True)
                os.replace(part, name)

    def check_card(self) -> None:
        """Raise a FileExistsError if the folder's README.md is not one that a build wrote."""
        readme = self.output / "README.md"
        if readme.exists() and _sha256(readme.read_bytes()) not in self._cards:
            _refuse({readme})

    def write_card(self) -> None:
        """Write the card of the complete subsets to README.md."""
        sizes = {subset: self.sizes(subset) for subset in self.complete_subsets()}
        card = card_text(sizes, self.contamination).encode()
        self._cards = [*dict.fromkeys([*self._cards, _sha256(card)])]
        self._save()  # first: a card that is not known would stop the next build
        with replacing(self.output / "README.md") as file:
            file.write(card)

    def _save(self) -> None:
        with replacing(self._file) as file:
            saved = {"cards": self._cards, "subsets": self._subsets, "contamination": self.contamination}
            file.write(json.dumps(saved, indent=1).encode())


def _refuse(files: set[Path]) -> None:
    """Raise a FileExistsError that names `files`, if there are any."""
    if files:
        names = ", ".join(str(path) for path in sorted(files)[:3])
        raise FileExistsError(
            f"{names}{' and others' if len(files) > 3 else ''}: not written by this build, nor changed by it. "
            "Move them away, or build in another folder"
        )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once it is written, and is gone when something comes between.

    Raises:
        OSError: the file, or what it is made from, stopped with one.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(
            f"{path} was not finished: {error}. What is finished is kept; build again to continue"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
