"""What lies where in a copy of Echo-4o-Image, learnt from the names of its files.

Nothing here touches a disk, so a folder and a repository on the Hub are read alike. All paths are relative to the
copy's root, with slashes. A record names its pictures below a root that exists nowhere; which file it means is found
by the folders and the file name at the end of that path, see `Wanted`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePosixPath
from typing import NamedTuple

SUBSETS = ("surreal_fantasy", "multi_reference", "instruction_following")
_SUBSET_FOLDERS = {
    "surreal_fantasy": ("surrel", "surreal"),
    "multi_reference": ("multi",),
    "instruction_following": ("instruct",),
}
_ARCHIVES = (".tar.gz", ".tgz", ".tar")
_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_PLAIN_FOLDER = re.compile("images?$", re.I)  # says nothing about a picture


@dataclass
class Files:
    """The files of one subset, each list sorted."""

    metadata: list[str] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)

    def folders(self) -> frozenset[str]:
        """Names of all folders that tell pictures apart; an archive counts as a folder too."""
        names = {name for path in self.pictures for name in folders_of(path)}
        return frozenset(names.union(*(container_folders(path) for path in self.archives)))


class Wanted(NamedTuple):
    """The picture that a record's path means: a file of that name, or with another picture's ending, below `folders`.

    The last folder of the record's path must be there: without it, a category whose archive is missing would be
    filled with another category's pictures of the same number. Other folders only where any file of the subset has
    them; the root and `images` never.
    """

    folders: frozenset[str]
    name: str


def stem(path: str) -> str:
    """File name without folders and ending: what a record and its picture always share."""
    return unicodedata.normalize("NFC", PurePosixPath(path).stem)


def file_name(path: str) -> str:
    """File name without folders, composed the same way on every system."""
    return unicodedata.normalize("NFC", PurePosixPath(path).name)


def is_picture(path: str) -> bool:
    """Whether the file name ends like a picture's."""
    return path.lower().endswith(_PICTURES)


def folders_of(path: str) -> frozenset[str]:
    """The folders in a path, in the spelling used for comparisons."""
    return frozenset(_spelling(name) for name in PurePosixPath(path).parts[:-1])


def container_folders(archive: str) -> frozenset[str]:
    """The folders that an archive stands for: those it lies in and its own name."""
    name = PurePosixPath(archive).name
    for ending in _ARCHIVES:
        name = name[: -len(ending)] if name.lower().endswith(ending) else name
    return folders_of(archive) | {_spelling(name)}


def _spelling(folder: str) -> str:
    """One spelling for what the official copy spells in two ways."""
    return unicodedata.normalize("NFC", folder).lower().replace("sence", "scene").replace("surrel", "surreal")


def find_subsets(paths: Iterable[str], root: str = "") -> dict[str, Files]:
    """Sort the files of a copy by subset; `root`, the copy's own name, counts where it is one subset's folder."""
    visible = sorted(path for path in paths if not any(part.startswith(".") for part in path.split("/")))
    own = _subset_named(root)
    if own and {_subset_of(path) for path in visible} <= {own, None}:
        return {own: _sort_files(visible)}
    found = {subset: [path for path in visible if _subset_of(path) == subset] for subset in SUBSETS}
    return {subset: _sort_files(files) for subset, files in found.items() if files}


def _subset_named(folder: str) -> str | None:
    low = folder.lower()
    return next((subset for subset in SUBSETS if any(word in low for word in _SUBSET_FOLDERS[subset])), None)


def folder_patterns(subset: str) -> list[str]:
    """Shell patterns for the files of a subset, in any case; some files more may match."""
    words = ("".join(f"[{letter.upper()}{letter}]" for letter in word) for word in _SUBSET_FOLDERS[subset])
    return [f"*{word}*/*" for word in words]


def _subset_of(path: str) -> str | None:
    """The subset that the first telling folder of a path names."""
    return next(filter(None, map(_subset_named, PurePosixPath(path).parts[:-1])), None)


def _sort_files(paths: list[str]) -> Files:
    files = Files()
    for path in paths:
        name = path.lower()
        if name.endswith(".jsonl"):
            files.metadata.append(path)
        elif name.endswith(_ARCHIVES):
            files.archives.append(path)
        elif name.endswith(".parquet"):
            files.tables.append(path)
        elif is_picture(name):
            files.pictures.append(path)
    return files


def telling_folders(path: str) -> list[str]:
    """The folders of a record's path below its subset's folder, as they stand there, without `images`."""
    parts = PurePosixPath(path.replace("\\", "/")).parts[:-1]
    below = next((index + 1 for index, name in enumerate(parts) if _subset_named(name)), max(len(parts) - 1, 0))
    return [name for name in parts[below:] if not _PLAIN_FOLDER.match(name) and name not in ("/", ".", "..")]


def wanted(path: str, known: frozenset[str]) -> Wanted:
    """What to look for; `known` are the `Files.folders` of the subset."""
    folder, _, name = path.replace("\\", "/").rpartition("/")
    return Wanted(_required(f"{folder}/", known), file_name(name))


@lru_cache(maxsize=4096)
def _required(folder: str, known: frozenset[str]) -> frozenset[str]:
    folders = [_spelling(name) for name in telling_folders(f"{folder}file")]
    return frozenset([name for name in folders[:-1] if name in known] + folders[-1:])


class Picture(NamedTuple):
    """Bytes of a picture: a part of the file `container`, or all of it where `size` is negative."""

    container: str
    name: str
    offset: int = 0
    size: int = -1

    def __str__(self) -> str:
        return f"{self.container}/{self.name}" if self.size >= 0 else self.container


class Pictures:
    """All pictures of a subset that can be read in any order, by what a record calls them."""

    def __init__(self) -> None:
        self._by_stem: dict[str, list[tuple[frozenset[str], Picture]]] = defaultdict(list)
        self._folders: dict[frozenset[str], frozenset[str]] = {}  # one of each: equal ones of all pictures take memory

    def __len__(self) -> int:
        return sum(map(len, self._by_stem.values()))

    def add(self, folders: frozenset[str], picture: Picture) -> None:
        """Add a picture that lies below `folders`."""
        self._by_stem[stem(picture.name)].append((self._folders.setdefault(folders, folders), picture))

    def add_names(self, members: Mapping[str, Iterable[str] | None]) -> None:
        """Add the pictures in archives of which only the names are known."""
        for archive, names in members.items():
            for name in names or ():
                self.add(container_folders(archive) | folders_of(name), Picture(archive, name, 0, 0))

    def find(self, want: Wanted) -> list[Picture]:
        """The picture meant; several where the name does not say which, none where it is missing.

        A file of exactly that name goes before others, an extracted file before the same name in an archive.
        """
        candidates = self._by_stem.get(stem(want.name), [])
        fitting = [picture for folders, picture in candidates if want.folders <= folders]
        exact = [picture for picture in fitting if file_name(picture.name) == want.name]
        found = exact or fitting
        extracted = [picture for picture in found if picture.size < 0]
        return extracted or found
