"""Imagine-Bench (Echo-4o, arXiv 2508.09987, section 4): 270 pictures of things that do not exist.

One item:
    {"id": 31, "type": "SHAPE", "instruction": "A photo of a cube-shaped orange.",
     "note": "What is to be imagined, and what of the thing's identity must stay."}

A judge gives 0 to 10 for fantasy fulfillment, identity preservation and aesthetic quality; an item's score is
0.8 * min(fulfillment, identity) + 0.2 * aesthetic. The overall score weighs Attribute shift, Hybridization,
Spatiotemporal and Multi-Object 3:2:2:2.

`official`: the authors' words, a reply in lines. `strict`: ours, a reply in JSON; the arithmetic is the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from echo4o_hf.benchmarks import statistics
from echo4o_hf.benchmarks.items import JudgeText, official_text
from echo4o_hf.benchmarks.verdict import (
    JsonPart,
    Protocol,
    Verdict,
    answer,
    check_protocol,
    json_parts,
    no_verdict,
    plain_key,
    reason_text,
    unwrapped,
)

NAME = "imagine_bench"
PUBLISHED_JUDGE = "openai:gpt-4.1-2025-04-14"
LEVELS = tuple(range(11))  # of a score

GROUPS = {  # of each type
    "COLOR": "Attribute shift",
    "SHAPE": "Attribute shift",
    "SIZE": "Attribute shift",
    "MATERIAL": "Hybridization",
    "COMBINATION": "Hybridization",
    "TIME": "Spatiotemporal",
    "ENVIRONMENT": "Spatiotemporal",
    "Multi-Object": "Multi-Object",
}
GROUP_WEIGHTS = {"Attribute shift": 3.0, "Hybridization": 2.0, "Spatiotemporal": 2.0, "Multi-Object": 2.0}
DIMENSIONS = ("fantasy_fulfillment", "identity_preservation", "aesthetic_quality")

_SCORE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["reason", "score"],
    "properties": {"reason": {"type": "string"}, "score": {"type": "integer", "minimum": 0, "maximum": 10}},
}
REPLY_SCHEMA: dict[str, Any] = {  # of `strict`
    "type": "object",
    "additionalProperties": False,
    "required": list(DIMENSIONS),
    "properties": dict.fromkeys(DIMENSIONS, _SCORE),
}


# --- items ---


def validate_item(item: Any, where: str) -> None:
    """Check one item against the schema above.

    Args:
        item: As read from a file.
        where: File and line, for the error.

    Raises:
        ValueError: a key is missing or unknown, or a value is not one the schema knows.
    """
    keys = {"id", "instruction", "note", "type"}
    if not isinstance(item, dict) or item.keys() != keys:
        raise ValueError(f"{where}: expected an object with exactly {', '.join(sorted(keys))}; got {item!r}")
    if type(item["id"]) is not int or item["id"] < 0:
        raise ValueError(f"{where}: id must be a whole number from 0; got {item['id']!r}")
    for key in ("instruction", "note"):
        if not isinstance(item[key], str) or not item[key].strip():
            raise ValueError(f"{where}: {key} must be a text that is not empty; got {item[key]!r}")
    if item["type"] not in tuple(GROUPS):
        raise ValueError(f"{where}: type must be one of {', '.join(GROUPS)}; got {item['type']!r}")


def group(item: Mapping[str, Any]) -> str:
    """The group of the item's type."""
    return GROUPS[item["type"]]


# --- what the judge is asked ---


def request(
    item: Mapping[str, Any], protocol: Protocol = "official", text: JudgeText | None = None
) -> tuple[str, str]:
    """The system text and the prompt that go to the judge with one image.

    Args:
        item: The benchmark's question.
        protocol: Which wording.
        text: For `official`; the pinned one when None.

    Raises:
        ValueError: the protocol is none, or the official text cannot be read.
        OSError: the official text is neither here nor to be had.
    """
    check_protocol(protocol)
    if protocol == "official":
        text = text or official_text(NAME)
        return text.system, text.fill(item)
    prompt = f"Instruction:\n{item['instruction'].strip()}\n\nNote:\n{item['note'].strip()}\n\n{_STRICT_QUESTIONS}"
    return _STRICT_SYSTEM, prompt + json.dumps(REPLY_SCHEMA)


_STRICT_SYSTEM = (
    "You grade a picture of something imagined. Go by what the picture shows, not by what it was meant to show. Use"
    " the whole scale, and give the lower number when you hesitate between two. Reply with one JSON object and nothing"
    " else."
)
_STRICT_QUESTIONS = """Give three whole numbers from 0 to 10, each with a short reason that comes first:
- fantasy_fulfillment: does the picture show the change that the instruction imagines, in full and in every object it
  names? 0: no sign of it; 5: partly, or in some of the objects; 10: all of it.
- identity_preservation: is each thing still known for what it is, by everything that the change leaves alone? 0: not
  at all; 5: with doubt; 10: at first sight.
- aesthetic_quality: is the picture sharp, well composed and free of faults? 0: broken; 5: faults that one sees;
  10: none.
Reply with JSON of this schema:
"""


# --- what the judge replies ---


def parse(reply: str, item: Mapping[str, Any], protocol: Protocol = "official") -> Verdict:
    """Read a reply; whatever its text, this raises nothing. The last three scores that belong together count.

    Returns:
        Score 0.0 to 10.0; `parts` are the three dimensions'.

    Raises:
        ValueError: the protocol is none.
    """
    check_protocol(protocol)
    text = answer(reply)
    in_lines = _line_groups(text)
    in_json = [_json_group(part) for part in json_parts(text) if not part.cut and _KEY.search(part.text)]
    ends = [whole[-1] for groups in (in_lines, in_json) if (whole := [*filter(_is_complete, groups)])]
    if not ends:
        missing = {*DIMENSIONS}.difference(*in_lines, *in_json)
        if len(missing) in (0, len(DIMENSIONS)):
            return Verdict(None, unscored=no_verdict(reply, "three scores that belong together"))
        names = ", ".join(name.replace("_", " ") for name in DIMENSIONS if name in missing)
        return Verdict(None, unscored=f"the reply has no score for {names}")
    last = ends[0]
    if any(other[name].score != last[name].score for other in ends for name in DIMENSIONS):
        return Verdict(None, unscored="the reply gives other scores in its lines than in its JSON")
    reasons = "\n".join(f"{name.replace('_', ' ')}: {given.reason}" for name, given in last.items() if given.reason)
    scores = {name: given.score for name, given in last.items() if given.score is not None}
    if problems := [given.problem for given in last.values() if given.score is None]:
        return Verdict(None, reasons, scores, problems[0])
    worst = min(scores["fantasy_fulfillment"], scores["identity_preservation"])
    return Verdict(0.8 * worst + 0.2 * scores["aesthetic_quality"], reasons, scores)


@dataclass(frozen=True)
class Given:
    """What a reply gives for one dimension: a score, or what is wrong with it; `after` is the text that follows."""

    score: float | None
    problem: str = ""
    reason: str = ""
    after: str = ""


Scores = dict[str, Given]  # by dimension, in the order of the reply


def _is_complete(scores: Scores) -> bool:
    return len(scores) == len(DIMENSIONS)


def _given(number: str, most: str | None, name: str) -> Given:
    value = float(number)
    if most is not None and float(most) != 10:
        return Given(None, f"{name} is {number}/{most}, expected 0 to 10")
    return Given(value) if 0 <= value <= 10 else Given(None, f"{name} is {number}, expected 0 to 10")


# Possessive quantifiers throughout: hostile text must not make them backtrack.
_NAMES = r"(?:fantasy[ \t_-]*+fulfil++ment|identity[ \t_-]*+preservation|aesthetic[ \t_-]*+quality)"
_GAP = r"[ \t*_`\"'“”‘’]*+"
_RANGE = r"(?:[(\[][ \t]*+(?:0[ \t]*+(?:-|–|—|to)[ \t]*+10|out[ \t]++of[ \t]++10|/[ \t]*+10)[ \t]*+[)\]])?+"
_WORD = r"(?:(?:score|rating)\b)?+"
_KEY = re.compile(rf"[{{,]\s*+[\"'“”‘’*]++{_NAMES}[^:\n\"'“”‘’]{{0,20}}[\"'“”‘’]\s*+:", re.I)
# A name in quotes is a key of JSON.
_HEAD = rf"[ \t\-*+•>#|_`(]*+(?:[0-9]{{1,2}}[.)])?+[ \t*_`]*+(?P<name>{_NAMES})[ \t*_`]*+{_WORD}{_GAP}{_RANGE}{_GAP}"
_NUMBER = rf"[<\[(]?+{_GAP}(?P<number>[-+]?+[0-9]++(?:\.[0-9]++)?+)(?P<rest>.*)"
_HEADING = re.compile(rf"{_HEAD}[:=|]?+{_GAP}$", re.I)
_SCORED = re.compile(rf"{_HEAD}(?P<sep>[:=|]|[-–—](?=[ \t]))?+{_GAP}(?:{_WORD}{_GAP}[:=]?+){_GAP}{_NUMBER}$", re.I)
_BELOW = re.compile(
    rf"{_GAP}(?:[-•+>#|][ \t]++)?+{_GAP}(?P<sep>{_WORD}){_GAP}{_RANGE}{_GAP}[:=]?+{_GAP}{_NUMBER}$", re.I
)
_CLOSE = r"[ \t*_`\"'“”‘’>\])]*+"
_REST = re.compile(
    rf"{_CLOSE}(?:(?:/|out[ \t]++of\b|of\b)[ \t]*+(?P<most>[0-9]++(?:\.[0-9]++)?+){_CLOSE})?+"
    rf"(?:(?:points?|pts)\b{_CLOSE})?+(?P<tail>.*)$",
    re.I,
)
_SAME = str.maketrans(
    {
        **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)},  # full width
        **dict.fromkeys((0x00A0, 0x2007, 0x2009, 0x202F, 0x3000), " "),
        **dict.fromkeys((0x2010, 0x2011, 0x2212), "-"),
        **dict.fromkeys((0x2044, 0x2215), "/"),
        **dict.fromkeys((0x200B, 0x2060, 0xFEFF)),
    }
)


def _json_group(part: JsonPart) -> Scores:
    if part.value is None:
        problem = f"the scores are not JSON: {part.text[:120]}"
        return {name: Given(None, problem) for name in DIMENSIONS}
    found = {_dimension(key): value for key, value in unwrapped(part.value).items() if re.fullmatch(_NAMES, key)}
    return {name: _json_score(name, value) for name, value in found.items()}


def _json_score(name: str, value: object) -> Given:
    reason = ""
    if isinstance(value, dict):
        plain = {plain_key(key): inner for key, inner in value.items()}
        reason = reason_text(plain.get("reason", plain.get("justification", plain.get("explanation"))))
        value = next((plain[key] for key in ("score", "rating", "value") if key in plain), None)
    label = name.replace("_", " ")
    text = value.translate(_SAME).strip() if isinstance(value, str) else str(value)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return Given(None, f"{label} is {value!r}, expected 0 to 10", reason)
    match = re.fullmatch(r"([-+]?+[0-9]++(?:\.[0-9]++)?+)(?: *+(?:/|out of) *+([0-9]++))?+", text)
    if match is None:
        return Given(None, f"{label} is {text[:40]!r}, expected 0 to 10", reason)
    return replace(_given(match[1], match[2], label), reason=reason)


def _dimension(name: str) -> str:
    return next(dimension for dimension in DIMENSIONS if dimension.startswith(name.casefold()[:4]))


def _line_groups(text: str) -> list[Scores]:
    """The scores that stand at the beginnings of lines; one that is given again begins a new group."""
    text = text.translate(_SAME).replace("\r\n", "\n").replace("\r", "\n")
    groups: list[Scores] = [{}]
    for name, given in _following(text):
        if name in groups[-1]:
            groups.append({})
        groups[-1][name] = given
    last = groups[-1]
    ends = [given.after.strip(" \t\n-_*#|=") for given in last.values()]
    # A number at the very end may be half of one: it stands if another ends as it does.
    if _is_complete(last) and ends[-1] in ("", ".", "/", "/1") and ends[-1] not in ends[:-1]:
        name, given = last.popitem()
        if "\n" in given.after:
            last[name] = given
    return [scores for scores in groups if scores]


def _following(text: str) -> Iterator[tuple[str, Given]]:
    """The scores in a text, each with what follows it."""
    lines = text.split("\n")
    found = [*_scores(lines)]
    for place, (_, number, name, given) in enumerate(found):
        until = found[place + 1][0] if place + 1 < len(found) else len(lines)
        after = "\n".join([given.after, *lines[number + 1 : until]])
        reason = re.sub(r"^[\W_]*+(?:reason|justification|explanation)\b[\W_]*+", "", after, flags=re.I)
        yield name, replace(given, after=after, reason=reason.strip(" \n\t*.-–—:|"))


def _scores(lines: Sequence[str]) -> Iterator[tuple[int, int, str, Given]]:
    """The scores in lines: where the name stands, where the number, the dimension, and what is given there."""
    for number, line in enumerate(lines):
        if not re.search(_NAMES, line, re.I):
            continue
        if several := _all_on(line):
            yield from ((number, number, name, given) for name, given in several)
        elif heading := _HEADING.match(line):
            below = next((place for place in range(number + 1, len(lines)) if lines[place].strip()), number)
            match = _BELOW.match(lines[below])
            if match and (given := _read(match, heading["name"], alone=not match["sep"])):
                yield number, below, _dimension(heading["name"]), given
        elif (match := _SCORED.match(line)) and (given := _read(match, match["name"], alone=not match["sep"])):
            yield number, number, _dimension(match["name"]), given


def _all_on(line: str) -> list[tuple[str, Given]]:
    """The scores on a line that holds two or more and nothing else; [] for other lines."""
    found = []
    for piece in re.split(r"[,;|]", line):
        if piece.strip(" \t*."):
            match = _SCORED.match(piece)
            given = _read(match, match["name"], alone=True) if match else None
            if match is None or given is None:
                return []
            found.append((_dimension(match["name"]), replace(given, after="")))
    return found if len(found) > 1 else []


def _read(match: re.Match[str], name: str, alone: bool) -> Given | None:
    """The number of a match, unless it belongs to a sentence; `alone`: nothing may follow it."""
    rest = _REST.match(match["rest"])
    assert rest is not None
    tail = rest["tail"]
    label = _dimension(name).replace("_", " ")
    if alone and tail.strip(" ."):
        return None
    if re.match(r"[ \t.,:;|–—-]*+[0-9]", tail):
        return Given(None, f"{label} is {(match['number'] + match['rest'])[:40]!r}, expected one number", after=tail)
    if tail and not re.match(r"[.,;:|(\[–—-]|(?:reason|justification|explanation|because)\b", tail, re.I):
        if tail[0].isalpha():
            return None
        return Given(None, f"{label} is {(match['number'] + match['rest'])[:40]!r}, expected 0 to 10", after=tail)
    return replace(_given(match["number"], rest["most"], label), after=match["rest"])


# --- what the verdicts come to ---


def summarize(
    scores: Sequence[tuple[Mapping[str, Any], Sequence[Verdict]]], protocol: Protocol = "official", seed: int = 0
) -> dict[str, Any]:
    """The figures of a set of judged images.

    Args:
        scores: Items, each with one verdict per image; an item counts with the mean of its scored images.
        protocol: Gives the overall score its name: `imagine_bench` or `imagine_bench_strict`.
        seed: Of the bootstrap.

    Returns:
        The overall score (3:2:2:2, over the groups that are there; None when one of them has no score), `per_type`
        (the four groups), `per_dimension`, intervals of 95 % (bootstrap over items within their group; None for a
        group with one item), `num_items`, `num_unscored` (items without any score), the same of images, and with
        `official` `released_script_score`.
    """
    check_protocol(protocol)
    table = statistics.by_group([(group(item), [verdict.score for verdict in verdicts]) for item, verdicts in scores])
    overall = NAME if protocol == "official" else f"{NAME}_strict"
    per_type = {name: statistics.mean(values) for name, values in table.items()}
    result: dict[str, Any] = {
        overall: statistics.weighted_mean(table, GROUP_WEIGHTS),
        "per_type": per_type,
        "per_dimension": {name: _dimension_mean(scores, name) for name in DIMENSIONS},
        **statistics.counts([verdicts for _, verdicts in scores]),
        "confidence_interval": statistics.clustered_bootstrap(table, GROUP_WEIGHTS, seed),
        "per_type_confidence_interval": {
            name: statistics.clustered_bootstrap({name: values}, GROUP_WEIGHTS, seed) for name, values in table.items()
        },
    }
    if protocol == "official":
        result["released_script_score"] = released_script_score(per_type)
    return result


def _dimension_mean(scores: Sequence[tuple[Mapping[str, Any], Sequence[Verdict]]], name: str) -> float | None:
    rows = [
        (group(item), [float(verdict.parts[name]) if verdict.score is not None else None for verdict in verdicts])
        for item, verdicts in scores
    ]
    return statistics.weighted_mean(statistics.by_group(rows), GROUP_WEIGHTS)


def released_script_score(per_type: Mapping[str, float | None]) -> float | None:
    """The overall score as the authors' released script weighs it: without Multi-Object, rounded to three decimals.

    Its weight table misspells that group. The published scores hold it; this number is for comparing with the script's
    output only. (The script also counts an unreadable reply as -1 and a failed call as 0; unscored here is left out.)
    """
    kept = {name: score for name, score in per_type.items() if name != "Multi-Object" and score is not None}
    weight = sum(GROUP_WEIGHTS[name] for name in kept)
    return round(sum(GROUP_WEIGHTS[name] * score for name, score in kept.items()) / weight, 3) if kept else None


def _row(model: str, scores: str) -> dict[str, Any]:
    *per_type, overall = [None if score == "-" else float(score) for score in scores.split()]
    columns = ("Attribute shift", "Spatiotemporal", "Hybridization", "Multi-Object")
    return {
        "model": model,
        NAME: overall,
        "per_type": dict(zip(columns, per_type, strict=True)),
        "source": "arXiv 2508.09987",
    }


PUBLISHED: list[dict[str, Any]] = [
    _row("FLUX.1-dev", "5.298 6.350 7.053 5.973 6.072"),
    _row("Qwen-Image", "6.771 7.193 8.130 7.500 7.329"),
    _row("Janus-Pro-7B", "5.30 7.28 6.73 6.04 6.22"),
    _row("T2I-R1", "5.85 7.70 7.36 6.68 6.78"),
    _row("BLIP3-o", "- - - - 6.51"),
    _row("OmniGen2", "- - - - 6.22"),
    _row("Bagel", "5.37 6.93 6.50 6.41 6.20"),
    _row("Echo-4o", "- - - - 7.80"),
    _row("BLIP3-o + Echo-4o-Image", "- - - - 7.37"),
    _row("OmniGen2 + Echo-4o-Image", "- - - - 7.01"),
    _row("GPT-4o", "8.54 9.18 8.57 7.98 8.56"),
]
