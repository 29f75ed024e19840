"""The shapes world in the three subsets and the folder layout of Echo-4o-Image, so that readers can be tried on it.

Surreal fantasy: shapes in impossible combinations. Multi-reference: shapes of several pictures put together.
Instruction following: the clean captions. The folders' official spelling is kept, mistakes included.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echo4o_hf.miniature.captions import sample_item, scene_for
from echo4o_hf.miniature.items import Item
from echo4o_hf.miniature.world import COLORS, SHAPES, Scene, SceneObject, render

ROOT = "/Echo-4o-Image"
IMAGES_PER_ARCHIVE = 5000
_QUARTERS = ((0, 0), (0, 2), (2, 0), (2, 2))
_ORDINALS = ("first", "second", "third")


@dataclass(frozen=True)
class Sample:
    """One training example: `category` is the record's type, or the multi-reference category."""

    instruction: str
    category: str
    scene: Scene
    references: tuple[Scene, ...] = ()


def draw_surreal(rng: np.random.Generator) -> Sample:
    """A large object that cannot be: of two colors (T1), of a striped stuff (T2), with another shape inside (T4)."""
    shape, inner = (str(name) for name in rng.choice(SHAPES, 2, replace=False))
    color, second = (str(name) for name in rng.choice(COLORS, 2, replace=False))
    pattern, category, text = (
        ("half", "T1", f"a {shape} that is half {color} and half {second}"),
        ("stripes", "T2", f"{_a(color)} {shape} with {second} stripes"),
        ("inlay", "T4", f"{_a(color)} {shape} with {_a(second)} {inner} inside it"),
    )[int(rng.integers(3))]
    row, col = _QUARTERS[int(rng.integers(4))]
    return Sample(text, category, Scene((SceneObject(shape, color, row, col, "large", pattern, second, inner),)))


def draw_multi_reference(rng: np.random.Generator) -> Sample:
    """Two or three pictures of one large object each, and the picture that shows these objects together."""
    number = int(rng.integers(2, 4))
    shapes = [str(name) for name in rng.choice(SHAPES, number, replace=False)]
    colors = [str(name) for name in rng.choice(COLORS, number, replace=False)]
    quarters = [_QUARTERS[int(index)] for index in rng.permutation(4)]
    together = [SceneObject(s, c, *quarters[i], "large") for i, (s, c) in enumerate(zip(shapes, colors, strict=True))]
    references = []
    for item in together:
        row, col = _QUARTERS[int(rng.integers(4))]
        references.append(Scene((SceneObject(item.shape, item.color, row, col, "large"),)))
    by_order = [f"the {s} of the {which} picture" for s, which in zip(shapes, _ORDINALS, strict=False)]
    by_color = [f"the {color} {shape}" for color, shape in zip(colors, shapes, strict=True)]
    text = (
        f"put {_list(by_order)} together",
        f"put {_list(by_color)} together in one picture",
        f"a picture of {_list(by_order)}",
    )[int(rng.integers(3))]
    return Sample(text, "_".join(["obj"] * number), Scene(tuple(together)), tuple(references))


def draw_instruction(rng: np.random.Generator) -> Sample:
    """A caption of any tag, never a benchmark's, with its scene; the category counts the attributes asked for."""
    item = sample_item(rng)
    attributes = _number_of_attributes(item)
    category = "easy" if attributes <= 2 else "medium" if attributes <= 5 else "hard"
    return Sample(item.prompt, category, scene_for(item, rng))


def write_dataset(folder: str | Path, samples_per_subset: int, seed: int = 0) -> None:
    """Write the three subsets below `folder`; the same arguments give the same bytes.

    Raises:
        ValueError: `samples_per_subset` is not positive.
    """
    if samples_per_subset < 1:
        raise ValueError(f"samples_per_subset must be positive, got {samples_per_subset}")
    folder, rng = Path(folder), np.random.default_rng(seed)
    surreal = [draw_surreal(rng) for _ in range(samples_per_subset)]
    _write_text_to_image(folder / "Surrel-Fantasy-Image", "conflict.jsonl", surreal, "images/", rng)
    instruction = [draw_instruction(rng) for _ in range(samples_per_subset)]
    name = "Instruction-Following-Image"
    _write_text_to_image(folder / name, f"{name}.jsonl", instruction, "", rng)
    _write_multi_reference(folder / "Multi-Reference-Image", samples_per_subset, rng)


def _write_text_to_image(
    folder: Path, metadata: str, samples: Sequence[Sample], prefix: str, rng: np.random.Generator
) -> None:
    """One record per sample; images in archives of 5000, below `prefix` in them."""
    records = [
        {
            "task_type": "t2i",
            "instruction": sample.instruction,
            "output_image": f"{ROOT}/{folder.name}/images/{index:05d}.jpg",
            "type": sample.category,
        }
        for index, sample in enumerate(samples)
    ]
    for start in range(0, len(samples), IMAGES_PER_ARCHIVE):
        part = list(enumerate(samples))[start : start + IMAGES_PER_ARCHIVE]
        files = [(f"{prefix}{index:05d}.jpg", _jpeg(sample.scene, rng)) for index, sample in part]
        _write_archive(folder / "images" / f"{start}-{start + IMAGES_PER_ARCHIVE}.tar.gz", files)
    _write_jsonl(folder / metadata, records)


def _write_multi_reference(folder: Path, number: int, rng: np.random.Generator) -> None:
    """References in one archive of objects; outputs and records per category."""
    inputs: list[tuple[str, bytes]] = []
    outputs: dict[str, list[tuple[str, bytes]]] = {}
    records: dict[str, list[dict[str, Any]]] = {}
    below = f"{ROOT}/{folder.name}"
    for _ in range(number):
        sample = draw_multi_reference(rng)
        input_images = []
        for scene in sample.references:
            inputs.append((f"object/{len(inputs):05d}.jpg", _jpeg(scene, rng)))
            input_images.append(f"{below}/multi_refer_images_input/{inputs[-1][0]}")
        files = outputs.setdefault(sample.category, [])
        files.append((f"{sample.category}/{len(files):05d}.jpg", _jpeg(sample.scene, rng)))
        output_image = f"{below}/multi_refer_images_output/{files[-1][0]}"
        record = {"instruction": sample.instruction, "input_images": input_images, "output_image": output_image}
        records.setdefault(sample.category, []).append(record)
    _write_archive(folder / "multi_refer_images_input" / "object" / "object.tar.gz", inputs)
    for category, files in outputs.items():
        _write_archive(folder / "multi_refer_images_output" / category / f"{category}.tar.gz", files)
        _write_jsonl(folder / "multi-ic" / f"{category}.jsonl", records[category])


def _write_archive(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """A tar.gz without times and owners, so that equal content is equal bytes."""
    content = io.BytesIO()
    with (
        gzip.GzipFile(filename="", fileobj=content, mode="wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as archive,
    ):
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    _write(path, content.getvalue())


def _write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    _write(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def _jpeg(scene: Scene, rng: np.random.Generator) -> bytes:
    data = io.BytesIO()
    render(scene, rng).save(data, "JPEG", quality=95, subsampling=0)
    return data.getvalue()


def _number_of_attributes(item: Item) -> int:
    return sum(
        (clause.count > 1) + sum(value is not None for value in (clause.color, clause.region, clause.size))
        for clause in item.include
    )


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _list(parts: Sequence[str]) -> str:
    return " and ".join(parts) if len(parts) == 2 else ", ".join(parts[:-1]) + " and " + parts[-1]
