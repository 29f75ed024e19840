"""Sizes of pictures in training: the official resize rules, buckets of aspect ratios, what fits a budget of tokens."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from ..model.configuration_bagel import BagelConfig
from ..model.packing import Grid
from ..model.processing_bagel import BagelProcessor

# The official training: 1024/512 for latents, 518/224 for references' vision, 980/378 for questions.
LATENT_MIN, VISION_MIN, QUESTION_MIN = 512 / 1024, 224 / 518, 378 / 980  # of the largest side
REFERENCE_VISION = 518
QUESTION_MAX_PIXELS = 2_007_040

SMALLEST_REFERENCE = Fraction(1, 4)  # references shrink to this part of their sides before the target shrinks too


class Sizes(NamedTuple):
    """Resize rules, each with the arguments of `resized_size`.

    Attributes:
        target: pictures to be drawn.
        reference: references through the VAE.
        vision: references through the vision tower.
        question: pictures that a question is about, through the vision tower.
    """

    target: dict[str, int]
    reference: dict[str, int]
    vision: dict[str, int]
    question: dict[str, int]


def training_sizes(
    processor: BagelProcessor,
    config: BagelConfig,
    image_size: int | None = None,
    reference_size: int | None = None,
    vision_size: int | None = None,
) -> Sizes:
    """The rules of the official training, smaller where the model or the arguments say so.

    Args:
        processor: of the model; its rules limit the sizes and the pixels.
        config: of the model; its tables of positions limit the sizes.
        image_size: largest side of targets in pixels; by default the largest that the model draws.
        reference_size: of references through the VAE; by default that of targets.
        vision_size: of all pictures through the vision tower; by default 518, and for questions the largest.

    Raises:
        ValueError: a size that is no multiple of the stride, or larger than the model takes.
    """
    latent, vision = processor.image_processor.latent_size, processor.image_processor.vision_size
    latent_largest = min(latent["max"], config.max_latent_size * config.latent_stride)
    vision_largest = min(vision["max"], config.vit_max_num_patch_per_side * processor.image_processor.patch_size)

    def rule(name: str, wanted: int | None, default: int, like: dict[str, int], least: float) -> dict[str, int]:
        stride, largest = like["stride"], latent_largest if like is latent else vision_largest
        size = default // stride * stride if wanted is None else wanted
        if size % stride or not stride <= size <= largest:
            raise ValueError(f"{name}={size} must be a multiple of {stride} from {stride} to {largest} (pixels)")
        smallest = max(stride, round(size * least / stride) * stride)
        return {"max": size, "min": smallest, "stride": stride, "max_pixels": like["max_pixels"]}

    target = rule("image_size", image_size, latent_largest, latent, LATENT_MIN)
    question = rule("vision_size", vision_size, vision_largest, vision, QUESTION_MIN)
    return Sizes(
        target,
        rule("reference_size", reference_size, target["max"], latent, LATENT_MIN),
        rule("vision_size", vision_size, min(REFERENCE_VISION, vision_largest), vision, VISION_MIN),
        {**question, "max_pixels": QUESTION_MAX_PIXELS},
    )


def bucket_grids(side: int, limit: int) -> list[Grid]:
    """Grids of about side * side tokens with aspect ratios from 1:2 to 2:1.

    Where the model's table of positions is too short for the area, the grid is as long as the table.

    Args:
        side: of the square one.
        limit: rows and columns of the table.
    """
    tall = [(min(limit, round(side * side / columns)), columns) for columns in range(1, side + 1)]
    tall = [(rows, columns) for rows, columns in tall if columns <= rows <= 2 * columns]
    return sorted({*tall, *((columns, rows) for rows, columns in tall)})


def nearest_bucket(buckets: Sequence[Grid], height: int, width: int) -> Grid:
    """The bucket of the nearest aspect ratio (of its logarithm), the largest if there are several."""
    wanted = math.log(height / width)
    return min(buckets, key=lambda grid: (round(abs(math.log(grid[0] / grid[1]) - wanted), 9), -grid[0] * grid[1]))


def count_tokens(grids: Sequence[Grid]) -> int:
    """Tokens of all grids together."""
    return sum(rows * columns for rows, columns in grids)


def fit_grids(references: Sequence[Grid], targets: Sequence[Grid], budget: int) -> list[Grid] | None:
    """Shrink grids to at most `budget` tokens: the references, and only if that does not do, the targets too.

    The sides of all references are multiplied by one factor, the largest that fits, and rounded to whole tokens, at
    least one. If it would be under a quarter, it is a quarter, and the sides of all grids are multiplied by another.

    Returns:
        References, then targets; None if even one token for each is too much.
    """
    factor = _largest_factor(references, budget - count_tokens(targets))
    if factor is not None and factor >= SMALLEST_REFERENCE:
        return [*_shrink(references, factor), *targets]
    grids = [*_shrink(references, SMALLEST_REFERENCE), *targets]
    factor = _largest_factor(grids, budget)
    return None if factor is None else _shrink(grids, factor)


def _largest_factor(grids: Sequence[Grid], budget: int) -> Fraction | None:
    sides = {side for grid in grids for side in grid}
    # The counts change only where a side reaches a half: exact fractions, as floats would miss an edge.
    steps = {Fraction(2 * whole - 1, 2 * side) for side in sides for whole in range(1, side + 1)}
    factors = sorted({*steps, Fraction(1)})
    fitting = bisect_right(factors, budget, key=lambda factor: count_tokens(_shrink(grids, factor)))
    return factors[fitting - 1] if fitting else None


def _shrink(grids: Sequence[Grid], factor: Fraction) -> list[Grid]:
    def scaled(side: int) -> int:
        return max(1, math.floor(side * factor + Fraction(1, 2)))

    return [(scaled(rows), scaled(columns)) for rows, columns in grids]
