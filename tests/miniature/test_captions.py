from __future__ import annotations

import json

import numpy as np
import pytest

from echo4o_hf.miniature.captions import CAPTION_NOISE, corrupt, draw_benchmark, draw_item, sample_item, scene_for
from echo4o_hf.miniature.items import TAGS, Item, is_held_out, load_items
from echo4o_hf.miniature.wording import Clause, parse_caption


@pytest.mark.parametrize("tag", TAGS)
def test_items_follow_the_schema_and_their_tag(tag):
    rng = np.random.default_rng(1)
    for _ in range(50):
        item = draw_item(tag, rng)
        assert Item.from_dict(json.loads(json.dumps(item.to_dict()))) == item
        assert all(clause.color for clause in item.include)
        assert all(1 <= clause.count <= 4 for clause in item.include)
        assert all((clause.region is not None) == ("spatial" in tag) for clause in item.include)
        assert all((clause.size is not None) == ("size" in tag) for clause in item.include)
        assert bool(item.exclude) == (tag == "counting")


@pytest.mark.parametrize("tag", TAGS)
def test_scenes_show_exactly_what_is_asked_for(tag):
    rng = np.random.default_rng(2)
    inside = {
        "left": lambda o: o.col + len(o.cells_across) <= 2,
        "right": lambda o: o.col >= 2,
        "above": lambda o: o.row + len(o.cells_across) <= 2,
        "below": lambda o: o.row >= 2,
    }
    for _ in range(50):
        item = draw_item(tag, rng)
        objects = scene_for(item, rng).objects
        assert len(objects) == sum(clause.count for clause in item.include)
        for clause in item.include:
            group = [o for o in objects if (o.shape, o.color) == (clause.class_name, clause.color)]
            assert len(group) == clause.count
            assert all(o.size == ("large" if clause.size == "larger" else "normal") for o in group)
            assert clause.region is None or all(inside[clause.region](o) for o in group)


def test_scenes_of_what_this_world_cannot_show_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="zebra"):
        scene_for(Item("counting", "two zebras", (Clause("zebra", 2),)), rng)
    with pytest.raises(ValueError, match="does not fit"):
        scene_for(Item("counting", "stars", (Clause("star", 9, "red", "left"),)), rng)
    with pytest.raises(ValueError, match="colour"):
        draw_item("colour", rng)


def test_training_never_asks_for_a_benchmark_item(monkeypatch):
    rng = np.random.default_rng(3)
    for tag in TAGS:
        for _ in range(200):
            item = sample_item(rng, tag)
            assert not is_held_out(item)
            assert not is_held_out(corrupt(item, rng))


def test_a_held_out_draw_is_drawn_again(monkeypatch):
    held_out, other = load_items()[0], sample_item(np.random.default_rng(0))
    draws = iter([held_out, held_out, other])
    monkeypatch.setattr("echo4o_hf.miniature.captions.draw_item", lambda tag, rng: next(draws))
    assert sample_item(np.random.default_rng(0)) is other


def test_noise_changes_each_attribute_with_its_probability():
    rng = np.random.default_rng(4)
    item = Item("counting", "", (Clause("ring", 3, "green"),))
    captions = [corrupt(item, rng).lower() for _ in range(1500)]
    for name, words in {"class_name": ("ring", "rings"), "count": ("three",), "color": ("green",)}.items():
        kept = np.mean([bool(set(words) & set(caption.split())) for caption in captions])
        assert abs(kept - (1 - CAPTION_NOISE[name])) < 0.05, words
    clean = corrupt(item, rng, dict.fromkeys(CAPTION_NOISE, 0.0))
    assert parse_caption(clean) == item.include


def test_the_sentence_of_the_readme_is_in_the_distribution():
    rng = np.random.default_rng(5)
    kinds = {tuple((c.count, c.region) for c in draw_item("spatial_count_attr", rng).include) for _ in range(300)}
    assert ((2, "left"), (1, "right")) in kinds


def test_the_shipped_benchmark_is_the_seeded_draw():
    assert tuple(draw_benchmark()) == load_items()
