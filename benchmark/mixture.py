"""Rows like those of Echo-4o-Image, without its pictures: the published counts, sizes and numbers of references.

Of 178 228 rows, 105 499 draw from a text and 72 729 from 2 to 4 references: 3 for human-object-scene (13 566), 2 for
any two things (54 259), the others (4 904) taken for 4. Pictures have 1024x1024, 1024x1536 or 1536x1024 pixels; how
many of each is not published, so half are square and the others shared out. Texts have 15 to 80 words.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
from PIL import Image
from random_model import WORD

from echo4o_hf.training.rows import FEATURES

REFERENCES = {0: 105_499, 2: 54_259, 3: 13_566, 4: 4_904}
SIZES = {(1024, 1024): 2, (1024, 1536): 1, (1536, 1024): 1}  # (height, width): weight
WORDS = (15, 80)


def mixed_rows(count: int, draw: Callable[[int, int, int], bytes]) -> datasets.Dataset:
    """Rows as `load_rows` gives them, each picture its own.

    Args:
        count: of rows.
        draw: (number, height, width) -> an image file.
    """
    random = np.random.default_rng(0)
    number = 0

    def picture() -> dict[str, Any]:
        nonlocal number
        number += 1
        return {"bytes": draw(number, *_choose(random, SIZES)), "path": None}

    def rows() -> Any:
        for index in range(count):
            yield {
                "id": str(index),
                "instruction": " ".join([WORD] * int(random.integers(*WORDS))),
                "input_images": [picture() for _ in range(_choose(random, REFERENCES))],
                "output_image": picture(),
                "answer": None,
            }

    return datasets.Dataset.from_list(list(rows()), features=FEATURES)


def black(number: int, height: int, width: int) -> bytes:
    """For where only sizes matter; the same file for each number."""
    return _black(height, width)


@functools.cache
def _black(height: int, width: int) -> bytes:
    return _file(Image.new("RGB", (width, height)), "PNG")


def blurred(number: int, height: int, width: int) -> bytes:
    """A JPEG file about as large as a photograph's: large shapes and a camera's noise."""
    random = np.random.default_rng(number)
    shapes = Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    smooth = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC))
    pixels = smooth + random.normal(0, 4, (height, width, 1))
    return _file(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), "JPEG")


def _choose(random: np.random.Generator, weights: dict[Any, int]) -> Any:
    shares = np.array(list(weights.values())) / sum(weights.values())
    return list(weights)[random.choice(len(shares), p=shares)]


def _file(image: Image.Image, format: str) -> bytes:
    file = io.BytesIO()
    image.save(file, format, quality=92)
    return file.getvalue()
