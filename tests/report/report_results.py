"""Results as `echo4o evaluate` writes them, of pictures that are there."""

import hashlib
import html.parser
from pathlib import Path
from typing import Any

TAGS = ("counting", "color_attr")
QUESTION = ("geneval_pp", "official", "f00d")
PUBLISHED = {
    QUESTION: [
        {"model": "GPT-4o", "geneval_pp": 0.739, "per_tag": {"counting": 0.675, "color_attr": 0.9}, "source": "arXiv"},
        {"model": "Echo-4o", "geneval_pp": 0.2, "per_tag": {"counting": 0.575, "color_attr": None}, "source": "arXiv"},
    ]
}


class Page(html.parser.HTMLParser):
    """Text, elements and attributes of a page, as a browser sees them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def cards(self) -> list[dict[str, str | None]]:
        return [attributes for attributes in self.all("article") if attributes["class"] == "card"]


def verdict(score: float | None, reason: str = "", unscored: str | None = None) -> dict[str, Any]:
    return {"score": score, "reason": reason, "parts": {}, "unscored": unscored}


def entry(path: Path | None, given: dict[str, Any], judge: str = "openai:gpt-4.1") -> dict[str, Any]:
    judgement = {"judge": judge, "repeat": 0, "reply": f"reply: {given['reason']}", **given}
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if path else None
    return {
        "path": str(path) if path else None,
        "sha256": sha256,
        "verdict": given,
        "judgements": [judgement] if path else [],
    }


def results_of(images: list[dict[str, Any]], score: float, **changes: Any) -> dict[str, Any]:
    """Results of three items: two of `counting`, one of `color_attr`."""
    groups = (TAGS[0], TAGS[0], TAGS[1])
    prompts = ("three red cats", "two dogs", "a blue star")
    return {
        "schema_version": 1,
        "benchmark": QUESTION[0],
        "protocol": QUESTION[1],
        "created": "2026-11-21T20:00:00+00:00",
        "seed": 0,
        "software": {"echo4o-hf": "0.1.0"},
        "items_sha256": QUESTION[2],
        "texts_sha256": None,
        "repeats": 1,
        "deviations": [],
        "judges": [
            {
                "name": "openai:gpt-4.1",
                "parameters": {"temperature": 0.0},
                "calls": 3,
                "from_store": 0,
                "failures": 0,
                "input_tokens": 1234,
                "output_tokens": 56,
                "prices": [2.0, 8.0],
                "cost": 0.002916,
                "total_cost": 12.5,
            }
        ],
        "scores": {
            "geneval_pp": score,
            "accuracy": score,
            "per_tag": {"counting": 0.5, "color_attr": None},
            "num_items": 3,
            "num_unscored": 1,
            "num_images": 3,
            "num_unscored_images": 1,
            "confidence_interval": [0.25, 0.75],
            "per_tag_confidence_interval": {"counting": [0.1, 0.9], "color_attr": None},
        },
        "per_judge": {},
        "agreement": None,
        "self_agreement": None,
        "items": [
            {
                "id": place,
                "group": group,
                "prompt": prompt,
                "item": {"tag": group, "prompt": prompt},
                "checklist": f"This image should contain:\n- {prompt}",
                "images": [image],
            }
            for place, (group, prompt, image) in enumerate(zip(groups, prompts, images, strict=True))
        ],
        **changes,
    }
