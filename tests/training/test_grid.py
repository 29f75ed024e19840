"""The grid of validation's pictures."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from echo4o_hf.training.grid import FONT_SIZE, LINES, picture_grid, wrap

FONT = ImageFont.load_default(FONT_SIZE)


def plain(color: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, color)


def test_pictures_are_in_order_four_in_a_row_each_above_its_prompt():
    colors = [(40 * number, 0, 0) for number in range(1, 6)]
    grid = np.asarray(picture_grid([plain(color) for color in colors], ["a red square"] * 5))
    first_row = [tuple(grid[100, 8 + 264 * column + 128]) for column in range(4)]
    assert first_row == colors[:4]
    second = np.argwhere((grid == colors[4]).all(-1))
    assert second.min(0)[0] > 256 and np.ptp(second, axis=0).tolist() == [255, 255]
    text = grid[264 : second.min(0)[0], :264]
    assert (text < 128).any() and (text == 255).mean() > 0.5  # ink below the picture


def test_large_pictures_are_shrunk_and_keep_their_shape():
    grid = np.asarray(picture_grid([plain((9, 9, 9), (1024, 512))], ["x"]))
    found = np.argwhere((grid == 9).all(-1))
    assert (np.ptp(found, axis=0) + 1).tolist() == [256, 512]


def test_prompts_are_wrapped_and_nothing_but_the_end_of_long_ones_is_lost():
    prompt = "two red circles on the left and a blue star on the right, in watercolour"
    lines = wrap(prompt, FONT, 256)
    assert " ".join(lines) == prompt
    assert all(FONT.getlength(line) <= 256 for line in lines)
    word = "x" * 100
    assert "".join(wrap(word, FONT, 256)) == word
    lines = wrap("word " * 200, FONT, 256)
    assert len(lines) == LINES and lines[-1].endswith("…")


def test_a_prompt_for_each_picture():
    with pytest.raises(ValueError, match="1 and 2"):
        picture_grid([plain((0, 0, 0))], ["a", "b"])
