"""A judge is a function: `python examples/own_judge.py` prints the scores that one of ours gives.

It is told the item and shown a picture, and replies as GenEval++'s protocol says. This one looks at colors alone; a
judge worth trusting asks a model, such as `judge="openai:gpt-4.1"`.
"""

import json

import evaluate
from PIL import Image

import echo4o_hf  # noqa: F401  makes "geneval_pp" a name that evaluate.load knows
from echo4o_hf.miniature.world import PALETTE, Scene, SceneObject, render

ITEMS = [
    {"tag": "color_attr", "prompt": "a red circle", "include": [{"class": "circle", "count": 1, "color": "red"}]},
    {"tag": "color_attr", "prompt": "a blue star", "include": [{"class": "star", "count": 1, "color": "blue"}]},
]


def right_color(system: str, prompt: str, images: list[Image.Image]) -> str:
    """Whether every color that the prompt names is in the picture."""
    seen = {color for _, color in images[0].convert("RGB").getcolors(images[0].width * images[0].height)}
    missing = [name for name, color in PALETTE.items() if f" {name} " in prompt and color not in seen]
    return json.dumps({"correct": int(not missing), "reason": f"missing: {', '.join(missing) or 'nothing'}"})


pictures = [render(Scene((SceneObject(shape, "red", row=1, col=1),))) for shape in ("circle", "star")]
scores = evaluate.load("geneval_pp").compute(predictions=pictures, references=ITEMS, judge=right_color)
print(scores["accuracy"], scores["per_tag"])
