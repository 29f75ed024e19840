"""Pictures as a judge sees them: in RGB, on white where they are transparent."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from echo4o_hf.judges.judge import JudgeFailed


def decode(encoded: Sequence[bytes]) -> list[Image.Image]:
    """The pictures in files of any format that Pillow reads.

    Raises:
        JudgeFailed: one does not decode; the message says which.
    """
    pictures = []
    for number, data in enumerate(encoded, start=1):
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                pictures.append(as_rgb(image))
        except UnidentifiedImageError:
            raise JudgeFailed(f"image {number} is no image file, or of an unknown format") from None
        except Exception as error:  # Pillow's decoders raise whatever a broken file makes them run into
            raise JudgeFailed(f"image {number} does not decode: {error}") from error
    return pictures


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture in RGB, of 16 bits the upper 8.

    Raises:
        ValueError: its numbers have no fixed range (modes I and F), so that black and white are not known.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode in ("I", "F"):
        raise ValueError(f"a picture of mode {image.mode} has no black and no white; convert it to RGB")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")
