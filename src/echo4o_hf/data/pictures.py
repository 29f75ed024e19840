"""Encoded pictures: the column type that names them in its errors, and the check that one decodes."""

from __future__ import annotations

import io
from typing import Any

import datasets
import PIL.Image

_FORMATS = ("JPEG", "PNG", "WEBP")


class NamedImage(datasets.Image):
    """`datasets.Image` for bytes that are always at hand, and whose errors name the picture."""

    def encode_example(self, value: Any) -> dict[str, Any]:
        """Keep the bytes; the original would drop them where the working directory has a file called `path`."""
        if isinstance(value, dict) and value.get("bytes") is not None:
            return {"bytes": value["bytes"], "path": value.get("path")}
        return super().encode_example(value)

    def decode_example(self, value: Any, token_per_repo_id: dict[str, Any] | None = None) -> PIL.Image.Image:
        """Decode a picture.

        Raises:
            ValueError: it does not decode.
        """
        try:
            return super().decode_example(value, token_per_repo_id)
        except Exception as error:  # Pillow raises whatever the damaged bytes lead it to
            name = value.get("path") if isinstance(value, dict) else value
            raise ValueError(f"{name}: does not decode ({error})") from error

    def __eq__(self, other: object) -> bool:
        """A column of these is a column of images."""
        return isinstance(other, datasets.Image) and (self.mode, self.decode) == (other.mode, other.decode)

    __hash__ = None  # type: ignore[assignment]


def picture_problem(data: bytes, max_pixels: int, decode: bool = True) -> str:
    """What is wrong with an encoded picture: nothing, more than `max_pixels`, or that it does not decode.

    JPEG, by far the most, is decoded at an eighth of its size, which reads all of its data and costs a fraction.
    Without `decode` only the header is read.
    """
    try:
        with PIL.Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                return f"{width} x {height} pixels are more than max_pixels={max_pixels}"
            if decode:
                image.draft(image.mode, (width // 8, height // 8))
                image.load()
    except PIL.Image.DecompressionBombError as error:
        return f"more than max_pixels={max_pixels} ({error})"
    except Exception as error:  # Pillow raises whatever the damaged bytes lead it to
        return f"does not decode ({error})"
    return ""
