"""GenEval++: what is asked, how every form of reply is read, and the published arithmetic."""

import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo4o_hf.benchmarks import geneval_pp, statistics
from echo4o_hf.benchmarks.geneval_pp import checklist, group, named, parse, questions, request, summarize
from echo4o_hf.benchmarks.items import load_items
from echo4o_hf.benchmarks.verdict import Verdict

UPSTREAM = Path(__file__).parents[3] / "shared" / "upstream-data"
upstream = pytest.mark.skipif(not UPSTREAM.is_dir(), reason="the official files are not here")

BENCH = {
    "tag": "size_spatial_attr",
    "prompt": " A photo of a larger bench on the above and two smaller knifes on the below ",
    "include": [
        {"class": "bench", "count": 1, "size": "larger", "region": "above"},
        {"class": "knife", "count": 2, "size": "smaller", "region": "below", "color": "red"},
    ],
}
CLOCKS = {
    "tag": "counting",
    "prompt": "A photo of six clocks",
    "include": [{"class": "clock", "count": 6}],
    "exclude": [{"class": "clock", "count": 7}],
}


# --- what the judge is asked ---


def test_the_official_checklist() -> None:
    assert checklist(BENCH) == (
        "This image should contain:\n"
        "- larger 1 bench located in the above part of the image.\n"
        "- red-colored smaller 2 knifes located in the below part of the image."
    )
    assert checklist({**CLOCKS, "exclude": [{"class": "clock", "count": 7}, {"class": "bus", "count": 1}]}) == (
        "This image should contain:\n"
        "- 6 clocks present in the image.\n"
        "- No more than 6 clocks should appear.\n"
        "- No more than 0 bus should appear."
    )


@pytest.mark.usefixtures("judge_texts")
def test_the_official_request() -> None:
    system, prompt = request(CLOCKS)
    assert system.startswith("You check images.")
    assert prompt == f"Instruction:\nA photo of six clocks\n\nExpectation checklist:\n{checklist(CLOCKS)}"
    assert request(BENCH)[1].startswith("Instruction:\nA photo of a larger bench on the above")
    with pytest.raises(ValueError, match="protocol must be one of official, strict; got 'loose'"):
        request(CLOCKS, "loose")  # type: ignore[arg-type]


@upstream
def test_the_official_checklists_misspell_28_items_and_strict_none() -> None:
    items = load_items("geneval_pp", UPSTREAM / "Geneval++.jsonl")
    plurals = {
        (clause["class"], clause["count"]) for item in items for clause in item["include"] if clause["count"] > 1
    }
    wrong = {name for name, count in plurals if named(count, name) != f"{count} {name}s"}
    assert wrong == {
        *("bench", "broccoli", "bus", "couch", "knife", "sandwich", "scissors", "sheep", "skis"),
        *("toothbrush", "wine glass"),
    }
    assert all(len(questions(item)) == len(item["include"]) for item in items)
    assert all("exactly" in row["count"] for item in items for row in questions(item))


@pytest.mark.parametrize(
    ("count", "name", "expected"),
    [
        (1, "bus", "1 bus"),
        (2, "bus", "2 buses"),
        (3, "wine glass", "3 wine glasses"),
        (2, "knife", "2 knives"),
        (2, "couch", "2 couches"),
        (2, "toothbrush", "2 toothbrushes"),
        (5, "person", "5 people"),
        (2, "computer mouse", "2 computer mice"),
        (2, "sheep", "2 sheep"),
        (1, "scissors", "1 pair of scissors"),
        (3, "skis", "3 pairs of skis"),
        (2, "teddy bear", "2 teddy bears"),
        (2, "strawberry", "2 strawberries"),
        (2, "toy", "2 toys"),
        (0, "dog", "0 dogs"),
    ],
)
def test_plurals(count: int, name: str, expected: str) -> None:
    assert named(count, name) == expected


def test_strict_questions_bound_every_count_and_ask_for_what_is_there() -> None:
    assert questions(BENCH) == [
        {
            "count": "Does the picture show exactly 1 bench, no more and no fewer?",
            "region": "Is its center in the upper half of the picture?",
            "size": "Is it larger in the picture than the knife?",
        },
        {
            "count": "Does the picture show exactly 2 knives, no more and no fewer?",
            "color": "Is every one's color red?",
            "region": "Is every one's center in the lower half of the picture?",
            "size": "Is every one smaller in the picture than the bench?",
        },
    ]
    assert questions(CLOCKS) == [{"count": "Does the picture show exactly 6 clocks, no more and no fewer?"}]
    no_dogs = {**CLOCKS, "exclude": [{"class": "clock", "count": 7}, {"class": "dog", "count": 1}]}
    assert questions(no_dogs)[1:] == [{"count": "Does the picture show no more than 0 dogs?"}]
    kites = [{"class": "kite", "count": 2, "color": "red"}, {"class": "kite", "count": 1, "color": "blue"}]
    asked = [row["count"] for row in questions({**CLOCKS, "include": kites, "exclude": []})]
    assert asked == [
        f"Does the picture show exactly {what}, no more and no fewer?" for what in ("2 red kites", "1 blue kite")
    ]


def test_strict_tells_clauses_on_the_same_class_apart() -> None:
    left, right = ({"class": "kite", "count": 1, "region": region} for region in ("left", "right"))
    sized = [{**left, "size": "larger"}, {**right, "size": "smaller"}]
    first, _ = questions({**CLOCKS, "include": sized, "exclude": []})
    assert first["count"] == "Does the picture show exactly 1 kite in its left half, no more and no fewer?"
    assert first["size"] == "Is it larger in the picture than the kite in its right half?"
    colored = [{**left, "color": "red", "size": "larger"}, {**left, "color": "blue"}]
    assert questions({**CLOCKS, "include": colored, "exclude": []})[0]["size"] == (
        "Is it larger in the picture than the blue kite?"
    )
    for clauses in ([left, left], [{**left, "color": "red"}, left], [left, {"class": "kite", "count": 2}]):
        with pytest.raises(ValueError, match="cannot tell the clauses on 'kite' apart"):
            request({**CLOCKS, "include": clauses, "exclude": []}, "strict")


def test_the_strict_request_needs_no_official_text() -> None:
    system, prompt = request(BENCH, "strict")
    assert "JSON" in system
    assert prompt.startswith("Instruction:\nA photo of a larger bench")
    assert "2.\n  count: Does the picture show exactly 2 knives" in prompt
    assert json.loads(prompt.splitlines()[-1]) == geneval_pp.REPLY_SCHEMA


# --- what the judge replies ---


@pytest.mark.parametrize(
    ("reply", "score", "reason"),
    [
        ('{"correct": 1, "reason": "all there"}', 1, "all there"),
        ('{"correct": 0, "reason": "two cats"}', 0, "two cats"),
        ('```json\n{\n  "correct": "1",\n  "reason": "ok"\n}\n```', 1, "ok"),
        ('Verdict: **{"correct": true, "reason": "ok"}** as asked.', 1, "ok"),
        ('{"Correct": "Yes", "Reason": ["a", 1]}', 1, '["a", 1]'),
        ('{"reason": "the \\"correct\\": 1 would be {\\"correct\\": 1}", "correct": 0}', 0, None),
        ('{"correct": 0, "details": {"correct": 1}, "reason": "nested {braces}"}', 0, "nested {braces}"),
        ('{"result": {"correct": 1, "reason": "inside"}}', 1, "inside"),
        ('{"correct": 1, "reason": "draft"}\nOn second thought\n{"correct": 0, "reason": "final"}', 0, "final"),
        ('{"correct": 0, "reason": "first"} then {"correct": 1, "reason": "cut', 0, "first"),
        ('{"correct": 0, "reason": "the sign says "STOP" {sic}"}', 0, 'the sign says "STOP" {sic'),
        ("{'correct': True, 'reason': 'it is'}", 1, "it is"),
        ("{correct: 1, reason: fine}", 1, "fine"),
        ("“correct” is asked. {“correct”: 0, “reason”: “curly”}", 0, "curly"),
        ("**Correct:** 1\nReason: fine", 1, None),
        ("correct：no", 0, None),
        ('<think>{"correct": 1}</think>{"correct": 0, "reason": "x"}', 0, "x"),
        ('[{"correct": 1, "reason": "a"}]', 1, "a"),
        ('[{"correct": 1}, {"correct": 1}]', 1, ""),
        ('{"correct": 1} {"note": "no verdict"}', 1, ""),
    ],
)
def test_forms_of_a_reply(reply: str, score: float, reason: str | None) -> None:
    verdict = parse(reply, BENCH)
    assert (verdict.score, verdict.unscored) == (score, None)
    assert reason is None or verdict.reason == reason


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("", "the reply is empty"),
        ("I'm sorry, I can't help with that.", "refused"),
        ("The image is correct: 1 of 1 clauses hold.", "no verdict"),
        ("Reason: correct: 1 would be wrong", "no verdict"),
        ("correct: -1", "no verdict"),
        ('{"correct": 2, "reason": "x"}', "correct is 2, expected 1 or 0"),
        ('{"correct": -1}', "correct is -1"),
        ('{"correct": null}', "correct is None"),
        ('{"correct": "maybe"}', "correct is 'maybe'"),
        ('{"correct": 1, "correct": 0}', r"correct is \[1, 0\]"),
        ('{"correct": 1 if all hold, else 0}', "is not JSON"),
        ('{"correct": 1} {"reason": "a "b"", "correct": 0}', "is not JSON"),
        ('{"reason": "no verdict"}', "no verdict"),
        ('{"reason": {"correct": 1}}', "no verdict"),
        ('{"correct": 1, "reason": "it stops he', "cut off"),
        ('{\n"correct": 1,\n"reason": "it stops', "cut off"),
        ('{"clauses": [{"correct": 1}, {"correct": 1}', "cut off"),
        ('<think>{"correct": 1, "reason": "x"}', "while thinking"),
        ('[{"correct": 1}, {"correct": 0}, {"correct": 1}]', "verdicts that differ"),
    ],
)
def test_replies_without_a_verdict(reply: str, why: str) -> None:
    verdict = parse(reply, BENCH)
    assert verdict.score is None
    assert re.search(why, verdict.unscored or "")


TRAPS = [
    '"correct": {0}',
    '{{"correct": {0}}}',
    "correct: {0}",
    "\n```\n",
    "{{",
    "}}",
    '"',
    "'",
    "<think>",
    "{0}/10",
    "\\",
]
TEXT = st.one_of(st.text(max_size=20), st.sampled_from(["The red boat is missing.", "All 3 cats, each {black}."]))
PROSE = ["", "Here is my verdict:\n", "**Result**\n\n", "The set {a, b} is there. ", "I count 3 (of 2) cats.\n"]
FENCES = [("", ""), ("```json\n", "\n```"), ("**", "**"), ("```\n", "\n```")]
WAYS: dict[bool, list[Any]] = {True: [1, "1", True, "true", "yes", 1.0], False: [0, "0", False, "false", "No", 0.0]}


def verdict_object(random: Random, right: bool, text: str) -> str:
    """One verdict as judges write it; what its reason and details hold must not count."""
    reason = f"{text} {random.choice(TRAPS).format(int(not right))} {text}"
    pairs: list[tuple[str, Any]] = [
        (random.choice(["correct", "Correct", "CORRECT"]), random.choice(WAYS[right])),
        ("reason", reason.replace("</think>", "")),
        ("details", {"correct": int(not right), "counts": [{"cat": 3}]}),
    ]
    kept = pairs[: random.choice([2, 3])]
    found: Any = dict(random.sample(kept, k=len(kept)))
    found = random.choice([found, found, {"result": found}])
    return json.dumps(found, indent=random.choice([None, 0, 2]), ensure_ascii=random.random() < 0.5)


@st.composite
def replies(draw: st.DrawFn) -> tuple[str, list[tuple[int, bool]]]:
    """A reply of one to three verdicts in prose, and where each ends."""
    random, inner = draw(st.randoms(use_true_random=True)), draw(TEXT)
    text, ends = "", []
    for _ in range(random.choice([1, 1, 2, 3])):
        right, fence = random.random() < 0.5, random.choice(FENCES)
        text += random.choice(PROSE) + fence[0] + verdict_object(random, right, inner)
        ends.append((len(text), right))
        text += fence[1] + "\n" + random.choice(PROSE)
    return text, ends


@settings(max_examples=700, deadline=None)
@given(replies())
def test_the_last_verdict_of_any_reply_is_read(made: tuple[str, list[tuple[int, bool]]]) -> None:
    text, ends = made
    verdict = parse(text, BENCH)
    assert (verdict.score, verdict.unscored) == (float(ends[-1][1]), None)


@settings(max_examples=500, deadline=None)
@given(replies(), st.data())
def test_a_cut_reply_has_the_last_complete_verdict_or_none(
    made: tuple[str, list[tuple[int, bool]]], data: st.DataObject
) -> None:
    text, ends = made
    cut = data.draw(st.integers(0, len(text)))
    complete = [float(right) for end, right in ends if end <= cut]
    verdict = parse(text[:cut], BENCH)
    assert verdict.score == (complete[-1] if complete else None)


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(), st.text(alphabet='{}[]"\\:,`\n correct01reason'), replies().map(lambda made: made[0][7:])))
def test_no_text_raises(text: str) -> None:
    for protocol in ("official", "strict"):
        verdict = parse(text, BENCH, protocol)  # type: ignore[arg-type]
        assert verdict.score in (None, 0.0, 1.0)
        (verdict.reason + (verdict.unscored or "")).encode()


# --- strict replies ---


def strict(*rows: dict[str, Any]) -> str:
    return json.dumps({"clauses": list(rows)})


FIRST = {"clause": 1, "reason": "there", "count": "yes", "color": None, "region": "yes", "size": "yes"}
SECOND = {"clause": 2, "reason": "blue", "count": "yes", "color": "no", "region": "yes", "size": "yes"}


def test_a_strict_verdict_is_right_when_every_clause_is() -> None:
    verdict = parse(strict(FIRST, {**SECOND, "color": "yes"}), BENCH, "strict")
    assert (verdict.score, verdict.unscored) == (1.0, None)
    verdict = parse(f"Draft {strict(FIRST)} Final ```{strict(SECOND, FIRST)}```", BENCH, "strict")
    assert (verdict.score, verdict.reason) == (0.0, "1. there\n2. blue")
    assert verdict.parts == {
        **{"1 count": True, "1 region": True, "1 size": True},
        **{"2 count": True, "2 color": False, "2 region": True, "2 size": True},
    }


def test_what_is_not_asked_for_is_not_judged() -> None:
    assert parse(strict({"clause": "1", "count": True, "colour": "no", "size": "no"}), CLOCKS, "strict").score == 1.0


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (strict(FIRST), "count of clause 2 is None, expected yes or no"),
        (strict(FIRST, {**SECOND, "color": None}), "color of clause 2 is None"),
        (strict(FIRST, {**SECOND, "color": "unsure"}), "color of clause 2 is 'unsure'"),
        (strict(FIRST, SECOND, FIRST), "clause 1 is answered twice"),
        (strict(FIRST, SECOND, {**FIRST, "clause": 3}), "clause is 3, expected 1 to 2"),
        (strict(FIRST, {**SECOND, "clause": None}), "clause is None"),
        ('{"clauses": "all yes"}', "clauses is not a list of objects"),
        (strict(FIRST, SECOND)[:-30], "the reply is cut off"),
        ('{"clauses": [{"clause": 1, "reason": "a "quote""}]}', "is not JSON"),
        ('{"correct": 1}', "no verdict"),
        ("I cannot see the picture.", "the judge refused"),
    ],
)
def test_strict_replies_without_a_verdict(reply: str, why: str) -> None:
    verdict = parse(reply, BENCH, "strict")
    assert verdict.score is None
    assert why in (verdict.unscored or "")


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=True), TEXT)
def test_any_strict_reply(random: Random, reason: str) -> None:
    rows: list[dict[str, Any]] = []
    right = True
    for number, asked in enumerate(questions(BENCH), 1):
        answers = {name: random.random() < 0.9 for name in asked}
        right = right and all(answers.values())
        said = {name: random.choice(WAYS[value]) for name, value in answers.items()}
        rows.append({"clause": number, "reason": reason, "color": None, **said})
    text = random.choice(PROSE) + json.dumps({"clauses": random.sample(rows, k=2)})
    assert parse(text + random.choice(PROSE), BENCH, "strict").score == float(right)
    assert parse(text[: random.randrange(len(text))], BENCH, "strict").score is None


# --- what the verdicts come to ---


def judged(rights: dict[str, list[float | None]]) -> list[tuple[dict[str, Any], list[Verdict]]]:
    return [
        ({**CLOCKS, "tag": tag}, [Verdict(right) if right is not None else Verdict(None, unscored="cut")])
        for tag, scores in rights.items()
        for right in scores
    ]


@pytest.mark.parametrize("row", [row for row in geneval_pp.PUBLISHED if None not in row["per_tag"].values()])
def test_the_published_rows_are_the_mean_of_their_tags(row: dict[str, Any]) -> None:
    scores = judged(
        {tag: [float(place < round(rate * 40)) for place in range(40)] for tag, rate in row["per_tag"].items()}
    )
    result = summarize(scores)
    assert result["per_tag"] == pytest.approx(row["per_tag"])
    assert result["geneval_pp"] == pytest.approx(row["geneval_pp"], abs=6e-4)
    assert result["accuracy"] == pytest.approx(result["geneval_pp"])  # the tags are equally large
    assert result["num_items"] == 280
    assert result["confidence_interval"] == pytest.approx(statistics.wilson(280 * result["accuracy"], 280))


def test_the_published_figure_of_noise() -> None:
    low, high = statistics.wilson(round(0.732 * 280), 280)
    assert (round(low, 3), round(high, 3)) == (0.677, 0.781)


def test_unscored_items_are_counted_and_left_out() -> None:
    result = summarize(judged({"counting": [1.0, None, 0.0, 1.0], "color_attr": [0.0, None]}))
    assert result["per_tag"] == {"counting": pytest.approx(2 / 3), "color_attr": 0.0}
    assert result["geneval_pp"] == pytest.approx(1 / 3)
    assert result["accuracy"] == 0.5
    assert (result["num_items"], result["num_unscored"]) == (6, 2)


def test_a_tag_without_scores_leaves_no_overall_score() -> None:
    result = summarize(judged({"counting": [1.0], "color_attr": [None]}))
    assert (result["geneval_pp"], result["confidence_interval"], result["accuracy"]) == (None, None, 1.0)
    assert result["per_tag"] == {"counting": 1.0, "color_attr": None}
    assert summarize([])["geneval_pp"] is None


def test_strict_scores_never_have_the_official_name() -> None:
    result = summarize(judged({"counting": [1.0, 0.0]}), protocol="strict")
    assert result["geneval_pp_strict"] == 0.5
    assert "geneval_pp" not in result


def test_several_images_count_as_one_item() -> None:
    scores = [(CLOCKS, [Verdict(1.0), Verdict(0.0)]), (CLOCKS, [Verdict(1.0), Verdict(None, unscored="cut")])]
    result = summarize(scores)
    assert result["geneval_pp"] == 0.75
    assert (result["num_images"], result["num_unscored_images"], result["num_unscored"]) == (4, 1, 0)


def test_the_group_is_the_tag() -> None:
    assert group(BENCH) == "size_spatial_attr"
