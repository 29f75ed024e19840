"""Rows checked for export, and the formats that are files beside each other: webdataset, imagefolder, jsonl.

Pictures are written as the bytes they came in; their extension is that of the format those bytes are in.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}

_PLAIN_ID = re.compile(r"[a-z0-9][a-z0-9_]*(/[a-z0-9_]+)*")
_LONGEST_KEY = 64


@dataclass(frozen=True)
class Picture:
    """A picture that decodes, as it was encoded."""

    data: bytes
    extension: str


@dataclass(frozen=True)
class Sample:
    """A row whose pictures were checked; `key` names it in files and archives."""

    id: str
    key: str
    subset: str
    task_type: str
    category: str
    instruction: str
    image: Picture
    references: tuple[Picture, ...]

    def labels(self) -> dict[str, str]:
        """What is said about the sample besides its instruction."""
        return {"id": self.id, "subset": self.subset, "task_type": self.task_type, "category": self.category}

    def pictures(self) -> dict[str, Picture]:
        """By what follows the key and a dot: the image as `EXTENSION`, the references as `input_0.EXTENSION` etc."""
        named = {self.image.extension: self.image}
        named.update({f"input_{i}.{picture.extension}": picture for i, picture in enumerate(self.references)})
        return named


def sample_key(sample_id: str) -> str:
    """The key of an id: `[A-Za-z0-9_-]+`, the same in every export, and no two ids share one.

    `surreal_fantasy/00000` becomes `surreal_fantasy-00000`. Where that would be ambiguous (other characters, capitals
    on disks that ignore case, long ids) two hyphens and a hash of the id follow; the short form never has two.
    """
    if _PLAIN_ID.fullmatch(sample_id) and len(sample_id) <= _LONGEST_KEY:
        return sample_id.replace("/", "-")
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", sample_id)[: _LONGEST_KEY - 18].strip("-_")
    return f"{readable or 'row'}--{hashlib.sha256(sample_id.encode()).hexdigest()[:16]}"


def check_row(row: Mapping[str, Any]) -> Sample:
    """A row of the dataset with `decode=False`, every picture decoded once to see that it can be.

    Raises:
        ValueError: a picture is missing, does not decode to its end, or is no JPEG, PNG or WebP.
    """
    number = len(row["input_images"])
    references = (_check(data, f"reference {i + 1} of {number}") for i, data in enumerate(row["input_images"]))
    return Sample(
        id=row["id"],
        key=sample_key(row["id"]),
        subset=row["subset"],
        task_type=row["task_type"],
        category=row["category"],
        instruction=row["instruction"],
        image=_check(row["output_image"], "output image"),
        references=tuple(references),
    )


def _check(encoded: Mapping[str, Any] | None, name: str) -> Picture:
    if encoded is None:
        raise ValueError(f"{name}: missing")
    try:
        data = encoded["bytes"] if encoded["bytes"] is not None else Path(encoded["path"]).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            format_name = image.format
    except Exception as error:  # Pillow's decoders raise nearly anything on broken data; the reason is passed on
        raise ValueError(f"{name}: {type(error).__name__}: {error}") from error
    if format_name not in EXTENSIONS:
        raise ValueError(f"{name}: {format_name} is none of {', '.join(EXTENSIONS)}")
    return Picture(data, EXTENSIONS[format_name])


def write_webdataset(samples: Iterable[Sample], folder: Path, shard_bytes: int) -> None:
    """Tar shards: `KEY.jpg`, `KEY.txt` (the instruction), `KEY.json`, and the references `KEY.input_0.jpg` etc.

    A shard holds one subset, one number of references and one choice of extensions, and is named after them
    (`multi_reference-2-jpg-00000.tar`), because `datasets` wants the same members in all samples it loads together.
    The `webdataset` package reads any mixture of shards.
    """
    try:
        from webdataset import ShardWriter
    except ImportError as error:
        raise ImportError("the webdataset format needs webdataset: pip install 'echo4o-hf[data]'") from error
    writers: dict[str, Any] = {}
    with ExitStack() as stack:
        for sample in samples:
            extensions = [sample.image.extension, *(picture.extension for picture in sample.references)]
            shape = extensions[0] if len(set(extensions)) == 1 else "_".join(extensions)
            name = f"{sample_key(sample.subset)}-{len(sample.references)}-{shape}"
            if name not in writers:
                pattern = str(folder).replace("%", "%%") + f"/{name}-%05d.tar"  # the folder's own % is no pattern
                same = {"mtime": 0, "user": "", "group": ""}  # equal samples are equal bytes
                shards = ShardWriter(pattern, maxsize=shard_bytes, encoder=False, verbose=0, **same)
                writers[name] = stack.enter_context(shards)
            members = {member: picture.data for member, picture in sample.pictures().items()}
            members["txt"] = sample.instruction.encode()
            members["json"] = json.dumps(sample.labels(), ensure_ascii=False).encode()
            writers[name].write({"__key__": sample.key, **members})


def write_imagefolder(samples: Iterable[Sample], folder: Path) -> None:
    """`train/images/…` and `train/metadata.jsonl`; `load_dataset("imagefolder", …)` finds `image` and `input_images`.

    The folder is called `train` so that no word in a file name (`test`, `eval`) is taken for a split. Without any
    references there is no `input_images`.
    """
    split = folder / "train"
    split.mkdir()

    def records() -> Iterator[tuple[dict[str, str], list[str]]]:
        for sample in samples:
            image, *references = _write_pictures(sample, split)
            yield {"file_name": image, "instruction": sample.instruction, **sample.labels()}, references

    _write_lines(split / "metadata.jsonl", records(), "input_images_file_names", always=False)


def write_jsonl(samples: Iterable[Sample], folder: Path, final: Path) -> None:
    """`data.jsonl` with the row's columns, `output_image` and `input_images` as absolute paths below `images/`."""

    def records() -> Iterator[tuple[dict[str, str], list[str]]]:
        for sample in samples:
            image, *references = (str(final / path) for path in _write_pictures(sample, folder))
            yield {**sample.labels(), "instruction": sample.instruction, "output_image": image}, references

    _write_lines(folder / "data.jsonl", records(), "input_images", always=True)


def _write_pictures(sample: Sample, folder: Path) -> list[str]:
    """Paths relative to `folder`: the image, then its references."""
    below = Path("images", sample_key(sample.subset))
    (folder / below).mkdir(parents=True, exist_ok=True)
    paths = []
    for name, picture in sample.pictures().items():
        path = below / f"{sample.key}.{name}"
        (folder / path).write_bytes(picture.data)
        paths.append(path.as_posix())
    return paths


def _write_lines(
    path: Path, records: Iterable[tuple[Mapping[str, str], Sequence[str]]], column: str, always: bool
) -> None:
    """One JSON line per record, its references under `column`; `always`: also where no record has any.

    Records with references come first: readers that infer types look at the first lines only. Lines are ASCII:
    there are readers that take U+2028 and its like for the end of a line.
    """
    rest_path = path.with_name(path.name + ".rest")
    with path.open("w", encoding="ascii") as lines, rest_path.open("w+", encoding="ascii") as rest:
        for record, references in records:
            if references:
                lines.write(json.dumps({**record, column: references}) + "\n")
            else:
                rest.write(json.dumps(record) + "\n")
        none: dict[str, list[str]] = {column: []} if always or lines.tell() else {}
        rest.seek(0)
        for line in rest:
            lines.write(json.dumps({**json.loads(line), **none}) + "\n")
    rest_path.unlink()
