from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from echo4o_hf.miniature.items import TAGS, Item, is_held_out, load_items, read_items
from echo4o_hf.miniature.wording import caption_for

OFFICIAL = Path(__file__).parents[3] / "shared" / "upstream-data" / "Geneval++.jsonl"
ROW = {"tag": "counting", "prompt": "two stars", "include": [{"class": "star", "count": 2}]}


def test_there_are_twenty_different_items_per_tag():
    items = load_items()
    assert Counter(item.tag for item in items) == dict.fromkeys(TAGS, 20)
    assert len({item.spec for item in items}) == len({item.prompt for item in items}) == 140


def test_benchmark_items_are_held_out_in_any_words_and_order():
    rng = np.random.default_rng(0)
    for item in load_items():
        assert is_held_out(item) and is_held_out(item.prompt)
        turned = item.include[::-1]
        assert is_held_out(replace(item, prompt="other words", include=turned))
        assert is_held_out(caption_for(turned, rng))


def test_other_captions_are_not_held_out():
    assert not is_held_out("a photo of a dog")
    item = load_items()[0]
    taken = {clause.class_name for clause in item.include}
    other = next(shape for shape in ("cross", "ring", "heart", "star") if shape not in taken)
    changed = (replace(item.include[0], class_name=other), *item.include[1:])
    assert not is_held_out(caption_for(changed, np.random.default_rng(0)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": "colour"}, "tag must be one of .*'colour'"),
        ({"prompt": " "}, "prompt"),
        ({"include": []}, "include"),
        ({"include": [{"class": "star"}]}, "lacks count"),
        ({"include": [{"class": "star", "count": 0}]}, "positive whole number; got 0"),
        ({"include": [{"class": "star", "count": True}]}, "got True"),
        ({"include": [{"class": "star", "count": "2"}]}, "got '2'"),
        ({"include": [{"class": "", "count": 2}]}, "class"),
        ({"include": [{"class": "star", "count": 2, "region": "middle"}]}, "region must be .*'middle'"),
        ({"include": [{"class": "star", "count": 2, "size": "big"}]}, "size must be .*'big'"),
        ({"include": [{"class": "star", "count": 2, "colour": "red"}]}, "unknown colour"),
        ({"exclude": [{"class": "star", "count": 3, "color": "red"}]}, "unknown color"),
        ({"exclude": {}}, "exclude must be a list"),
        ({"note": "x"}, "unknown note"),
    ],
)
def test_wrong_rows_are_refused(change, message):
    Item.from_dict(ROW)
    with pytest.raises(ValueError, match=message):
        Item.from_dict(ROW | change)


def test_a_missing_key_is_named():
    with pytest.raises(ValueError, match="lacks include, prompt"):
        Item.from_dict({"tag": "counting"})


def test_a_wrong_line_is_named(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('\n{"tag": "counting"}\n')
    with pytest.raises(ValueError, match=r"items\.jsonl, line 2: item lacks"):
        read_items(path)
    path.write_text("{]\n")
    with pytest.raises(ValueError, match="line 1"):
        read_items(path)


@pytest.mark.skipif(not OFFICIAL.exists(), reason="needs ../shared/upstream-data/Geneval++.jsonl")
def test_the_official_items_parse():
    items = read_items(OFFICIAL)
    assert Counter(item.tag for item in items) == dict.fromkeys(TAGS, 40)
    assert {item.include[0].class_name for item in items if item.tag == "counting"} >= {"hot dog"}
    assert all(item.exclude for item in items if item.tag == "counting")
