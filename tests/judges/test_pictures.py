from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from echo4o_hf.judges.judge import JudgeFailed
from echo4o_hf.judges.pictures import as_rgb, decode


def encoded(image, form="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def test_transparent_pictures_are_on_white():
    hidden = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    hidden.putpixel((1, 0), (255, 0, 0, 255))
    shown = [[[255, 255, 255], [255, 0, 0]]]
    assert pixels(decode([encoded(hidden)])[0]) == shown
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    palette.info["transparency"] = 0
    assert pixels(decode([encoded(palette)])[0]) == shown
    assert pixels(as_rgb(Image.new("LA", (1, 1), (0, 0)))) == [[[255, 255, 255]]]


def test_sixteen_bits_are_not_all_white():
    levels = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    assert [pixel[0] for pixel in pixels(decode([encoded(Image.fromarray(levels))])[0])[0]] == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_without_a_range_are_refused(mode):
    with pytest.raises(JudgeFailed, match=f"image 1 does not decode: a picture of mode {mode} has no black"):
        decode([encoded(Image.new(mode, (2, 2), 1), "TIFF")])


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_other_modes(mode):
    white = Image.new("RGB", (2, 2), "white").convert(mode)
    assert pixels(decode([encoded(white, "TIFF")])[0]) == [[[255] * 3] * 2] * 2
