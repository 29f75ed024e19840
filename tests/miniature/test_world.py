from __future__ import annotations

import numpy as np
import pytest

from echo4o_hf.miniature.world import (
    BACKGROUND,
    COLORS,
    PALETTE,
    SHAPES,
    SIDES,
    Scene,
    SceneObject,
    render,
    shape_mask,
)


def foreground(scene: Scene, seed: int | None = None) -> np.ndarray:
    rng = None if seed is None else np.random.default_rng(seed)
    return (np.asarray(render(scene, rng)) != np.array(BACKGROUND)).any(-1)


def test_render_is_seeded():
    scene = Scene((SceneObject("star", "red", 0, 0), SceneObject("ring", "blue", 2, 2, "large")))
    first, again, other = (render(scene, np.random.default_rng(seed)).tobytes() for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("size", "span"), [("normal", 16), ("large", 32)])
def test_objects_fill_their_cells_and_stay_inside(shape, size, span):
    drawn = foreground(Scene((SceneObject(shape, "black", 2, 2, size),)), seed=3)
    rows, cols = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    assert 32 <= rows[0] and rows[-1] < 32 + span and 32 <= cols[0] and cols[-1] < 32 + span
    low, high = SIDES[size]
    assert low - 2 <= np.ptp(rows) + 1 <= high + 2 and low - 2 <= np.ptp(cols) + 1 <= high + 2


@pytest.mark.parametrize("color", COLORS)
def test_colors_are_drawn_as_they_are_in_the_palette(color):
    assert render(Scene((SceneObject("square", color, 1, 1),))).getpixel((24, 24)) == PALETTE[color]


def test_shapes_differ_from_each_other():
    masks = [np.asarray(shape_mask(shape, 96)) > 127 for shape in SHAPES]
    overlaps = [(a & b).sum() / (a | b).sum() for i, a in enumerate(masks) for b in masks[:i]]
    assert max(overlaps) < 0.85


def test_patterns_show_the_second_color():
    for pattern in ("half", "stripes", "inlay"):
        picture = np.asarray(render(Scene((SceneObject("square", "red", 0, 0, "large", pattern, "blue", "circle"),))))
        for color in ("red", "blue"):
            assert (picture == np.array(PALETTE[color])).all(-1).sum() > 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hexagon", "red", 0, 0), "hexagon"),
        (("star", "beige", 0, 0), "beige"),
        (("star", "red", 0, 4), "0..3"),
        (("star", "red", 3, 0, "large"), "0..2"),
        (("star", "red", 0, 0, "large", "half"), "second_color"),
    ],
)
def test_objects_outside_the_world_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SceneObject(*arguments)


def test_overlapping_objects_are_refused():
    with pytest.raises(ValueError, match="overlap"):
        Scene((SceneObject("star", "red", 0, 0, "large"), SceneObject("ring", "blue", 1, 1)))
