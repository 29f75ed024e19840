from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from echo4o_hf.judges.judge import JudgeFailed
from echo4o_hf.judges.load import load_judge
from echo4o_hf.miniature.captions import scene_for
from echo4o_hf.miniature.items import load_items
from echo4o_hf.miniature.world import render

PROMPT = "Instruction:\n{}\n\nExpectation checklist:\nThis image should contain:\n- 1 thing present in the image."


def test_it_knows_the_pictures_of_the_items_from_those_of_others():
    rng = np.random.default_rng(0)
    judge, items = load_judge("shapes"), load_items()[::5]
    pictures = [render(scene_for(item, rng), rng) for item in items]
    assert judge.name == "shapes"
    for shown, expected in ((pictures, 1), (pictures[1:] + pictures[:1], 0)):
        replies = [judge("", PROMPT.format(item.prompt), [image]) for item, image in zip(items, shown, strict=True)]
        verdicts = [json.loads(reply) for reply in replies]
        assert all(verdict.keys() == {"correct", "reason"} and verdict["reason"] for verdict in verdicts)
        assert np.mean([verdict["correct"] == expected for verdict in verdicts]) >= 0.95


@pytest.mark.parametrize(
    ("prompt", "count", "reason"),
    [
        (PROMPT.format("two zebras"), 1, "two zebras"),
        ("Is this a red heart?", 1, "instruction"),
        (PROMPT.format("a red heart"), 2, "one picture"),
        (PROMPT.format("a red heart"), 0, "one picture"),
    ],
)
def test_what_it_cannot_judge_fails(prompt, count, reason):
    with pytest.raises(JudgeFailed, match=reason):
        load_judge("shapes")("", prompt, [Image.new("RGB", (64, 64))] * count)
