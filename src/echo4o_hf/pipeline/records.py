"""What a picture's PNG text says of it, and writing pictures in one piece."""

from __future__ import annotations

import io
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from PIL import Image
from PIL.PngImagePlugin import PngInfo

COMPARED = ("prompt", "model", "pipeline", "seed", "parameters", "dtype")  # with another one, it is another picture
COMPARED_IF_ANY = ("cache_interval", "quantization")  # likewise, and not all pictures have them
JSON_TEXTS = (  # of the PNG texts, those not plain
    "number",
    "sample",
    "seed",
    "parameters",
    "lora",
    "lora_sha256",
    "compiled",
    "offload",
    "cache_interval",
    "nsfw_content_detected",
)
WHAT_TO_DO = "name another folder, or remove the pictures"

_NAME = re.compile(r"([0-9]+)_([0-9]+)\.png")


def is_drawn(path: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether a picture is there, whole and drawn as the record says.

    References and adapters are the same wherever they lie, if their hashes are. The weights of a model are compared
    where both records know them, beside its name.

    Raises:
        ValueError: it was drawn with other settings or weights.
    """
    there = read_record(path)
    if there is None:
        return False
    if not there:
        raise ValueError(f"{path} was not drawn by this command: name another folder, or remove the picture")
    _check_same(path, there, wanted)
    return True


def check_others(folder: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to add pictures to others of the same prompts, as with other seeds, that were drawn differently.

    Args:
        folder: of pictures.
        records: of those to draw, by the names of their files.

    Raises:
        ValueError: one was drawn with other settings or weights.
    """
    by_number = {record["number"]: record for record in records.values()}
    for path in sorted(folder.iterdir()):
        match = _NAME.fullmatch(path.name)
        wanted = by_number.get(int(match[1])) if match else None
        if wanted and path.name not in records and (there := read_record(path)):
            _check_same(path, there, {**wanted, "seed": there["seed"]})


def _check_same(path: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    before, now = there["parameters"], wanted["parameters"]
    pairs = [
        (name, there.get(name), wanted.get(name)) for name in (*COMPARED, *COMPARED_IF_ANY) if name != "parameters"
    ]
    pairs += [(name, before.get(name), now.get(name)) for name in {**now, **before}]
    for name, old, new in pairs:
        if _without_places(old) != _without_places(new):
            raise _difference(path, name, old, new)
    _check_adapters(path, there, wanted)
    old, new = there.get("model_fingerprint"), wanted.get("model_fingerprint")
    if old and new and old != new:
        raise ValueError(f"{path} was drawn with other weights than {wanted['model']} has now: {WHAT_TO_DO}")


def _without_places(value: Any) -> Any:
    """References as their hashes; other values as they are."""
    if isinstance(value, list) and all(isinstance(one, dict) and "sha256" in one for one in value):
        return [one["sha256"] for one in value]
    return value


def _check_adapters(path: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    before, now = there.get("lora", []), wanted.get("lora", [])
    if [scale for _, scale in before] != [scale for _, scale in now]:
        raise _difference(path, "lora", before or None, now or None)
    if not now or there.get("lora_sha256") == wanted["lora_sha256"]:
        return
    names = ", ".join(str(name) for name, _ in now)
    if "lora_sha256" not in there:
        raise ValueError(f"{path} does not say which weights of {names} it was drawn with: {WHAT_TO_DO}")
    raise ValueError(f"{path} was drawn with other weights than {names} has now: {WHAT_TO_DO}")


def _difference(path: Path, name: str, old: Any, new: Any) -> ValueError:
    return ValueError(f"{path} was drawn with {name}={json.dumps(old)}, now it is {json.dumps(new)}: {WHAT_TO_DO}")


def read_record(path: Path) -> dict[str, Any] | None:
    """What a picture's PNG text says of it, {} if nothing; None where no file is, or only part of one."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.verify()
            texts = {str(name): text for name, text in image.info.items()}
    except (OSError, SyntaxError):  # what Pillow raises for files that are damaged or cut off
        return None
    if not texts.keys() >= {*COMPARED, "number", "sample"}:
        return {}
    return {name: json.loads(text) if name in JSON_TEXTS else text for name, text in texts.items()}


def write_metadata(folder: Path) -> None:
    """Write metadata.jsonl anew from all pictures in a folder.

    A process does so after its last picture, one at a time, so that the last one to do it sees all of them.
    """
    with FileLock(folder / ".metadata.lock"):
        names = [match for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        lines = []
        for match in sorted(names, key=lambda match: (int(match[1]), int(match[2]))):
            record = read_record(folder / match[0])
            if record:
                lines.append(json.dumps({"file_name": match[0], **record}, ensure_ascii=False) + "\n")
        with replaced(folder / "metadata.jsonl") as partial:
            partial.write_text("".join(lines), encoding="utf-8")


def save_png(image: Image.Image, path: Path, settings: Mapping[str, object]) -> None:
    """Write `path` in one piece, with each setting as a text chunk of the PNG."""
    chunks = PngInfo()
    for name, value in settings.items():
        chunks.add_text(name, str(value))
    with replaced(path) as partial:
        image.save(partial, format="PNG", pnginfo=chunks)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A name to write to, that becomes `path` once all is written."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")  # other processes have other names
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
