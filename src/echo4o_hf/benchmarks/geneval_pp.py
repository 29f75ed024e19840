"""GenEval++ (Echo-4o, arXiv 2508.09987, section 4): 280 pictures of counted, colored, placed and sized objects.

One item:
    {"tag": "color_count_attr", "prompt": "A photo of three red kites and one blue bowls",
     "include": [{"class": "kite", "count": 3, "color": "red"}, {"class": "bowl", "count": 1, "color": "blue"}]}
and in the tag `counting` also `"exclude": [{"class": "clock", "count": 7}]`: fewer than 7 may appear.

`official`: one question to the judge on the whole checklist, in the authors' words; the score is the mean of the seven
tags' accuracies. The checklist bounds counts from above in `counting` only, and its plurals are made with an "s". The
authors' script cuts replies off after 200 tokens, and counts what that breaks as wrong; here longer ones are allowed.
`strict`: ours. Every clause is asked for its exact count, color, region and size, one by one, and nothing else is
judged (not whether the picture looks like a photo, either); an image is right when every answer is yes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
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
    yes_or_no,
)

NAME = "geneval_pp"
PUBLISHED_JUDGE = "openai:gpt-4.1"
LEVELS = (0, 1)  # of a score: wrong, right

TAGS = (
    "color_attr",
    "counting",
    "color_count_attr",
    "color_spatial_attr",
    "spatial_count_attr",
    "size_spatial_attr",
    "multi_object_count_attr",
)
GROUP_WEIGHTS = dict.fromkeys(TAGS, 1.0)
REGIONS = {"left": "left half", "right": "right half", "above": "upper half", "below": "lower half"}
SIZES = ("larger", "smaller")

_YES_NO = {"type": ["string", "null"], "enum": ["yes", "no", None]}
_CLAUSE = {
    "clause": {"type": "integer"},
    "reason": {"type": "string"},
    "count": _YES_NO,
    "color": _YES_NO,
    "region": _YES_NO,
    "size": _YES_NO,
}
REPLY_SCHEMA: dict[str, Any] = {  # of `strict`
    "type": "object",
    "additionalProperties": False,
    "required": ["clauses"],
    "properties": {
        "clauses": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": list(_CLAUSE),
                "properties": _CLAUSE,
            },
        }
    },
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
    _check_keys(item, where, {"tag", "prompt", "include"}, {"exclude"})
    _check(item["tag"] in TAGS, where, f"tag must be one of {', '.join(TAGS)}", item["tag"])
    _check_text(item["prompt"], where, "prompt")
    for key, optional, least in (("include", {"color", "region", "size"}, 1), ("exclude", set(), 0)):
        clauses = item.get(key, [])
        _check(isinstance(clauses, list) and len(clauses) >= least, where, f"{key} must be a list of clauses", clauses)
        for clause in clauses:
            _check_keys(clause, where, {"class", "count"}, optional)
            _check_text(clause["class"], where, "class")
            count = clause["count"]
            _check(type(count) is int and count >= 1, where, "count must be a whole number from 1", count)
            if "color" in clause:
                _check_text(clause["color"], where, "color")
            for name, allowed in (("region", tuple(REGIONS)), ("size", SIZES)):
                value = clause.get(name, allowed[0])
                _check(value in allowed, where, f"{name} must be one of {', '.join(allowed)}", value)


def _check(holds: bool, where: str, expected: str, seen: object) -> None:
    if not holds:
        raise ValueError(f"{where}: {expected}; got {seen!r}")


def _check_text(value: object, where: str, name: str) -> None:
    _check(isinstance(value, str) and bool(value.strip()), where, f"{name} must be a text that is not empty", value)


def _check_keys(row: object, where: str, required: set[str], optional: set[str]) -> None:
    _check(isinstance(row, dict), where, f"expected an object with {', '.join(sorted(required))}", row)
    assert isinstance(row, dict)
    if missing := required - row.keys():
        raise ValueError(f"{where}: {', '.join(sorted(missing))} missing in {row!r}")
    if unknown := row.keys() - required - optional:
        raise ValueError(f"{where}: unknown key {', '.join(sorted(map(str, unknown)))} in {row!r}")


def group(item: Mapping[str, Any]) -> str:
    """The item's tag."""
    return str(item["tag"])


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
        ValueError: the protocol is none, or `strict` cannot tell the item's clauses apart.
        OSError: the official text is neither here nor to be had.
    """
    check_protocol(protocol)
    if protocol == "strict":
        return _STRICT_SYSTEM, _strict_prompt(item)
    prompt = f"Instruction:\n{item['prompt'].strip()}\n\nExpectation checklist:\n{checklist(item)}"
    return (text or official_text(NAME)).system, prompt


def checklist(item: Mapping[str, Any]) -> str:
    """What the official protocol expects of an image of the item, in its wording, naive plurals included."""
    lines = ["This image should contain:"]
    for clause in item["include"]:
        color = f"{clause['color']}-colored" if clause.get("color") else None
        noun = clause["class"] + "s" * (clause["count"] > 1)
        phrase = " ".join(part for part in (color, clause.get("size"), str(clause["count"]), noun) if part)
        place = f"located in the {clause['region']} part of" if clause.get("region") else "present in"
        lines.append(f"- {phrase} {place} the image.")
    for clause in item.get("exclude", []):
        noun = clause["class"] + "s" * (clause["count"] > 1)
        lines.append(f"- No more than {clause['count'] - 1} {noun} should appear.")
    return "\n".join(lines)


_STRICT_SYSTEM = (
    "You check a picture against numbered clauses. Go by what the picture shows, not by what it was meant to show."
    " Count every object, also the partly hidden and the small ones. Answer a question with yes only when it clearly"
    " holds, else with no. Reply with one JSON object and nothing else."
)

# Plurals that the rules of spelling in `named` do not give; COCO's classes and the common ones besides.
_PLURALS = {
    "person": "people",
    "man": "men",
    "woman": "women",
    "child": "children",
    "mouse": "mice",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
    "sheep": "sheep",
    "fish": "fish",
    "deer": "deer",
    "broccoli": "broccoli",
    "knife": "knives",
    "leaf": "leaves",
    "loaf": "loaves",
    "shelf": "shelves",
    "wolf": "wolves",
    "scarf": "scarves",
    "tomato": "tomatoes",
    "potato": "potatoes",
}
_PAIRS = ("skis", "scissors", "glasses", "pants", "jeans", "shorts", "trousers")


def named(count: int, name: str, adjective: str = "") -> str:
    """A number of objects in English: `3 red knives`, `1 pair of skis`, `2 wine glasses`."""
    before = f"{adjective} " if adjective else ""
    *first, last = name.split(" ")
    if not first and last in _PAIRS:
        return f"{count} {'pair' if count == 1 else 'pairs'} of {before}{name}"
    if count != 1:
        if last in _PLURALS:
            last = _PLURALS[last]
        elif re.search(r"(?:s|x|z|ch|sh)$", last):
            last += "es"
        elif re.search(r"[^aeiou]y$", last):
            last = last[:-1] + "ies"
        else:
            last += "s"
    return f"{count} {before}{' '.join([*first, last])}"


def questions(item: Mapping[str, Any]) -> list[dict[str, str]]:
    """The questions of `strict`: of each clause, by what they ask for (count, color, region, size).

    An `exclude` that only repeats the upper bound of an exact count asks for nothing new and is left out.

    Raises:
        ValueError: two clauses on the same class differ neither in color nor in region: their counts contradict.
    """
    clauses = item["include"]
    told = [_told_apart(clause, clauses) for clause in clauses]
    asked = []
    for place, (clause, (color, where)) in enumerate(zip(clauses, told, strict=True)):
        count = clause["count"]
        their = "its" if count == 1 else "every one's"
        objects = named(count, clause["class"], color) + where
        row = {"count": f"Does the picture show exactly {objects}, no more and no fewer?"}
        if asked_color := clause.get("color"):
            row["color"] = f"Is {their} color {asked_color}?"
        if region := clause.get("region"):
            row["region"] = f"Is {their} center in the {REGIONS[region]} of the picture?"
        if size := clause.get("size"):
            others = [
                " ".join(filter(None, ("the", of_color, other["class"]))) + at
                for number, (other, (of_color, at)) in enumerate(zip(clauses, told, strict=True))
                if number != place
            ]
            than = " and ".join(others) or "is usual"
            row["size"] = f"Is {'it' if count == 1 else 'every one'} {size} in the picture than {than}?"
        asked.append(row)
    exact = {
        (clause["class"], clause["count"]) for clause, apart in zip(clauses, told, strict=True) if apart == ("", "")
    }
    for clause in item.get("exclude", []):
        most = clause["count"] - 1
        if (clause["class"], most) not in exact:
            asked.append({"count": f"Does the picture show no more than {named(most, clause['class'])}?"})
    return asked


def _told_apart(clause: Mapping[str, Any], clauses: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Color and region that tell a clause's objects from others of the class; both empty where there are none."""
    same = [other for other in clauses if other["class"] == clause["class"]]
    if len(same) == 1:
        return "", ""
    for key in ("color", "region"):
        values = [other.get(key) for other in same]
        if None not in values and len(set(values)) == len(values):
            return (clause["color"], "") if key == "color" else ("", f" in its {REGIONS[clause['region']]}")
    raise ValueError(
        f"the strict protocol cannot tell the clauses on {clause['class']!r} apart in {clauses!r}: "
        "give each a color or a region of its own"
    )


def _strict_prompt(item: Mapping[str, Any]) -> str:
    lines = ["Instruction:", item["prompt"].strip(), "", "Clauses:"]
    for number, row in enumerate(questions(item), 1):
        lines += [f"{number}.", *(f"  {name}: {question}" for name, question in row.items())]
    lines += [
        "",
        'For each clause give its number, a short reason, and "yes" or "no" to each of its questions; null where',
        "count, color, region or size is not asked for. Reply with JSON of this schema:",
        json.dumps(REPLY_SCHEMA),
    ]
    return "\n".join(lines)


# --- what the judge replies ---


def parse(reply: str, item: Mapping[str, Any], protocol: Protocol = "official") -> Verdict:
    """Read a reply; whatever its text, this raises nothing. The last complete verdict counts.

    Returns:
        Score 1.0 or 0.0. `parts` of `strict` are the answers, as `"1 count": True`.

    Raises:
        ValueError: the protocol is none.
    """
    check_protocol(protocol)
    text = answer(reply)
    parts = json_parts(text)
    if protocol == "strict":
        return _parse_strict(reply, parts, questions(item))
    found = [(part, read) for part in parts if (read := _read_correct(part)) is not None]
    if not found:
        if not parts and (lines := list(_CORRECT_LINE.finditer(text))):
            return Verdict(float(yes_or_no(lines[-1][1]) is True), text.strip())
        return Verdict(None, unscored=no_verdict(reply, 'verdict {"correct": 1 or 0}'))
    (last, (correct, reason)) = found[-1]
    if isinstance(correct, Unreadable):
        return Verdict(None, reason, unscored=str(correct))
    series = [found[-1]]
    for before, after in zip(found[-2::-1], found[:0:-1], strict=True):
        if not after[0].listed:
            break
        series.append(before)
    if any(read[0] != correct for _, read in series):
        return Verdict(None, reason, unscored="the reply lists verdicts that differ")
    return Verdict(float(correct), reason)


class Unreadable(str):
    """Why what stands for the verdict cannot be read as one."""


# The head of an object that is not JSON, mostly for quotes inside the reason.
_CORRECT_HEAD = re.compile(
    r"\{\s*[\"'“”‘’]?correct[\"'“”‘’]?\s*[:：]\s*[\"'“”‘’]?(1|0|true|false|yes|no)[\"'“”‘’]?\s*[,}]\s*(.*)",
    re.I | re.S,
)
_CORRECT_KEY = re.compile(r"correct[\"'“”‘’*]*\s*[:：]", re.I)
# A reply in lines, without any braces.
_CORRECT_LINE = re.compile(
    r"^[ \t>*_`\"'#-]*correct[ \t*_`\"']*[:=：][ \t*_`\"']*(1|0|true|false|yes|no)[ \t*_`\"'.,]*$", re.I | re.M
)


def _read_correct(part: JsonPart) -> tuple[bool | Unreadable, str] | None:
    """The verdict and its reason in one object; None when it is not a verdict or is cut off."""
    if part.cut:
        return None
    if part.value is not None:
        found = unwrapped(part.value)
        if "correct" not in found:
            return None
        value = yes_or_no(found["correct"])
        reason = reason_text(found.get("reason"))
        return (Unreadable(f"correct is {found['correct']!r}, expected 1 or 0") if value is None else value), reason
    if head := _CORRECT_HEAD.match(part.text):
        reason = re.sub(r"^[\"'“”‘’]?reason[\"'“”‘’]?\s*[:：]\s*", "", head[2], flags=re.I)
        return yes_or_no(head[1]) is True, reason.strip(" \t\r\n}\"'“”‘’")
    if _CORRECT_KEY.search(part.text):
        return Unreadable(f"the verdict is not JSON: {part.text[:120]}"), ""
    return None


def _parse_strict(reply: str, parts: Sequence[JsonPart], asked: Sequence[Mapping[str, str]]) -> Verdict:
    broken = Unreadable("")
    rows: object = None
    for part in parts:
        found = unwrapped(part.value) if part.value is not None else {}
        if "clauses" in found:
            rows, broken = found["clauses"], Unreadable("")
        elif part.value is None and not part.cut and re.search(r"clauses[\"'“”‘’*]*\s*[:：]", part.text):
            broken = Unreadable(f"the verdict is not JSON: {part.text[:120]}")
    if broken:
        return Verdict(None, unscored=str(broken))
    if rows is None:
        return Verdict(None, unscored=no_verdict(reply, 'verdict {"clauses": [...]}'))
    try:
        answers, reasons = _answers(rows, asked)
    except ValueError as error:
        return Verdict(None, unscored=str(error))
    return Verdict(float(all(answers.values())), "\n".join(reasons), answers)


def _answers(rows: object, asked: Sequence[Mapping[str, str]]) -> tuple[dict[str, bool], list[str]]:
    """The answer to every question that was asked, and the clauses' reasons; ValueError when one is not there."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("clauses is not a list of objects")
    by_number: dict[int, dict[str, Any]] = {}
    for row in rows:
        plain = {plain_key(str(key)).replace("colour", "color"): value for key, value in row.items()}
        number = str(plain.get("clause")).strip()
        if not re.fullmatch(r"[0-9]{1,4}", number) or not 1 <= int(number) <= len(asked):
            raise ValueError(f"clause is {plain.get('clause')!r}, expected 1 to {len(asked)}")
        if int(number) in by_number:
            raise ValueError(f"clause {number} is answered twice")
        by_number[int(number)] = plain
    answers: dict[str, bool] = {}
    for place, names in enumerate(asked, 1):
        for name in names:
            given = by_number.get(place, {}).get(name)
            if (value := yes_or_no(given)) is None:
                raise ValueError(f"{name} of clause {place} is {given!r}, expected yes or no")
            answers[f"{place} {name}"] = value
    reasons = [f"{place}. {reason_text(row.get('reason'))}" for place, row in sorted(by_number.items())]
    return answers, reasons


# --- what the verdicts come to ---


def summarize(
    scores: Sequence[tuple[Mapping[str, Any], Sequence[Verdict]]], protocol: Protocol = "official", seed: int = 0
) -> dict[str, Any]:
    """The figures of a set of judged images.

    Args:
        scores: Items, each with one verdict per image; an item counts with the mean of its scored images.
        protocol: Gives the mean of tags its name: `geneval_pp` or `geneval_pp_strict`.
        seed: Of the bootstrap.

    Returns:
        The mean of the tags' accuracies (over the tags that are there; None when one of them has no score), `accuracy`
        over items, `per_tag`, intervals of 95 % of the first and of the tags (Wilson with one image per item, else
        bootstrap over items within their tag), `num_items`, `num_unscored` (items without any score), and the same of
        images.
    """
    check_protocol(protocol)
    table = statistics.by_group([(group(item), [verdict.score for verdict in verdicts]) for item, verdicts in scores])
    return {
        NAME if protocol == "official" else f"{NAME}_strict": statistics.weighted_mean(table, GROUP_WEIGHTS),
        "accuracy": statistics.mean([score for values in table.values() for score in values]),
        "per_tag": {tag: statistics.mean(values) for tag, values in table.items()},
        **statistics.counts([verdicts for _, verdicts in scores]),
        "confidence_interval": statistics.proportion_interval(table, GROUP_WEIGHTS, seed),
        "per_tag_confidence_interval": {
            tag: statistics.proportion_interval({tag: values}, GROUP_WEIGHTS, seed) for tag, values in table.items()
        },
    }


def _row(model: str, scores: str) -> dict[str, Any]:
    *per_tag, overall = [None if score == "-" else float(score) for score in scores.split()]
    return {
        "model": model,
        NAME: overall,
        "per_tag": dict(zip(TAGS, per_tag, strict=True)),
        "source": "arXiv 2508.09987",
    }


PUBLISHED: list[dict[str, Any]] = [
    _row("SD3-medium", ".550 .500 .125 .350 .175 .150 .225 .296"),
    _row("FLUX.1-dev", ".350 .625 .150 .275 .200 .375 .225 .314"),
    _row("Janus-Pro-7B", ".450 .300 .125 .300 .075 .350 .125 .246"),
    _row("T2I-R1", ".675 .325 .200 .350 .075 .250 .300 .311"),
    _row("BLIP3-o 4B", ".125 .225 .100 .450 .125 .550 .225 .257"),
    _row("BLIP3-o 8B", ".250 .250 .125 .600 .125 .575 .225 .307"),
    _row("OmniGen2", ".550 .425 .200 .275 .125 .250 .450 .325"),
    _row("Bagel", ".325 .600 .250 .325 .250 .475 .375 .371"),
    _row("Echo-4o", "- .575 - - - - .625 .679"),
    _row("BLIP3-o 8B + Echo-4o-Image", "- - - - - - - .44"),
    _row("OmniGen2 + Echo-4o-Image", "- - - - - - - .47"),
    _row("GPT-4o", ".900 .675 .725 .625 .600 .800 .850 .739"),
]
