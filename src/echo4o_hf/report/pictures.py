"""Pictures of results as thumbnails inside the page.

A picture is shown only if its file still has the sha256 of the results: neither a picture that has changed since it
was judged nor a file that was never judged gets into the page.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LOSSLESS = 128  # pixels: pictures up to this size are embedded as they are


@dataclass(frozen=True)
class Thumbnail:
    """A data URL and its size in pixels, or why there is none."""

    url: str = ""
    width: int = 0
    height: int = 0
    problem: str = ""


def thumbnail(image: Mapping[str, Any], folder: Path, side: int) -> Thumbnail:
    """The picture of one entry of an item's `images`, which fits into a square of `side` pixels."""
    if image["sha256"] is None:
        return Thumbnail(problem="no picture")
    if image["path"] is None:
        return Thumbnail(problem="judged without a file")
    encoded = _read(Path(image["path"]), folder)
    if encoded is None:
        return Thumbnail(problem=f"no such file: {image['path']}")
    if hashlib.sha256(encoded).hexdigest() != image["sha256"]:
        return Thumbnail(problem=f"changed since it was judged: {image['path']}")
    try:
        return _encode(encoded, side)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return Thumbnail(problem=f"does not decode: {image['path']}: {error}")


def _read(path: Path, folder: Path) -> bytes | None:
    """The file at `path` from here, or else from `folder`."""
    for candidate in (path, folder / path):
        try:
            if candidate.is_file():
                return candidate.read_bytes()
        except (OSError, ValueError):  # no permission, or a null byte in the path
            continue
    return None


def _encode(encoded: bytes, side: int) -> Thumbnail:
    with Image.open(io.BytesIO(encoded)) as file:
        file.draft("RGB", (side, side))  # JPEG: decode fewer pixels
        image = _on_white(file)
    small = max(image.size) <= LOSSLESS
    image.thumbnail((side, side), reducing_gap=2.0)
    output = io.BytesIO()
    if small:
        image.save(output, "PNG")
    else:
        image.save(output, "JPEG", quality=80)
    data = base64.b64encode(output.getvalue()).decode("ascii")
    return Thumbnail(f"data:image/{'png' if small else 'jpeg'};base64,{data}", *image.size)


def _on_white(image: Image.Image) -> Image.Image:
    """As judges see it: in RGB, of 16 bits the upper 8."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")
