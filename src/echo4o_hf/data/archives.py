"""Pictures in tar archives: read from beginning to end, or in any order after unpacking the compression once.

Members are never written as files, so a member's name can not lead anywhere; names that try to are reported.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import IO, Any, NamedTuple

from datasets.utils import tqdm
from filelock import FileLock

from .layout import is_picture

_BLOCK = 1 << 20


class Member(NamedTuple):
    """A picture in an unpacked archive: `size` bytes from `offset`."""

    name: str
    offset: int
    size: int


class Archive(NamedTuple):
    """An archive that can be read in any order, and what is wrong with it."""

    tar: str
    members: list[Member]
    problems: list[str]


def read_in_order(file: IO[bytes], label: str, problems: list[str]) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the pictures in an archive, compressed or not; `file` is read once, without seeking.

    What is wrong goes to `problems`, under the name `label`, at the latest when all is read.
    """
    with _noting_damage(label, problems), _decompressed(file) as content:
        with tarfile.open(fileobj=content, mode="r|") as archive:
            for member in _pictures(archive, label, problems):
                data = archive.extractfile(member)
                assert data is not None  # only links and folders have none
                yield member.name, data.read()
                archive.members = []  # type: ignore[attr-defined]  # or a long archive's would pile up
        while content.read(_BLOCK):  # to the checksum
            pass


def unpack(archive: str, label: str, cache: Path, identity: str) -> Archive:
    """Make an archive readable in any order: its compression is undone once, into `cache`.

    A plain tar stays where it is. `identity` changes when the archive does.
    """
    cache.mkdir(parents=True, exist_ok=True)
    name = digest(identity)
    index = cache / f"{name}.json"
    with FileLock(cache / f"{name}.lock"):
        if not index.exists():
            problems: list[str] = []
            tar = _plain_tar(archive, cache / f"{name}.tar", label, problems)
            members = _members(tar, label, problems)
            write_json(index, {"tar": tar, "members": members, "problems": problems})
        found = json.loads(index.read_text(encoding="utf-8"))
    return Archive(found["tar"], [Member(*member) for member in found["members"]], found["problems"])


def digest(identity: str) -> str:
    """A file name for an identity."""
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def write_json(path: Path, content: object) -> None:
    """Write a file that is either complete or not there."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    os.replace(partial, path)


def _plain_tar(archive: str, target: Path, label: str, problems: list[str]) -> str:
    partial = target.with_name(f"{target.name}.partial")
    with open(archive, "rb") as file:
        if not _is_gzip(file):
            return archive
        size = os.path.getsize(archive)
        reading = tqdm.wrapattr(file, "read", total=size, desc=f"Unpacking {Path(label).name}")
        try:
            with reading as packed, gzip.open(packed) as content, partial.open("wb") as out:
                with _noting_damage(label, problems):
                    while block := content.read1(_BLOCK):  # gives what there is before a truncation; read would not
                        out.write(block)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    return str(target)


def _members(tar: str, label: str, problems: list[str]) -> list[Member]:
    damaged = bool(problems)
    size, members = os.path.getsize(tar), []
    ending: list[str] = []
    with _noting_damage(label, ending), tarfile.open(tar, "r:") as archive:
        for member in _pictures(archive, label, problems):
            if member.offset_data + member.size <= size:
                members.append(Member(member.name, member.offset_data, member.size))
            archive.members = []  # type: ignore[attr-defined]
    if not damaged:  # else the compressed file has said so
        problems.extend(ending)
    return members


def _pictures(archive: tarfile.TarFile, label: str, problems: list[str]) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        wrong = _unsafe(member)
        if wrong:
            problems.append(f"{label}: member {member.name!r} {wrong}")
        elif member.isreg() and is_picture(member.name):
            yield member


def _unsafe(member: tarfile.TarInfo) -> str:
    """What is wrong with a member; nothing, for a file or folder below the archive's own."""
    path = PureWindowsPath(member.name)  # knows both slashes, and drives
    if path.anchor:
        return "has an absolute path"
    if ".." in path.parts:
        return "leads out of its folder"
    if member.issym() or member.islnk():
        return f"is a link to {member.linkname!r}"
    if not (member.isreg() or member.isdir()) or member.issparse():
        return "is no ordinary file"
    return ""


@contextmanager
def _noting_damage(label: str, problems: list[str]) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, tarfile.TarError, zlib.error) as error:
        problems.append(f"{label}: truncated or damaged archive ({error})")


def _is_gzip(file: IO[bytes]) -> bool:
    start = file.read(2)
    file.seek(0)
    return start == b"\x1f\x8b"


@contextmanager
def _decompressed(file: Any) -> Iterator[Any]:
    buffered = io.BufferedReader(file, _BLOCK)
    if buffered.peek(2)[:2] == b"\x1f\x8b":
        with gzip.GzipFile(fileobj=buffered) as content:
            yield content
    else:
        yield buffered
