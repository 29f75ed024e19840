from __future__ import annotations

import numpy as np
import pytest

from echo4o_hf.miniature.captions import draw_item
from echo4o_hf.miniature.items import TAGS
from echo4o_hf.miniature.wording import Clause, caption_for, parse_caption


def test_parse_reads_what_the_readme_asks_for():
    expected = (Clause("circle", 2, "red", "left"), Clause("star", 1, "blue", "right"))
    assert parse_caption("two red circles on the left and a blue star on the right") == expected
    assert parse_caption("A photo of two red circles on the left and one blue star on the right.") == expected


@pytest.mark.parametrize("tag", TAGS)
def test_every_caption_parses_back_to_its_clauses(tag):
    rng = np.random.default_rng(0)
    for _ in range(100):
        item = draw_item(tag, rng)
        assert parse_caption(item.prompt) == item.include, item.prompt


def test_numbers_articles_and_plurals():
    captions = {caption_for([Clause("cross", 1, "orange")], np.random.default_rng(seed)).lower() for seed in range(60)}
    assert {"an orange cross", "one orange cross", "an image of an orange cross"} <= captions
    assert any(
        "three orange crosses" in caption_for([Clause("cross", 3, "orange")], np.random.default_rng(0)).lower()
        for _ in range(1)
    )


@pytest.mark.parametrize("text", ["a dog", "five red circles", "two circles of red", "", "a red circle near a star"])
def test_other_sentences_do_not_parse(text):
    assert parse_caption(text) is None


def test_fields_can_be_left_unsaid():
    clause = Clause("circle", 2, "red", "left")
    said = caption_for([clause], np.random.default_rng(0), [frozenset({"class_name", "color", "region", "count"})])
    assert said.lower().endswith("shapes")
    assert not {"two", "red", "circles", "left"} & set(said.lower().split())
