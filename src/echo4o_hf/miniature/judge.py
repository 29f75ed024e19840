"""The rule-based judge of the shapes world: finds the objects of a picture and checks an item against them.

Pixels go to the nearest color between background and full strength, connected pixels of one color become an object,
and its shape is the template with the largest overlap. Made for pictures that went through a small decoder: edges may
be soft and specks are ignored, but a blob of no clear shape is an object that nothing asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy import ndimage

from echo4o_hf.miniature.items import Item
from echo4o_hf.miniature.wording import Clause
from echo4o_hf.miniature.world import BACKGROUND, CELL, COLORS, IMAGE_SIZE, PALETTE, SHAPES, SIDES, shape_mask

UNKNOWN_SHAPE = "blob"
MIN_AREA = 20.0  # pixels; the smallest star of the world covers about 50
MIN_OVERLAP = 0.70  # intersection over union with the best template, chosen on held-out scenes
MIN_SIZE_RATIO = 1.4  # of the longer sides, for "larger" and "smaller"
SOFTNESS = (0.4, 0.8)  # pixels of blur on the templates, for a decoder rounds corners off; chosen on held-out scenes
_TEMPLATE_SIDE = 32

Mask = NDArray[np.float32]


@dataclass(frozen=True)
class Found:
    """One object of a picture; pixels, x to the right and y downwards; `bbox` is left, top, right, bottom."""

    shape: str
    color: str
    centre: tuple[float, float]
    area: float
    bbox: tuple[int, int, int, int]
    overlap: float

    @property
    def side(self) -> int:
        """The longer side of the bounding box."""
        return max(self.bbox[2] - self.bbox[0], self.bbox[3] - self.bbox[1])


@dataclass(frozen=True)
class Verdict:
    """Whether the picture shows what the item asks for and nothing else, why (not), and what was found."""

    correct: bool
    reason: str
    found: tuple[Found, ...]


def find_objects(image: Image.Image) -> list[Found]:
    """The objects of a picture, left to right; pictures of another size are resized to 64x64 first."""
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    labels, strength = _segment(np.asarray(image.convert("RGB"), dtype=np.float32))
    found = []
    for index, color in enumerate(COLORS):
        regions, number = ndimage.label(labels == index)
        for region in np.flatnonzero(np.bincount(regions.ravel()) >= MIN_AREA):
            own = regions == region
            if region and ndimage.binary_erosion(own, np.ones((2, 2))).any():
                found.append(_describe(own, strength, color))
    return sorted(found, key=lambda item: item.centre)


def verdict(item: Item, image: Image.Image) -> Verdict:
    """Check every clause (count, shape, color, region, size) and that nothing else is in the picture.

    Raises:
        ValueError: a class or a color of the item is not of this world.
    """
    for clause in item.include:
        if clause.class_name not in SHAPES or (clause.color or COLORS[0]) not in COLORS:
            raise ValueError(f"the judge of the shapes world knows no {clause.color or ''} {clause.class_name}")
    found = tuple(find_objects(image))
    claimed: set[Found] = set()
    sides: dict[str | None, list[int]] = {"larger": [], "smaller": []}
    for clause in item.include:
        group = [one for one in found if _matches(clause, one)]
        if len(group) != clause.count:
            return Verdict(False, f"expected {_say(clause)}, found {len(group)} ({_summary(found)})", found)
        claimed.update(group)
        sides.setdefault(clause.size, []).extend(one.side for one in group)
    if extra := [one for one in found if one not in claimed]:
        return Verdict(False, f"not asked for: {_summary(extra)}", found)
    larger, smaller = sides["larger"], sides["smaller"]
    if larger and smaller and min(larger) < MIN_SIZE_RATIO * max(smaller):
        return Verdict(False, f"the larger is {min(larger)} pixels wide, the smaller {max(smaller)}", found)
    return Verdict(True, "every clause holds", found)


def _segment(pixels: NDArray[np.float32]) -> tuple[NDArray[np.int64], Mask]:
    """Each pixel's color index (-1: background), and how far it is from background to full color, 0..1.

    An edge pixel mixes its object's color with the background, so a color is the line between the two.
    """
    background = np.array(BACKGROUND, np.float32)
    lines = np.array(list(PALETTE.values()), np.float32) - background  # (colors, 3)
    offset = pixels - background
    along = (offset @ lines.T / (lines**2).sum(1)).clip(0, 1)  # (height, width, colors)
    distance = ((offset[:, :, None] - along[..., None] * lines) ** 2).sum(-1)
    labels = distance.argmin(-1)
    strength = np.take_along_axis(along, labels[..., None], -1)[..., 0]
    return np.where(strength > 0.5, labels, -1), strength


def _describe(own: NDArray[np.bool_], strength: Mask, color: str) -> Found:
    """Measure one connected region of the picture."""
    weight = np.where(ndimage.binary_dilation(own), strength, np.float32(0))
    rows, cols = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
    outline, templates = _normalised(weight), _templates(large=max(np.ptp(rows), np.ptp(cols)) > CELL)
    shared, joined = np.minimum(outline, templates).sum((2, 3)), np.maximum(outline, templates).sum((2, 3))
    overlaps = (shared / joined).max(0)
    best = int(overlaps.argmax())
    y, x = ndimage.center_of_mass(weight)
    return Found(
        shape=SHAPES[best] if overlaps[best] >= MIN_OVERLAP else UNKNOWN_SHAPE,
        color=color,
        centre=(float(x) + 0.5, float(y) + 0.5),
        area=float(weight.sum()),
        bbox=(int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1),
        overlap=float(overlaps[best]),
    )


@lru_cache
def _templates(large: bool) -> Mask:
    """(softness, shapes, 32, 32): every shape as it looks when it is drawn at that size, softened and measured."""
    side = sum(SIDES["large" if large else "normal"]) // 2
    drawn = [ImageOps.expand(shape_mask(shape, side * 8).reduce(8), 4) for shape in SHAPES]
    masks = [np.asarray(mask, dtype=np.float32) / np.float32(255) for mask in drawn]
    return np.stack([[_normalised(ndimage.gaussian_filter(mask, soft)) for mask in masks] for soft in SOFTNESS])


def _normalised(weight: Mask) -> Mask:
    """The region where `weight` is above a half, with edges finer than pixels, stretched to a template's square."""
    fine = Image.fromarray(weight).resize((weight.shape[1] * 4, weight.shape[0] * 4), Image.Resampling.BILINEAR)
    region = Image.fromarray((np.asarray(fine) > 0.5).astype(np.uint8) * 255)
    square = region.resize((_TEMPLATE_SIDE,) * 2, Image.Resampling.BILINEAR, box=region.getbbox())
    return np.asarray(square, dtype=np.float32) / np.float32(255)


def _matches(clause: Clause, found: Found) -> bool:
    middle = IMAGE_SIZE / 2
    x, y = found.centre
    inside = {"left": x < middle, "right": x > middle, "above": y < middle, "below": y > middle}
    return (
        found.shape == clause.class_name
        and clause.color in (None, found.color)
        and (clause.region is None or inside[clause.region])
    )


def _say(clause: Clause) -> str:
    parts = (str(clause.count), clause.size, clause.color, clause.class_name, clause.region)
    return " ".join(part for part in parts if part)


def _summary(found: Sequence[Found]) -> str:
    return ", ".join(f"{item.color} {item.shape}" for item in found) or "nothing"
