from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from echo4o_hf.miniature.captions import draw_item, scene_for
from echo4o_hf.miniature.items import TAGS, Item
from echo4o_hf.miniature.judge import UNKNOWN_SHAPE, find_objects, verdict
from echo4o_hf.miniature.wording import Clause
from echo4o_hf.miniature.world import COLORS, SHAPES, Scene, SceneObject, render


@pytest.mark.parametrize("tag", TAGS)
def test_truths_pass_and_shuffled_truths_do_not(tag):
    rng = np.random.default_rng(6)
    items = [draw_item(tag, rng) for _ in range(60)]
    pictures = [render(scene_for(item, rng), rng) for item in items]
    passed = [verdict(item, picture).correct for item, picture in zip(items, pictures, strict=True)]
    others = pictures[1:] + pictures[:1]
    shuffled = [verdict(item, picture).correct for item, picture in zip(items, others, strict=True)]
    assert np.mean(passed) >= 0.98
    assert np.mean(shuffled) <= 0.05


@pytest.mark.parametrize("blur", [0.0, 0.7])
def test_every_shape_and_color_is_recognised(blur):
    for start, color in enumerate(COLORS):
        objects = [SceneObject(shape, color, *divmod(index, 4)) for index, shape in enumerate(SHAPES)]
        objects.append(SceneObject(SHAPES[start % len(SHAPES)], color, 2, 2, "large"))
        picture = render(Scene(tuple(objects))).filter(ImageFilter.GaussianBlur(blur))
        found = find_objects(picture)
        assert sorted((o.shape, o.color) for o in found) == sorted((o.shape, o.color) for o in objects)


def test_measures_are_pixels():
    (found,) = find_objects(render(Scene((SceneObject("square", "blue", 1, 2),))))
    assert found.centre == pytest.approx((40, 24), abs=0.3)
    assert found.area == pytest.approx(13**2, rel=0.05)
    assert found.bbox == pytest.approx((33, 17, 47, 31), abs=1)


ITEM = Item(
    "size_spatial_attr",
    "",
    (Clause("star", 1, "red", "left", "larger"), Clause("ring", 1, "blue", "right", "smaller")),
)
STAR, RING = SceneObject("star", "red", 0, 0, "large"), SceneObject("ring", "blue", 1, 3)


@pytest.mark.parametrize(
    ("objects", "reason"),
    [
        ((STAR, RING), "every clause holds"),
        ((STAR,), "expected 1 smaller blue ring right, found 0"),
        ((STAR, RING, SceneObject("ring", "blue", 2, 3)), "found 2"),
        ((STAR, RING, SceneObject("heart", "pink", 2, 3)), "not asked for: pink heart"),
        ((STAR, SceneObject("ring", "green", 1, 3)), "found 0"),
        ((STAR, SceneObject("circle", "blue", 1, 3)), "found 0"),
        ((STAR, SceneObject("ring", "blue", 3, 1)), "found 0"),
        ((SceneObject("star", "red", 0, 0), RING), "the larger is"),
    ],
)
def test_each_kind_of_error_is_named(objects, reason):
    result = verdict(ITEM, render(Scene(objects)))
    assert reason in result.reason
    assert result.correct == (reason == "every clause holds")


def test_specks_are_ignored_and_blobs_are_not():
    picture = render(Scene((SceneObject("ring", "blue", 1, 3),)))
    item = Item("counting", "", (Clause("ring", 1, "blue"),))
    picture.paste((220, 25, 30), (4, 4, 7, 7))
    assert verdict(item, picture).correct
    picture.paste((220, 25, 30), (4, 4, 24, 7))
    picture.paste((220, 25, 30), (4, 4, 7, 24))
    result = verdict(item, picture)
    assert not result.correct and f"red {UNKNOWN_SHAPE}" in result.reason


def test_larger_pictures_are_judged_too():
    picture = render(Scene((STAR, RING))).resize((256, 256), Image.Resampling.NEAREST)
    assert verdict(ITEM, picture).correct


def test_words_that_are_not_of_this_world_are_refused():
    with pytest.raises(ValueError, match="zebra"):
        verdict(Item("counting", "two zebras", (Clause("zebra", 2),)), Image.new("RGB", (64, 64)))
