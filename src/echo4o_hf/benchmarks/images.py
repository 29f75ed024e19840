"""Pictures to judge: found in a folder by their names, or encoded from what a caller holds.

A folder holds one of two layouts, read with any of the endings in `SUFFIXES`, upper case or lower:
    1.png  00001.jpg  17_0.webp  17_1.webp       number of the item, and of the sample where there are several
    00000/samples/00000.png                      GenEval's: number of the item, number of the sample
"""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})  # PNG keeps these as they are

Numbering = Literal["0", "1", "id"]

_NUMBER = re.compile(r"[0-9]+")
_NAME = re.compile(r"([0-9]+)(?:_([0-9]+))?")

logger = logging.getLogger(__name__)


def find_images(
    folder: str | os.PathLike[str], items: Sequence[Mapping[str, Any]], numbering: Numbering | None = None
) -> list[list[Path]]:
    """The pictures of each item, samples in the order of their numbers; an empty list where there is none.

    Args:
        folder: in one of the layouts above.
        items: in the order in which they were drawn.
        numbering: what the number in a name is: "0" or "1", the item's place counted from there, or "id", the item's
            own id. Decided from the numbers that are there, unless more than one reading explains them.

    Raises:
        OSError: `folder` is no folder.
        ValueError: no picture is named as above, both layouts are there, two pictures are the same sample, a number
            belongs to no item, or the numbering is open.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder; give the folder that holds the pictures")
    found = _samples(folder)
    numbers = {number for number, _ in found}
    places = _places(numbers, items, numbering, folder)
    images: list[list[Path]] = [[] for _ in items]
    for (number, _), path in sorted(found.items()):
        images[places[number]].append(path)
    return images


def to_bytes(image: object) -> bytes:
    """An image file's bytes, of a picture in any of the forms that metrics take.

    Args:
        image: a path, the bytes of an image file, a PIL image, an array (height, width) or (height, width, 1, 3 or 4)
            of uint8 or of floats from 0 to 1, or the dict {"bytes", "path"} of `datasets.Image(decode=False)`.
            Paths and bytes are taken as they are, pixels are written as PNG, which loses nothing.

    Raises:
        OSError: a path cannot be read.
        ValueError: `image` is none of these.
    """
    if isinstance(image, (str, os.PathLike)):
        return Path(image).read_bytes()
    if isinstance(image, (bytes, bytearray)):
        return bytes(image)
    if isinstance(image, Mapping):
        if image.get("bytes") is not None:
            return bytes(image["bytes"])
        if image.get("path") is not None:
            return Path(image["path"]).read_bytes()
        raise ValueError(f"an image dict must hold bytes or a path; got the keys {sorted(map(str, image))}")
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    if not isinstance(image, Image.Image):
        raise ValueError(
            "a picture must be a path, bytes, a PIL image, an array or a dict of datasets.Image; "
            f"got {type(image).__name__}"
        )
    if image.mode in ("I", "F"):
        raise ValueError(f"a picture of mode {image.mode} has no black and no white; convert it to RGB")
    if image.mode not in PNG_MODES:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _samples(folder: Path) -> dict[tuple[int, int], Path]:
    """Every picture of a folder by (number, sample)."""
    flat, nested, ignored = [], [], []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and _NUMBER.fullmatch(path.name) and (path / "samples").is_dir():
            pictures = [picture for picture in sorted((path / "samples").iterdir()) if _is_picture(picture)]
            named = [picture for picture in pictures if _NUMBER.fullmatch(picture.stem)]
            nested += [(int(path.name), int(picture.stem), picture) for picture in named]
            ignored += [picture for picture in pictures if picture not in named]
        elif _is_picture(path):
            match = _NAME.fullmatch(path.stem)
            if match:
                flat.append((int(match[1]), int(match[2] or 0), path))
            else:
                ignored.append(path)
    if flat and nested:
        raise ValueError(f"{folder} holds two layouts, such as {flat[0][2].name} and {nested[0][2]}; keep one of them")
    if not flat and not nested:
        raise ValueError(
            f"no picture in {folder} is named after its item: expected 1.png, 00001.jpg, 1_0.webp or "
            f"00000/samples/00000.png; found {ignored[0].name if ignored else 'no picture'}"
        )
    if ignored:
        logger.warning("%s: ignored %d pictures not named after an item, such as %s", folder, len(ignored), ignored[0])
    found: dict[tuple[int, int], Path] = {}
    for number, sample, path in flat or nested:
        if (number, sample) in found:
            raise ValueError(f"{found[number, sample]} and {path} are the same sample of item {number}; keep one")
        found[number, sample] = path
    return found


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _places(
    numbers: set[int], items: Sequence[Mapping[str, Any]], numbering: Numbering | None, folder: Path
) -> dict[int, int]:
    """From the number in a name to the item's place in `items`."""
    readings: dict[str, dict[int, int]] = {
        "0": {place: place for place in range(len(items))},
        "1": {place + 1: place for place in range(len(items))},
    }
    if all(isinstance(item.get("id"), int) for item in items):
        readings["id"] = {item["id"]: place for place, item in enumerate(items)}
    if numbering is not None:
        if numbering not in readings:
            raise ValueError(f"numbering={numbering!r}: must be one of {', '.join(readings)} for these items")
        readings = {numbering: readings[numbering]}
    fitting = {name: places for name, places in readings.items() if numbers <= places.keys()}
    if not fitting:
        beyond = min((numbers - places.keys() for places in readings.values()), key=len)
        raise ValueError(
            f"{folder}: there is no item {min(beyond)}; the {len(items)} items are not those of these pictures"
        )
    kept = [{number: places[number] for number in numbers} for places in fitting.values()]
    if any(reading != kept[0] for reading in kept):
        raise ValueError(
            f"{folder} holds numbers {min(numbers)} to {max(numbers)} for {len(items)} items, which can be read in "
            f"more than one way; say which with numbering (--numbering), one of {', '.join(fitting)}"
        )
    return kept[0]


def _from_array(array: NDArray[Any]) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or not array.size:
        raise ValueError(f"an array must be (height, width) or (height, width, 1, 3 or 4); got {array.shape}")
    if np.issubdtype(array.dtype, np.floating):
        if not (array >= 0).all() or not (array <= 1).all():
            raise ValueError(f"floats must be from 0 to 1; got {array.min()} to {array.max()}")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"an array must be uint8, or floats from 0 to 1; got {array.dtype}")
    return Image.fromarray(array.reshape(array.shape[:2]) if channels == 1 else array)
