"""The shapes world: scenes of flat shapes on a 4x4 grid, and their seeded renderer.

A normal object lies in one cell of 16x16 pixels, a large one in a block of 2x2 cells. Cells coincide with
the latent tokens of the miniature (16 pixels each), blocks with the quarters of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw

IMAGE_SIZE = 64
CELL = 16
GRID = IMAGE_SIZE // CELL
BACKGROUND = (184, 184, 184)
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 25, 30),
    "orange": (250, 130, 20),
    "yellow": (250, 225, 30),
    "green": (30, 150, 50),
    "blue": (30, 70, 230),
    "purple": (130, 30, 180),
    "pink": (255, 105, 185),
    "brown": (110, 65, 25),
    "black": (15, 15, 15),
    "white": (255, 255, 255),
}
COLORS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
PATTERNS = ("plain", "half", "stripes", "inlay")
SIDES = {"normal": (12, 14), "large": (26, 28)}  # pixels, smallest and largest
_SUPERSAMPLING = 8
_RING_HOLE = 0.45


@dataclass(frozen=True)
class SceneObject:
    """One object; `row` and `col` name its cell, or the upper left cell of its block when it is large.

    `pattern`: "half" and "stripes" use `second_color`; "inlay" draws a small `inlay_shape` in `second_color`.
    """

    shape: str
    color: str
    row: int
    col: int
    size: str = "normal"
    pattern: str = "plain"
    second_color: str | None = None
    inlay_shape: str | None = None

    def __post_init__(self) -> None:
        """Check every field against the world's vocabulary."""
        _check("shape", self.shape, SHAPES)
        _check("color", self.color, COLORS)
        _check("size", self.size, tuple(SIDES))
        _check("pattern", self.pattern, PATTERNS)
        last = GRID - len(self.cells_across)
        if not (0 <= self.row <= last and 0 <= self.col <= last):
            raise ValueError(f"row and col of a {self.size} object lie in 0..{last}, got {self.row} and {self.col}")
        if self.pattern != "plain":
            _check("second_color", self.second_color, COLORS)
        if self.pattern == "inlay":
            _check("inlay_shape", self.inlay_shape, SHAPES)

    @property
    def cells_across(self) -> range:
        """The offsets of the cells that the object spans, in both directions."""
        return range(2 if self.size == "large" else 1)

    @property
    def cells(self) -> set[tuple[int, int]]:
        """The (row, col) cells that the object takes."""
        return {(self.row + i, self.col + j) for i in self.cells_across for j in self.cells_across}


@dataclass(frozen=True)
class Scene:
    """Objects that share no cell."""

    objects: tuple[SceneObject, ...]

    def __post_init__(self) -> None:
        """Refuse overlapping objects."""
        cells = [cell for item in self.objects for cell in item.cells]
        if len(set(cells)) < len(cells):
            raise ValueError(f"objects overlap: {self.objects}")


def render(scene: Scene, rng: np.random.Generator | None = None) -> Image.Image:
    """Draw a scene as a 64x64 RGB picture; `rng` varies the objects' sizes, without it they are the middle ones."""
    picture = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUND)
    for item in scene.objects:
        low, high = (side * _SUPERSAMPLING for side in SIDES[item.size])
        side = (low + high) // 2 if rng is None else int(rng.integers(low, high + 1))
        picture.paste(_tile(replace(item, row=0, col=0), side), (item.col * CELL, item.row * CELL))
    return picture


@lru_cache(maxsize=4096)  # all plain objects at all sides, some megabytes
def _tile(item: SceneObject, side: int) -> Image.Image:
    """The cells of one object, wherever it is; `side` is in pixels before they are reduced."""
    span = CELL * _SUPERSAMPLING * len(item.cells_across)
    canvas = Image.new("RGB", (span, span), BACKGROUND)
    for color, mask in _layers(item, side):
        canvas.paste(PALETTE[color], (round((span - side) / 2),) * 2, mask)
    return canvas.reduce(_SUPERSAMPLING)


@lru_cache(maxsize=1024)
def shape_mask(shape: str, side: int) -> Image.Image:
    """The shape filling a square of `side` pixels, as a mode "L" mask of 0 and 255."""
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    draw.polygon([(x * (side - 1), y * (side - 1)) for x, y in _outline(shape)], fill=255)
    if shape == "ring":
        edge = side * (1 - _RING_HOLE) / 2
        draw.ellipse((edge, edge, side - 1 - edge, side - 1 - edge), fill=0)
    return mask


def _layers(item: SceneObject, side: int) -> list[tuple[str, Image.Image]]:
    """(color, mask) pairs to paint in order."""
    mask = shape_mask(item.shape, side)
    layers = [(item.color, mask)]
    if item.pattern == "plain" or item.second_color is None:
        return layers
    region = Image.new("L", mask.size, 0)
    draw = ImageDraw.Draw(region)
    if item.pattern == "half":
        draw.rectangle((side // 2, 0, side, side), fill=255)
    elif item.pattern == "stripes":
        for stripe in (1, 3):
            draw.rectangle((0, stripe * side // 5, side, (stripe + 1) * side // 5), fill=255)
    elif item.inlay_shape is not None:
        inlay = shape_mask(item.inlay_shape, round(side * 0.42))
        region.paste(inlay, ((side - inlay.width) // 2, round((side - inlay.height) * 0.55)))
    return [*layers, (item.second_color, ImageChops.multiply(mask, region))]


@lru_cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """The shape's corners, stretched to the unit square, y downwards."""
    turn = np.linspace(0, 2 * math.pi, 120, endpoint=False)
    if shape in ("circle", "ring"):
        points = np.stack([np.sin(turn), np.cos(turn)], axis=1)
    elif shape == "heart":
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        points = np.stack([16 * np.sin(turn) ** 3, -y], axis=1)
    elif shape == "star":
        angle = np.arange(10) * math.pi / 5
        radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.52)  # a regular star has 0.38, too thin for 12 pixels
        points = np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)
    elif shape == "cross":
        a, b = 0.3, 0.7
        points = np.array(
            [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
        )
    else:
        corners = {
            "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
            "triangle": [(0.5, 0), (1, 1), (0, 1)],
            "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
        }
        points = np.array(corners[shape])
    points = (points - points.min(0)) / (points.max(0) - points.min(0))
    return tuple((float(x), float(y)) for x, y in points)


def _check(name: str, value: str | None, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
