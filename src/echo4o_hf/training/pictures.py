"""Pictures of a row, still encoded: their sizes without decoding, and what they hold."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, BinaryIO

from datasets.utils.file_utils import xopen
from PIL import ExifTags, Image

from ..model.image_processing_bagel import to_rgb

# Of these the header tells how the picture lies; others are decoded for that.
_HEADER_TELLS_ORIENTATION = ("JPEG", "PNG", "WEBP")
_LYING = (5, 6, 7, 8)  # EXIF orientations with swapped sides


class SampleError(ValueError):
    """A row that cannot be used.

    Attributes:
        id: of the row.
        reason: what is wrong with it.
    """

    # DataLoader raises a worker's error again with its whole traceback as the only argument.
    def __init__(self, id: str, reason: str = "") -> None:
        """See the class."""
        super().__init__(id, reason)
        self.id, self.reason = id, reason

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}" if self.reason else self.id


class EncodedPicture:
    """A picture as `datasets.Image(decode=False)` gives it; what is read or decoded is kept.

    Args:
        sample_id: of the row, for errors.
        name: of the picture in its row, for errors.
        value: {"bytes": ..., "path": ...}, one of which may be None.

    Raises:
        SampleError: neither bytes nor a path; in all methods: the picture cannot be read or does not decode.
    """

    def __init__(self, sample_id: str, name: str, value: Any) -> None:
        """See the class."""
        self.sample_id, self.name = sample_id, name
        if not isinstance(value, dict) or (value.get("bytes") is None and value.get("path") is None):
            seen = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise SampleError(sample_id, f"{name} must be an undecoded image with bytes or a path, got {seen}")
        self._value = value

    @cached_property
    def data(self) -> bytes:
        """The file."""
        if self._value.get("bytes") is not None:
            return bytes(self._value["bytes"])
        with self._named("cannot be read"), xopen(self._value["path"], "rb") as file:
            return bytes(file.read())

    @cached_property
    def sha256(self) -> str:
        """Of the file."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def header_size(self) -> tuple[int, int]:
        """Height and width as stored, the orientation left aside; a file is read as far as its header."""
        file: BinaryIO
        with self._named("does not decode"):
            is_read = "data" in self.__dict__ or self._value.get("bytes") is not None
            with io.BytesIO(self.data) if is_read else xopen(self._value["path"], "rb") as file:
                with Image.open(file) as image:
                    return image.height, image.width

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width as viewers show it."""
        with self._named("does not decode"), Image.open(io.BytesIO(self.data)) as image:
            if image.format in _HEADER_TELLS_ORIENTATION:
                # PNG's own getexif decodes all of the picture, in case that EXIF comes after it.
                read = Image.Image.getexif if b"eXIf" not in self.data else type(image).getexif
                lies = read(image).get(ExifTags.Base.Orientation) in _LYING
                return (image.width, image.height) if lies else (image.height, image.width)
        return self.image.height, self.image.width

    @cached_property
    def image(self) -> Image.Image:
        """RGB, upright; transparent pixels are white."""
        with self._named("does not decode"), Image.open(io.BytesIO(self.data)) as image:
            return to_rgb(image)

    @contextmanager
    def _named(self, problem: str) -> Iterator[None]:
        try:
            yield
        except SampleError:
            raise
        except Exception as error:  # Pillow raises whatever damaged bytes lead it to
            raise SampleError(self.sample_id, f"{self.name} {problem} ({error})") from error
