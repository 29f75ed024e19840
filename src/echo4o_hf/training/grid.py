"""Pictures side by side, each above its prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

COLUMNS = 4
SIDES = (256, 512)  # pixels of a cell, smallest and largest; smaller pictures are enlarged, larger ones shrunk
FONT_SIZE = 15
MARGIN = 8
LINES = 6  # of a prompt, at most
BACKGROUND, INK = "white", "black"


def picture_grid(images: Sequence[Image.Image], prompts: Sequence[str], columns: int = COLUMNS) -> Image.Image:
    """Draw a grid of pictures with their prompts.

    Args:
        images: of any sizes.
        prompts: one for each.
        columns: pictures in a row, at most.

    Raises:
        ValueError: there is no picture, or their numbers differ.
    """
    if not images or len(images) != len(prompts):
        raise ValueError(f"a grid needs pictures and as many prompts, got {len(images)} and {len(prompts)}")
    font = ImageFont.load_default(FONT_SIZE)
    side = min(max(SIDES[0], *(length for image in images for length in image.size)), SIDES[1])
    texts = [wrap(prompt, font, side) for prompt in prompts]
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    line_height = round(FONT_SIZE * 1.4)
    heights = [
        side + MARGIN + line_height * max(map(len, texts[row * columns : (row + 1) * columns])) for row in range(rows)
    ]
    size = (columns * (side + MARGIN) + MARGIN, sum(heights) + (rows + 1) * MARGIN)
    grid = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for place, (image, lines) in enumerate(zip(images, texts, strict=True)):
        row, column = divmod(place, columns)
        x, y = MARGIN + column * (side + MARGIN), MARGIN + sum(heights[:row]) + row * MARGIN
        cell = fit(image, side)
        grid.paste(cell, (x + (side - cell.width) // 2, y + (side - cell.height) // 2))
        for number, line in enumerate(lines):
            draw.text((x, y + side + MARGIN // 2 + number * line_height), line, INK, font)
    return grid


def fit(image: Image.Image, side: int) -> Image.Image:
    """The picture with `side` as its longer side."""
    scale = side / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The lines of a text at most `width` pixels wide; what is too long ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        while font.getlength(word) > width:  # no line of its own is wide enough
            cut = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:cut])
            word = word[cut:]
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    lines = [line for line in lines if line] or [""]
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"{lines[LINES - 1][:-1]}…"]
    return lines
