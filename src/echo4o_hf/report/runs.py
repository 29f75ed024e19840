"""What every form of the report shows: runs, put into sections of the same questions.

A run is one file of results: one model's pictures of one benchmark, judged (schema version 1 of
`echo4o evaluate`). A section holds the runs that answered the same items under the same protocol: only those compare.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

TITLES = {"geneval_pp": "GenEval++", "imagine_bench": "Imagine-Bench", "shapes_140": "Shapes-140"}
SHAPES_ITEMS = 140  # of which the demo's quick run draws a part
COLUMNS = {  # GenEval++'s tags, as the paper's table calls them
    "color_attr": "Color",
    "counting": "Count",
    "color_count_attr": "Color/Count",
    "color_spatial_attr": "Color/Pos",
    "spatial_count_attr": "Pos/Count",
    "size_spatial_attr": "Pos/Size",
    "multi_object_count_attr": "Multi-Count",
}

# Controls, zero-width and direction marks, half surrogate pairs, tags: what hides text or turns it round.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)

Question: TypeAlias = tuple[str, str, str]  # benchmark, protocol, sha256 of the items
Published: TypeAlias = Mapping[Question, Sequence[Mapping[str, Any]]]  # rows as the benchmarks' `PUBLISHED`


@dataclass(frozen=True)
class Run:
    """One model's results.

    Attributes:
        name: Of the model, as the report calls it.
        results: As `echo4o evaluate` writes them.
        folder: Where relative paths of pictures may start, besides the current folder.
    """

    name: str
    results: Mapping[str, Any]
    folder: Path

    @property
    def question(self) -> Question:
        """Benchmark, protocol and items; runs compare when these are the same."""
        return self.results["benchmark"], self.results["protocol"], self.results["items_sha256"]


@dataclass(frozen=True)
class Comparison:
    """A paired test of two runs; `found` is what `benchmarks.statistics.compare` returned."""

    first: Run
    second: Run
    found: Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """A score and its 95 % interval; None where there is none."""

    value: float | None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table of scores; `run` is the run's place in its section, None for a published row."""

    name: str
    overall: Score
    groups: Mapping[str, Score]
    run: int | None = None
    num_items: int | None = None
    num_unscored: int | None = None
    source: str = ""


@dataclass(frozen=True)
class Section:
    """The runs of the same questions.

    Attributes:
        title: Of the benchmark, and of a protocol that is not the official one.
        metric: The name of the overall score.
        maximum: The highest score: 1 where items are right or wrong, else 10.
        groups: Tags or types.
        rows: Of the runs, in their order.
        published: Rows of the literature.
    """

    title: str
    metric: str
    maximum: float
    groups: Sequence[str]
    runs: Sequence[Run]
    rows: Sequence[Row]
    published: Sequence[Row]
    comparisons: Sequence[Comparison] = field(default=())

    @property
    def deviations(self) -> dict[str, list[str]]:
        """What sets scores apart from published ones, and the names of the runs that it is true of."""
        found: dict[str, list[str]] = {}
        for run in self.runs:
            for text in run.results["deviations"]:
                found.setdefault(text, []).append(run.name)
        return found

    def number(self, value: float | None, signed: bool = False) -> str:
        """A score with the digits that its unit bears."""
        if value is None:
            return "–"
        digits = 3 if self.maximum == 1 else 2
        text = f"{value:{'+' if signed else ''}.{digits}f}"
        return text.replace("-", "\N{MINUS SIGN}")

    def judged(self, run: Run) -> list[Row]:
        """Of each judge of a run the scores that it alone gives."""
        kind = "per_type" if self.maximum == 10 else "per_tag"
        return [scores_row(scores, self.metric, kind, judge) for judge, scores in run.results["per_judge"].items()]

    def interval(self, interval: Sequence[float] | None, signed: bool = False) -> str:
        """Both ends of an interval."""
        if interval is None:
            return "–"
        return f"{self.number(interval[0], signed)} to {self.number(interval[1], signed)}"

    def p_value(self, comparison: Comparison) -> str:
        """The p-value of a paired test."""
        value = comparison.found["p_value"]
        return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"

    def percent(self, value: float | None) -> str:
        """A percentage of agreement."""
        return "–" if value is None else f"{value:.1f} %"

    def kappa(self, value: float | None) -> str:
        """Cohen's kappa, or another number of its size."""
        return "–" if value is None else f"{value:.3f}".replace("-", "\N{MINUS SIGN}")

    def column(self, group: str) -> str:
        """What a table calls a tag or a type."""
        return COLUMNS.get(group, group.replace("_", " "))

    def cost(self, value: float | None) -> str:
        """An amount of money in the currency of the prices."""
        return "–" if value is None else f"{value:.4f}" if value < 1 else f"{value:.2f}"


def sections(
    runs: Sequence[Run],
    published: Published | None = None,
    comparisons: Sequence[Comparison] = (),
) -> list[Section]:
    """Group runs by their questions, in the order in which they come.

    Args:
        runs: At least one.
        published: Rows of the literature, by the questions that they answer.
        comparisons: Of pairs of `runs`.

    Raises:
        ValueError: there is no run, two of one section have the same name, or results lack scores.
    """
    if not runs:
        raise ValueError("a report needs results, got none")
    grouped: dict[Question, list[Run]] = {}
    for run in runs:
        same = grouped.setdefault(run.question, [])
        if run.name in [other.name for other in same]:
            raise ValueError(f"two results of the same questions are called {run.name!r}; give each a name of its own")
        same.append(run)
    return [_section(same, published or {}, comparisons) for same in grouped.values()]


def _section(runs: Sequence[Run], published: Published, comparisons: Sequence[Comparison]) -> Section:
    benchmark, protocol, items = runs[0].question
    official = protocol == "official"
    metric = benchmark if official else f"{benchmark}_{protocol}"
    title = (
        TITLES.get(benchmark, benchmark) if official else f"{TITLES.get(benchmark, benchmark)}, {protocol} protocol"
    )
    own_items = {question[2] for question in published if question[0] == benchmark}
    if own_items and items not in own_items:  # such scores are not the benchmark's
        title = f"{TITLES.get(benchmark, benchmark)}'s {'' if official else f'{protocol} '}protocol, other items"
    if benchmark == "shapes_140" and (count := len(runs[0].results["items"])) < SHAPES_ITEMS:
        title = f"{title}, {count} of its items"
    kind = "per_type" if "per_type" in runs[0].results["scores"] else "per_tag"
    rows = [scores_row(run.results["scores"], metric, kind, run.name, place) for place, run in enumerate(runs)]
    return Section(
        title=title,
        metric=metric,
        maximum=10.0 if kind == "per_type" else 1.0,
        groups=sorted(dict.fromkeys(group for row in rows for group in row.groups), key=_place),
        runs=runs,
        rows=rows,
        published=[
            Row(
                str(row["model"]),
                Score(row[benchmark]),
                {group: Score(value) for group, value in row[kind].items()},
                source=str(row["source"]),
            )
            for row in published.get(runs[0].question, ())
        ],
        comparisons=[one for one in comparisons if one.first in runs and one.second in runs],
    )


def _place(group: str) -> int:
    """Where the paper's table has it; all else keeps its order."""
    return [*COLUMNS].index(group) if group in COLUMNS else len(COLUMNS)


def scores_row(scores: Mapping[str, Any], metric: str, kind: str, name: str, place: int | None = None) -> Row:
    """A line of the table out of `scores` or one of `per_judge`.

    Raises:
        ValueError: a score is missing or no number.
    """
    try:
        intervals = scores.get(f"{kind}_confidence_interval", {})
        return Row(
            name,
            _score(scores[metric], scores["confidence_interval"]),
            {str(group): _score(value, intervals.get(group)) for group, value in scores[kind].items()},
            run=place,
            num_items=int(scores["num_items"]),
            num_unscored=int(scores["num_unscored"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the scores of {name!r} are not those of {metric}: {error!r}") from error


def _score(value: Any, interval: Any) -> Score:
    numbers = [] if value is None else [float(value)]
    ends = None
    if interval is not None:
        low, high = interval
        ends = float(low), float(high)
        numbers += ends
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{numbers} must be finite")
    return Score(None if value is None else float(value), ends)


def state(section: Section, score: float | None) -> str:
    """What the gallery filters by: right or wrong, or a third of the scale, or unscored."""
    if score is None:
        return "unscored"
    if section.maximum == 1:
        return "right" if score >= 0.5 else "wrong"
    return "low" if score < 4 else "middle" if score < 7 else "high"


def visible(text: str) -> str:
    """The text with characters that hide or turn round what it says spelled out, such as [U+202E]."""
    return _INVISIBLE.sub(lambda match: f"[U+{ord(match[0]):04X}]", text)
