"""Archives of any content: read in order and through the index alike, nothing outside of them touched."""

import gzip
import os
import random
import tarfile
from pathlib import Path

import pytest
from hub_layout import write_archive
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from echo4o_hf.data.archives import read_in_order, unpack

FILES = [("a/00000.jpg", b"one"), ("00001.PNG", b"two" * 1000), ("notes.txt", b"no picture"), ("00002.webp", b"")]
PICTURES = [(name, data) for name, data in FILES if name != "notes.txt"]


def in_order(archive: Path) -> tuple[list[tuple[str, bytes]], list[str]]:
    problems: list[str] = []
    with archive.open("rb") as file:
        return list(read_in_order(file, "label", problems)), problems


def by_index(archive: Path, cache: Path, identity: str = "1") -> tuple[list[tuple[str, bytes]], list[str]]:
    found = unpack(str(archive), "label", cache, identity)
    data = Path(found.tar).read_bytes()
    members = [(name, data[offset : offset + size]) for name, offset, size in found.members]
    return members, found.problems


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar"])
def test_both_ways_give_the_pictures(name, tmp_path):
    write_archive(tmp_path / name, FILES)
    assert in_order(tmp_path / name) == (PICTURES, [])
    assert by_index(tmp_path / name, tmp_path / "cache") == (PICTURES, [])
    kept = {path.suffix for path in (tmp_path / "cache").iterdir()} - {".lock"}
    assert kept == ({".json"} if name == "x.tar" else {".json", ".tar"})  # a plain tar is read where it is


def test_unpacked_once_and_again_after_a_change(tmp_path):
    archive = tmp_path / "x.tar.gz"
    write_archive(archive, FILES)
    assert by_index(archive, tmp_path / "cache") == (PICTURES, [])
    write_archive(archive, FILES[:1])
    assert by_index(archive, tmp_path / "cache") == (PICTURES, [])
    assert by_index(archive, tmp_path / "cache", identity="2") == (PICTURES[:1], [])


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


UNSAFE = {
    "has an absolute path": member("/etc/00000.jpg"),
    "leads out of its folder": member("images/../../00000.jpg"),
    "is a link to '/etc/passwd'": member("00000.jpg", tarfile.SYMTYPE, "/etc/passwd"),
    "is a link to '00001.PNG'": member("00000.jpg", tarfile.LNKTYPE, "00001.PNG"),
    "is no ordinary file": member("00000.jpg", tarfile.FIFOTYPE),
    "has an absolute path ": member("C:\\00000.jpg"),
    "leads out of its folder ": member("..\\00000.jpg"),
    "leads out of its folder  ": member("../folder", tarfile.DIRTYPE),
    "is no ordinary file ": member("null", tarfile.CHRTYPE),
}


@pytest.mark.parametrize("message", UNSAFE)
def test_unsafe_members_are_named_and_not_read(message, tmp_path):
    archive = tmp_path / "x.tar.gz"
    write_archive(archive, [*FILES, (UNSAFE[message], b"")])
    problem = f"label: member {UNSAFE[message].name!r} {message.strip()}"
    assert in_order(archive) == (PICTURES, [problem])
    assert by_index(archive, tmp_path / "cache") == (PICTURES, [problem])


@pytest.mark.parametrize("ending", ["tar.gz", "tar"])
def test_truncation_is_named_and_what_comes_before_it_is_read(ending, tmp_path):
    rng = random.Random(0)
    files = [(f"{index:05d}.jpg", rng.randbytes(3000)) for index in range(20)]
    archive = tmp_path / f"x.{ending}"
    write_archive(archive, files)
    archive.write_bytes(archive.read_bytes()[:40_000])
    for found, problems in (in_order(archive), by_index(archive, tmp_path / "cache")):
        assert len(problems) == 1 and "label: truncated or damaged archive" in problems[0]
        assert len(found) > 8 and found == files[: len(found)]


@pytest.mark.parametrize(
    "data", [b"", b"version https://git-lfs.github.com/spec/v1\n", gzip.compress(b"no tar" * 200, mtime=0)]
)
def test_what_is_no_archive_is_named(data, tmp_path):
    archive = tmp_path / "x.tar.gz"
    archive.write_bytes(data)
    for found, problems in (in_order(archive), by_index(archive, tmp_path / "cache")):
        assert not found and len(problems) == 1 and "truncated or damaged archive" in problems[0]


def test_a_wrong_checksum_is_named(tmp_path):
    archive = tmp_path / "x.tar.gz"
    write_archive(archive, FILES)
    content = bytearray(archive.read_bytes())
    content[-8] ^= 1
    archive.write_bytes(content)
    for found, problems in (in_order(archive), by_index(archive, tmp_path / "cache")):
        assert found == PICTURES and len(problems) == 1 and "CRC check failed" in problems[0]


def test_an_interrupted_unpacking_leaves_nothing(tmp_path, monkeypatch):
    archive = tmp_path / "x.tar.gz"
    write_archive(archive, FILES)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            unpack(str(archive), "label", tmp_path / "cache", "1")
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".lock"}
    assert by_index(archive, tmp_path / "cache") == (PICTURES, [])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(data=st.data())
def test_any_names_are_read_or_named(data, tmp_path):
    names = data.draw(st.lists(st.from_regex(r"[\x01-\u024f./\\]{1,20}(\.jpg)?", fullmatch=True), max_size=5))
    kinds = data.draw(st.lists(st.sampled_from(list(b"01234567")), min_size=len(names), max_size=len(names)))
    files = [(member(name, bytes([kind]), "x"), b"data") for name, kind in zip(names, kinds, strict=True)]
    archive = tmp_path / "x.tar"
    write_archive(archive, files)
    ways = in_order(archive), by_index(archive, tmp_path / "cache", identity=os.urandom(8).hex())
    for found, problems in ways:
        assert all(content == b"data" for _, content in found if content)
        assert not any(".." in name.replace("\\", "/").split("/") or name.startswith("/") for name, _ in found)
        assert len(found) + len(problems) <= len(files)
    assert ways[0] == ways[1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(data=st.data())
def test_any_damage_is_survived(data, tmp_path):
    archive = tmp_path / "x.tar"
    write_archive(archive, FILES)
    content = bytearray(archive.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    packed = data.draw(st.booleans())
    archive.write_bytes(gzip.compress(content) if packed else content)
    in_order(archive)
    by_index(archive, tmp_path / "cache", identity=os.urandom(8).hex())
