"""What judges said, as results: one JSON object that describes itself.

    {"schema_version": 1, "benchmark": "geneval_pp", "protocol": "official", "created": "2026-…", "seed": 0,
     "software": {"echo4o-hf": "0.1.0", …}, "items_sha256": "…", "texts_sha256": "…", "repeats": 1,
     "deviations": ["judged by …"],
     "judges": [{"name", "parameters", "calls", "from_store", "failures", "input_tokens", "output_tokens",
                 "prices": [2.0, 8.0] | null, "cost", "total_cost"}],
     "scores": {…}, "per_judge": {name: {…}}, "agreement": {…} | null, "self_agreement": {name: {…}} | null,
     "items": [{"id", "group", "prompt", "item", "checklist",
                "images": [{"path", "sha256", "verdict": {"score", "reason", "parts", "unscored"},
                            "judgements": [{"judge", "repeat", "reply", "score", "reason", "parts", "unscored"}]}]}]}

`texts_sha256` is of the system texts and prompts that the judges got. `calls`, tokens and `cost` are this run's;
`total_cost` is that of all replies in these results, those that came from the store included. They are null where the
judge does not say, or no prices are given, which are of a million input and a million output tokens. `deviations` says
what sets the scores apart from published ones, and is empty where nothing does. An item without a picture has one
image, unscored.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias

from echo4o_hf.benchmarks import geneval_pp
from echo4o_hf.benchmarks.items import ITEMS_SHA256, items_sha256
from echo4o_hf.benchmarks.results import SCHEMA_VERSION
from echo4o_hf.benchmarks.statistics import agreement, majority
from echo4o_hf.benchmarks.verdict import Protocol, Verdict
from echo4o_hf.judges.ask import Outcome, Request

SOFTWARE = ("echo4o-hf", "huggingface_hub", "pillow")

# Longer replies than the authors' limits allow are no deviation: what a limit cuts off is unscored.
_PUBLISHED_PARAMETERS = {"base_url": "https://api.openai.com/v1", "temperature": 0.0}

Item: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """One picture of the item at `place`, or why there is none."""

    place: int
    source: bytes | Path | None = None
    path: str | None = None
    sha256: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Question:
    """What every judge is asked about the pictures."""

    benchmark: ModuleType
    protocol: Protocol
    items: Sequence[Item]
    pictures: Sequence[Picture]
    texts: Sequence[tuple[str, str]]  # of each item: system text, prompt
    wording: Literal["pinned", "other", "none"]  # of the texts: none where the official one is not to be had
    repeats: int

    def requests(self) -> dict[tuple[int, int], Request]:
        """By the place of the picture and the repeat; pictures that are missing are not asked about."""
        return {
            (place, repeat): Request(*self.texts[picture.place], [picture.source], repeat)
            for place, picture in enumerate(self.pictures)
            if picture.source is not None
            for repeat in range(self.repeats)
        }

    def majority(self, verdicts: Sequence[Verdict]) -> Verdict:
        """One verdict out of several on one picture."""
        return majority(verdicts, self.benchmark.LEVELS)

    def agreement(self, verdicts: Mapping[str, Sequence[Verdict]]) -> dict[str, Any]:
        """How far verdicts on all pictures agree, by who gave them."""
        groups = [self.benchmark.group(self.items[picture.place]) for picture in self.pictures]
        return agreement(verdicts, groups, self.benchmark.LEVELS)

    def summarize(self, verdicts: Sequence[Verdict], seed: int) -> dict[str, Any]:
        """The scores of one verdict for each picture."""
        of_item: list[list[Verdict]] = [[] for _ in self.items]
        for picture, verdict in zip(self.pictures, verdicts, strict=True):
            of_item[picture.place].append(verdict)
        scores: dict[str, Any] = self.benchmark.summarize(
            list(zip(self.items, of_item, strict=True)), self.protocol, seed
        )
        return scores


@dataclass(frozen=True)
class Answers:
    """What one judge said; outcomes by the place of the picture and the repeat."""

    name: str
    parameters: dict[str, Any]
    prices: tuple[float, float] | None  # of a million input, and a million output tokens
    outcomes: Mapping[tuple[int, int], Outcome]
    verdicts: Sequence[Sequence[Verdict]]  # of each picture one for each repeat

    def usage(self) -> dict[str, Any]:
        """What the results say of the judge."""
        made = [outcome for outcome in self.outcomes.values() if not outcome.from_store]
        ours = _tokens(made)
        return {
            "name": self.name,
            "parameters": self.parameters,
            "calls": len(made),
            "from_store": len(self.outcomes) - len(made),
            "failures": sum(outcome.failure is not None for outcome in self.outcomes.values()),
            **ours,
            "prices": self.prices and [*self.prices],
            "cost": self._cost(ours),
            # Requests that are the same have one reply, and one price.
            "total_cost": self._cost(_tokens({one.key: one for one in [*self.outcomes.values(), *made]}.values())),
        }

    def _cost(self, tokens: Mapping[str, int | None]) -> float | None:
        parts = [tokens["input_tokens"], tokens["output_tokens"]]
        if self.prices is None or None in parts:
            return None
        return sum(price * (part or 0) for price, part in zip(self.prices, parts, strict=True)) / 1e6


def _tokens(outcomes: Iterable[Outcome]) -> dict[str, int | None]:
    """Tokens of all outcomes; None where a reply comes without their number."""
    found: dict[str, int | None] = {}
    for name in ("input_tokens", "output_tokens"):
        known = [(outcome.reply is None, getattr(outcome, name)) for outcome in outcomes]
        unknown = any(value is None and not failed for failed, value in known)
        found[name] = None if unknown else sum(value or 0 for _, value in known)
    return found


def as_dict(verdict: Verdict) -> dict[str, Any]:
    """A verdict, as JSON holds it."""
    return {
        "score": verdict.score,
        "reason": verdict.reason,
        "parts": dict(verdict.parts),
        "unscored": verdict.unscored,
    }


def results_of(question: Question, answers: Sequence[Answers], seed: int) -> dict[str, Any]:
    """One verdict of each judge on each picture out of the repeats, and one of all judges out of those."""
    missing = [Verdict(None, unscored=picture.problem) if picture.problem else None for picture in question.pictures]
    of_judge = {
        one.name: [none or question.majority(verdicts) for none, verdicts in zip(missing, one.verdicts, strict=True)]
        for one in answers
    }
    final = [
        none or question.majority(verdicts)
        for none, verdicts in zip(missing, zip(*of_judge.values(), strict=True), strict=True)
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "benchmark": question.benchmark.NAME,
        "protocol": question.protocol,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "software": {name: version(name) for name in SOFTWARE},
        "items_sha256": items_sha256(question.items),
        "texts_sha256": hashlib.sha256(json.dumps(question.texts).encode("ascii")).hexdigest(),
        "repeats": question.repeats,
        "deviations": _deviations(question, answers),
        "judges": [one.usage() for one in answers],
        "scores": question.summarize(final, seed),
        "per_judge": {name: question.summarize(verdicts, seed) for name, verdicts in of_judge.items()},
        "agreement": question.agreement(of_judge) if len(of_judge) > 1 else None,
        "self_agreement": (
            {one.name: _self_agreement(question, one) for one in answers} if question.repeats > 1 else None
        ),
        "items": _items(question, answers, final),
    }


def _self_agreement(question: Question, answers: Answers) -> dict[str, Any]:
    """How far the repeats of one judge agree with each other."""
    missing = [Verdict(None, unscored="no image")] * question.repeats
    rows = [verdicts or missing for verdicts in answers.verdicts]
    return question.agreement({f"repeat {k + 1}": [row[k] for row in rows] for k in range(question.repeats)})


def _items(question: Question, answers: Sequence[Answers], final: Sequence[Verdict]) -> list[dict[str, Any]]:
    """The results' `items`."""
    geneval = question.benchmark is geneval_pp
    items: list[dict[str, Any]] = [
        {
            "id": item.get("id", place),
            "group": question.benchmark.group(item),
            "prompt": item["prompt" if geneval else "instruction"],
            "item": dict(item),
            "checklist": geneval_pp.checklist(item) if geneval else None,
            "images": [],
        }
        for place, item in enumerate(question.items)
    ]
    for place, (picture, verdict) in enumerate(zip(question.pictures, final, strict=True)):
        judgements = [
            {"judge": one.name, "repeat": repeat, "reply": one.outcomes[place, repeat].reply, **as_dict(given)}
            for one in answers
            for repeat, given in enumerate(one.verdicts[place])
        ]
        items[picture.place]["images"].append(
            {
                "path": picture.path,
                "sha256": picture.sha256,
                "verdict": as_dict(verdict),
                "judgements": judgements,
            }
        )
    return items


def _deviations(question: Question, answers: Sequence[Answers]) -> list[str]:
    """What sets the scores apart from published ones."""
    module = question.benchmark
    judges = [one.name for one in answers]
    published = str(module.PUBLISHED_JUDGE)
    parameters = {**dict.fromkeys(_PUBLISHED_PARAMETERS), **answers[0].parameters}
    unlike = {
        name: value
        for name, value in parameters.items()
        if value != _PUBLISHED_PARAMETERS.get(name) and name != "max_tokens"
    }
    shown = ", ".join(f"{name}={'its default' if value is None else value}" for name, value in unlike.items())
    most = max(Counter(picture.place for picture in question.pictures).values())
    found = {
        f"the protocol is {question.protocol}": question.protocol != "official",
        "the official judge text was not to be had; the judge saw the item alone": question.wording == "none",
        "the judge's text is not the one of the official script": question.wording == "other",
        f"these {len(question.items)} items are not the benchmark's own": (
            items_sha256(question.items) != ITEMS_SHA256[module.NAME]
        ),
        f"judged by {', '.join(judges)}; published scores are by {published}": judges != [published],
        f"the judge was asked with {shown}; published scores are by OpenAI's at temperature 0": (
            question.protocol == "official" and judges == [published] and bool(unlike)
        ),
        f"each judge was asked {question.repeats} times": question.repeats > 1,
        f"up to {most} pictures of an item": most > 1,
    }
    return [text for text, holds in found.items() if holds]
