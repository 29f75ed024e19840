"""A small Echo-4o-Image in the Hub's layout, with all that makes it hard to read; traps and damages have switches."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = "/Echo-4o-Image"
SURREAL, MULTI, INSTRUCTION = "Surrel-Fantasy-Image", "Multi-Reference-Image", "Instruction-Following-Image"
DAMAGES = ("missing", "undecodable", "large", "broken line", "truncated", "unsafe", "twice", "no field")


@dataclass(frozen=True)
class Traps:
    """What no reader may stumble over; all are on, and each can be switched off."""

    shuffled: bool = True  # metadata in another order than the archives
    prefixes: bool = True  # members under images/, under their category, or under nothing
    endings: bool = True  # .JPG, .jpeg, .png and .webp where the record says .jpg
    spelling: bool = True  # a category that folder and record spell differently
    non_ascii: bool = True
    unrecorded: bool = True  # an image without a record
    extracted: float = 0.0  # share of the archives that lie there as folders instead


@dataclass
class Expected:
    """One row as it must come out."""

    id: str
    task_type: str
    category: str
    instruction: str
    output: bytes
    inputs: list[bytes] = field(default_factory=list)

    @property
    def subset(self) -> str:
        return self.id.split("/")[0]


def write_hub_layout(
    folder: Path, rows: int = 6, traps: Traps | None = None, damages: Sequence[str] = (), size: int = 24
) -> list[Expected]:
    """Write it; returns the rows in the order of the metadata, without those that the damages take away.

    The same file names occur in all subsets. Damages hit the surreal subset.
    """
    assert set(damages) <= set(DAMAGES), damages
    traps, rng = traps or Traps(), random.Random(0)
    expected = _write_text_to_image(folder, SURREAL, "conflict", ("T1", "T2"), rows, traps, damages, size, rng)
    expected += _write_multi_reference(folder, rows, traps, size, rng)
    return expected + _write_text_to_image(
        folder, INSTRUCTION, INSTRUCTION, ("easy", "hard"), rows, traps, (), size, rng
    )


def _write_text_to_image(folder, name, metadata, types, rows, traps, damages, size, rng) -> list[Expected]:
    subset = "surreal_fantasy" if name == SURREAL else "instruction_following"
    records, expected, files = [], [], []
    for index in range(rows):
        member, picture = _picture(index, traps, size, rng)
        text = _text(index, traps, rng)
        files.append((member, picture))
        path = f"{ROOT}/{name}/images/{index:05d}.jpg"
        category = types[index % len(types)]
        records.append({"task_type": "t2i", "instruction": text, "output_image": path, "type": category})
        expected.append(Expected(f"{subset}/{index:05d}", "t2i", category, text, picture))
    if traps.unrecorded:
        files.append(("99999.jpg", encode(size, rng)))
    if traps.shuffled:
        order = rng.sample(range(rows), rows)
        records, expected = [records[i] for i in order], [expected[i] for i in order]
    lines = [json.dumps(record, ensure_ascii=False).encode() for record in records]
    lost = _damage(files, lines, records, damages, size, rng)
    expected = [row for row in expected if row.id.split("/")[1] not in lost]
    half = len(files) // 2
    for archive, part, prefix in (
        ("0-half", files[:half], "images/" if traps.prefixes else ""),
        ("half-", files[half:], ""),
    ):
        members = [(f"{prefix}{member}", data) for member, data in part]
        _write_pictures(folder / name / "images" / f"{archive}.tar.gz", members, traps, rng)
    write_lines(folder / name / f"{metadata}.jsonl", lines)
    if "truncated" in damages:
        archive = sorted((folder / name / "images").glob("*.tar.gz"))[0]
        archive.write_bytes(archive.read_bytes()[:-60])
    return expected


def _damage(files, lines, records, damages, size, rng) -> set[str]:
    """Damage members and metadata; returns the stems of the rows that are lost, one for each damage of a row."""
    lost = set()

    def record_of(index: int) -> int:
        return next(i for i, record in enumerate(records) if f"/{index:05d}." in record["output_image"])

    if "missing" in damages:
        files[0] = ("77777.jpg", files[0][1])
        lost.add("00000")
    if "undecodable" in damages:
        files[1] = (files[1][0], files[1][1][: len(files[1][1]) // 2])
        lost.add("00001")
    if "large" in damages:
        files[2] = (files[2][0], encode(size * 10, rng))
        lost.add("00002")
    if "broken line" in damages:
        lines[record_of(3)] = lines[record_of(3)][:-5]
        lost.add("00003")
    if "no field" in damages:
        index = record_of(4)
        lines[index] = json.dumps({**records[index], "instruction": 7}).encode()
        lost.add("00004")
    if "twice" in damages:
        lines.append(json.dumps({**records[record_of(5)], "instruction": "another"}).encode())
    if "unsafe" in damages:
        files.append(("../escaped.jpg", encode(size, rng)))
    return lost


def _write_multi_reference(folder, rows, traps, size, rng) -> list[Expected]:
    name, expected = MULTI, []
    pools: dict[str, list[tuple[str, bytes]]] = {category: [] for category in ("human", "object", "sence")}
    outputs: dict[str, list[tuple[str, bytes]]] = {"hum_sce": [], "hum_obj": []}
    records: dict[str, list[dict[str, Any]]] = {category: [] for category in outputs}
    rows_of: dict[str, list[Expected]] = {category: [] for category in outputs}
    for index in range(rows):
        category = ("hum_sce", "hum_obj")[index % 2]
        references = []
        for pool in ("human", "sence" if category == "hum_sce" else "object"):
            member, picture = _picture(len(pools[pool]), traps, size, rng)
            pools[pool].append((member, picture))
            said = "scene" if pool == "sence" and traps.spelling else pool
            path = f"{ROOT}/{name}/multi_refer_images_input/{said}/{len(pools[pool]) - 1:05d}.jpg"
            references.append((path, picture))
        number = len(outputs[category])
        member, picture = _picture(number, traps, size, rng)
        outputs[category].append((member, picture))
        text = _text(index, traps, rng)
        output = f"{ROOT}/{name}/multi_refer_images_output/{category}/{number:05d}.jpg"
        records[category].append(
            {"instruction": text, "input_images": [path for path, _ in references], "output_image": output}
        )
        identifier = f"multi_reference/{category}/{number:05d}"
        data = [data for _, data in references]
        rows_of[category].append(Expected(identifier, "multi_reference", category, text, picture, data))
    below = folder / name
    for kind, groups in (("input", pools), ("output", outputs)):
        for category, files in groups.items():
            if files:
                prefix = {"human": "images/", "hum_obj": ""}.get(category, f"{category}/") if traps.prefixes else ""
                archive = below / f"multi_refer_images_{kind}" / category / f"{category}.tar.gz"
                _write_pictures(archive, [(f"{prefix}{member}", data) for member, data in files], traps, rng)
    for category in sorted(records):
        order = list(range(len(records[category])))
        if traps.shuffled:
            rng.shuffle(order)
        lines = [json.dumps(records[category][i]).encode() for i in order]
        write_lines(below / "multi-ic" / f"{category}.jsonl", lines)
        expected += [rows_of[category][i] for i in order]
    return expected


def _picture(index: int, traps: Traps, size: int, rng: random.Random) -> tuple[str, bytes]:
    ending, kind = ("jpg", "JPEG")
    if traps.endings:
        ending, kind = (("jpg", "JPEG"), ("JPG", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG"))[
            index % 5
        ]
    return f"{index:05d}.{ending}", encode(size, rng, kind)


def _text(index: int, traps: Traps, rng: random.Random) -> str:
    return f"{index} " + (
        rng.choice(("ein grünes Boot", "一只红色的猫", "a 🦊 \u2028 in a hat")) if traps.non_ascii else "a cat"
    )


def encode(size: int, rng: random.Random, kind: str = "JPEG") -> bytes:
    """An encoded picture of noise, no two alike."""
    image = Image.frombytes("RGB", (size, size), rng.randbytes(3 * size * size))
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


def _write_pictures(archive: Path, files: Iterable[tuple[str, bytes]], traps: Traps, rng: random.Random) -> None:
    if rng.random() < traps.extracted:
        for member, data in files:
            path = archive.parent / member
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    else:
        write_archive(archive, files)


def write_archive(archive: Path, files: Iterable[tuple[str | tarfile.TarInfo, bytes]]) -> None:
    """A tar, compressed if its name says so; a member is a name or a `TarInfo`."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for member, data in files:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    archive.parent.mkdir(parents=True, exist_ok=True)
    packed = gzip.compress(content.getvalue(), mtime=0) if archive.name.endswith("gz") else content.getvalue()
    archive.write_bytes(packed)


def write_lines(path: Path, lines: Sequence[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
