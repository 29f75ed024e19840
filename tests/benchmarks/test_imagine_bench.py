"""Imagine-Bench: what is asked, how every form of reply is read, and the published arithmetic."""

import json
import re
import time
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo4o_hf.benchmarks import imagine_bench
from echo4o_hf.benchmarks.imagine_bench import (
    DIMENSIONS,
    GROUPS,
    group,
    parse,
    released_script_score,
    request,
    summarize,
)
from echo4o_hf.benchmarks.verdict import Verdict

CUBE = {"id": 31, "type": "SHAPE", "instruction": "A photo of a cube-shaped orange.", "note": "Peel and color stay."}
NAMES = ("Fantasy Fulfillment", "Identity Preservation", "Aesthetic Quality")


# --- what the judge is asked ---


@pytest.mark.usefixtures("judge_texts")
def test_the_official_request_fills_in_the_item() -> None:
    system, prompt = request(CUBE)
    assert system == "You grade images."
    assert 'Asked for: "A photo of a cube-shaped orange."\nMeant: "Peel and color stay."' in prompt
    with pytest.raises(ValueError, match="protocol must be one of"):
        request(CUBE, "own")  # type: ignore[arg-type]


def test_the_strict_request_needs_no_official_text() -> None:
    system, prompt = request(CUBE, "strict")
    assert "JSON" in system
    assert prompt.startswith("Instruction:\nA photo of a cube-shaped orange.\n\nNote:\nPeel and color stay.\n\n")
    assert json.loads(prompt.splitlines()[-1]) == imagine_bench.REPLY_SCHEMA


# --- what the judge replies ---


def lines(*values: object) -> str:
    return "\n".join(f"{name}: {value}\nReason: fine" for name, value in zip(NAMES, values, strict=True))


@pytest.mark.parametrize(
    "reply",
    [
        "Fantasy Fulfillment: 8\nReason: a\n\nIdentity Preservation: 7\nReason: b\n\nAesthetic Quality: 9\nReason: c",
        "Fantasy Fulfillment: 8\nIdentity Preservation: 7\nAesthetic Quality: 9",
        "**Fantasy Fulfillment:** 8\n**Identity Preservation**: 7\n**Aesthetic Quality: 9**",
        "Fantasy Fulfillment (0–10): 8\n**Identity Preservation (0-10):** 7\nAesthetic Quality (0 to 10) = 9",
        "fantasy fulfillment = 8/10\nIDENTITY PRESERVATION: 7 / 10\nAesthetic quality: 9 out of 10.",
        "Fantasy Fulfillment：８\r\nIdentity Preservation（0‑10）：7／10\r\nAesthetic Quality\u00a0: 9",
        "1. Fantasy Fulfilment: <8>\n2. **Identity Preservation** - 7\n3) Aesthetic Quality — **9**/10",
        "### Fantasy Fulfillment\nScore: 8/10\nReason: a\n### Identity Preservation (0–10)\n**Score:** 7\n"
        "### Aesthetic Quality:\n\n- 9",
        "- Fantasy Fulfillment score: 8.0 - there\n* Identity Preservation: 7 (one of 3 legs)\n"
        "• Aesthetic Quality 9\n",
        "| Dimension | Score |\n|---|---|\n| Fantasy Fulfillment | 8 | all |\n| Identity Preservation | 7 | ok |\n"
        "| **Aesthetic Quality** | **9** | fine |",
        "Fantasy Fulfillment: 8, Identity Preservation: 7, Aesthetic Quality: 9.",
        "**Fantasy Fulfillment**: 8 | **Identity Preservation**: 7/10 | **Aesthetic Quality**: 9",
        '{"Fantasy Fulfillment": 8, "Identity Preservation": "7/10", "Aesthetic Quality": 9.0}',
        '```json\n{"fantasy_fulfillment": {"reason": "identity_preservation: 2", "score": 8},\n'
        '"identity_preservation": {"score": "7"}, "aesthetic_quality": {"rating": 9}}\n```',
        '{"scores": {"Fantasy Fulfillment (0-10)": 8, "Identity Preservation": 7, "Aesthetic Quality": 9}}',
        lines(8, 7, 9) + '\n{"Fantasy Fulfillment": 8, "Identity Preservation": 7, "Aesthetic Quality": 9}',
        'Fantasy Fulfillment: 8\nR: {"aesthetic quality": 3} {\'x\nIdentity Preservation: 7\nAesthetic Quality: 9\n',
        "{\n fantasy_fulfillment: 8,\n identity_preservation: 7,\n aesthetic_quality: 9\n}",
        lines(1, 1, 1) + "\nLooking again:\n" + lines(8, 7, 9),
        "<think>" + lines(1, 1, 1) + "</think>" + lines(8, 7, 9),
        "Fantasy Fulfillment: 2\nno, once more.\n" + lines(8, 7, 9),
        lines(8, 7, 9) + "\nFantasy Fulfillment: 3\nReason: on the other ha",
        "Fantasy Fulfillment: how well is the change shown?\n" + lines(8, 7, 9),
        "Fantasy Fulfillment: 8\nReason: a\nFantasy Fulfillment 3 would be harsh.\nFantasy Fulfillment 3, to say it.\n"
        "Identity Preservation: 7\nReason: Fantasy Fulfillment: 2, Aesthetic Quality: 1.\n"
        "Aesthetic Quality: 9\nReason: 10 for light, 3",
    ],
)
def test_forms_of_a_reply(reply: str) -> None:
    verdict = parse(reply, CUBE)
    assert verdict.unscored is None
    assert verdict.parts == {"fantasy_fulfillment": 8.0, "identity_preservation": 7.0, "aesthetic_quality": 9.0}
    assert verdict.score == pytest.approx(0.8 * 7 + 0.2 * 9)


def test_a_half_point_stays_one() -> None:
    assert parse(lines("8.5", "9.5/10", "**6.5**"), CUBE).score == pytest.approx(0.8 * 8.5 + 0.2 * 6.5)


def test_the_reasons_are_kept() -> None:
    reply = "Fantasy Fulfillment: 8\nReason: it is\na cube\nIdentity Preservation: 7 - peel\nAesthetic Quality: 9\n"
    assert parse(reply, CUBE).reason == "fantasy fulfillment: it is\na cube\nidentity preservation: peel"


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        ("", "the reply is empty"),
        ("I'm sorry, I can't rate this image.", "the judge refused"),
        ("A fine picture.", "no three scores"),
        (lines(8, 7, 11), "aesthetic quality is 11, expected 0 to 10"),
        (lines(8, -1, 9), "identity preservation is -1, expected 0 to 10"),
        (lines(100, 7, 9), "fantasy fulfillment is 100"),
        (lines("80/100", 7, 9), "fantasy fulfillment is 80/100"),
        (lines("7-8", 7, 9), "fantasy fulfillment is '7-8', expected one number"),
        (lines("7 – 8", 7, 9), "fantasy fulfillment is '7 – 8'"),
        (lines("8,5", 7, 9), "fantasy fulfillment is '8,5'"),
        (lines("80%", 7, 9), "fantasy fulfillment is '80%'"),
        (lines("8 → 6", 7, 9), "fantasy fulfillment is '8 → 6'"),
        (lines("1²", 7, 9), "fantasy fulfillment is '1²'"),
        (lines("N/A", 7, 9), "no score for fantasy fulfillment"),
        (lines("eight", 7, 9), "no score for fantasy fulfillment"),
        (lines("8 of the 10 things asked for", 7, 9), "no score for fantasy fulfillment"),
        (lines("<score>", "<score>", "<score>"), "no three scores"),
        (
            "Fantasy Fulfillment: 8\nReason: Identity Preservation: 7\nReason: Aesthetic Quality: 9",
            "no score for identity",
        ),
        (
            "Fantasy Fulfillment: 8\nReason: a\nIdentity Preservation: 10\nReason: b\nAesthetic Quality: 1",
            "no score for aes",
        ),
        ("Fantasy Fulfillment: 8/10\nIdentity Preservation: 10/10\nAesthetic Quality: 1", "no score for aesthetic"),
        (
            "Fantasy Fulfillment: 8\nReason: a\nIdentity Preservation: 10\nReason: b\nAesthetic Quality: 8.",
            "no score for aes",
        ),
        ('{"Fantasy Fulfillment": 8, "Identity Preservation": 7, "Aesthetic Quality": 1', "cut off"),
        ('{"Fantasy Fulfillment": 8, "Identity Preservation": 7}', "no score for aesthetic quality"),
        ('{"Fantasy Fulfillment": true, "Identity Preservation": 7, "Aesthetic Quality": 9}', "is True"),
        ('{"Fantasy Fulfillment": [8], "Identity Preservation": 7, "Aesthetic Quality": 9}', r"is \[8\]"),
        (
            '{"Fantasy Fulfillment": 8, "Fantasy_Fulfillment": 2, "Identity Preservation": 7, "Aesthetic Quality": 9}',
            r"\[8, 2\]",
        ),
        ("{'Fantasy Fulfillment': 8, 'Identity Preservation': 7, 'Aesthetic Quality': 9}", "are not JSON"),
        ('{"Fantasy Fulfillment": NaN, "Identity Preservation": 7, "Aesthetic Quality": 9}', "is 'nan'"),
        ("<think>" + lines(8, 7, 9), "while thinking"),
        (
            lines(8, 7, 9) + '\n{"Fantasy Fulfillment": 8, "Identity Preservation": 7, "Aesthetic Quality": 8}',
            "other scores in its lines than in its JSON",
        ),
        ('{\n"Fantasy Fulfillment": 8,\n"Identity Preservation": 7,\n"Aesthetic Quality": 9,\n"note": "', "cut off"),
    ],
)
def test_replies_without_a_verdict(reply: str, why: str) -> None:
    verdict = parse(reply, CUBE)
    assert verdict.score is None
    assert re.search(why, verdict.unscored or "")


FORMS = [
    *(
        "{name}: {value}",
        "**{name}:** {value}",
        "**{name}**: {value}",
        "**{name} (0–10):** {value}",
        "- {name}: {value}",
    ),
    *(
        "{name} = {value}",
        "{name} (0-10): {value}",
        "1. **{name}**: {value}",
        "## {name}: {value}",
        "{name}： {value}",
    ),
    *(
        "{name} - {value}",
        "{name} — {value}",
        "* **{name} Score:** {value}",
        "> {name}: {value}",
        "{name}: **{value}**",
    ),
    *("{name}\nScore: {value}", "### {name} (0–10)\n\n**Score:** {value}", "{name}: <{value}>", "**{name}: {value}**"),
]
TAILS = ["", "", ".", "  ", " - good work", " (good)", "; solid", ", as asked", ". Not 10.", " because it fits"]
TRAPS = [
    *(
        "Reason: {name}: {other} would be too low.",
        "Reason: I gave {other}/10 at first",
        "Reason: with {name} = {other}, no",
    ),
    *("Reason: {name} {other} of 10\n{name} {other} is not deserved", "{other} legs", "Reason: “{name}: {other}”", ""),
    *(
        "Justification: see\nthe {name}: {other}",
        "(the {name}: {other})",
        "Reason: text, {name}: {other}\nand: {other}",
    ),
]
TEXT = st.one_of(st.text(max_size=20), st.just("the light is soft")).map(
    lambda text: " ".join(text.replace("</think>", "").split())
)


def written(random: Random, value: float) -> str:
    whole = [f"{value:g}", f"{value:g}/10", f"{value:g} / 10", f"{value:g} out of 10"]
    return random.choice([*whole, f"{value:.1f}"])


def three_scores(random: Random, values: list[float], text: str) -> str:
    """One verdict as judges write it; what its reasons hold must not count."""
    form, tail, case = random.choice(FORMS), random.choice(TAILS), random.choice([str, str.lower, str.upper])
    reply = ""
    for name, value in zip(NAMES, values, strict=True):
        reply += form.format(name=case(name), value=written(random, value)) + tail + "\n"
        trap = random.choice(TRAPS).format(name=random.choice(NAMES), other=random.randrange(11))
        reply += f"{trap}\nReason: {text} {random.randrange(11)}\n\n"
    return reply


@st.composite
def replies(draw: st.DrawFn) -> tuple[str, list[float], list[float]]:
    """A reply, the scores it gives, and those of a draft in front (none: [])."""
    random, text = draw(st.randoms(use_true_random=True)), draw(TEXT)
    values = [random.choice([*range(11), 0.5, 7.5, 8.5]) for _ in NAMES]
    draft = [random.randrange(11) for _ in NAMES] if random.random() < 0.3 else []
    before = random.choice(["", "Here are the scores.\n", "The judge's view (0–10):\n\n"])
    first = three_scores(random, list(draft), text) + "Once more:\n" if draft else ""
    return before + first + three_scores(random, values, text), values, list(draft)


def total(values: list[float]) -> float:
    return 0.8 * min(values[:2]) + 0.2 * values[2]


@settings(max_examples=700, deadline=None)
@given(replies())
def test_the_last_three_scores_of_any_reply_are_read(made: tuple[str, list[float], list[float]]) -> None:
    text, values, _ = made
    verdict = parse(text, CUBE)
    assert verdict.unscored is None
    assert list(verdict.parts.values()) == values
    assert verdict.score == pytest.approx(total(values))


@settings(max_examples=500, deadline=None)
@given(replies(), st.data())
def test_a_cut_reply_never_has_a_wrong_score(made: tuple[str, list[float], list[float]], data: st.DataObject) -> None:
    text, values, draft = made
    verdict = parse(text[: data.draw(st.integers(0, len(text)))], CUBE)
    given_scores = list(verdict.parts.values()) if verdict.score is not None else None
    assert given_scores in (None, values, draft)


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(
        st.text(),
        st.lists(
            st.sampled_from([*NAMES, ":", "8", "/10", "\n", " ", "**", "-", "{", "}", '"', "(0–10)", "Score", "."])
        ).map("".join),
    )
)
def test_no_text_raises(text: str) -> None:
    for protocol in ("official", "strict"):
        verdict = parse(text, CUBE, protocol)  # type: ignore[arg-type]
        assert verdict.score is None or 0 <= verdict.score <= 10
        (verdict.reason + (verdict.unscored or "")).encode()


@pytest.mark.parametrize(
    "text",
    [
        "Fantasy Fulfillment" + " " * 100_000,
        "-*" * 50_000,
        "Fantasy Fulfillment: 8 " + "*" * 100_000 + "x",
        "aesthetic" * 10_000,
    ]
    + [
        "Fantasy Fulfillment: " + "9" * 5000,
        "Fantasy Fulfillment: 8," * 5_000,
        "1." * 50_000,
        "Fantasy Fulfillment\n" * 5_000,
    ],
)
def test_hostile_text_takes_no_time(text: str) -> None:
    start = time.process_time()
    assert parse(text, CUBE).score is None
    assert time.process_time() - start < 2


def test_a_strict_reply() -> None:
    scores = {name: {"reason": f"as {place}", "score": 8 - place} for place, name in enumerate(DIMENSIONS)}
    verdict = parse(f"{json.dumps(scores)}", CUBE, "strict")
    assert verdict.score == pytest.approx(0.8 * 7 + 0.2 * 6)
    assert verdict.reason == "fantasy fulfillment: as 0\nidentity preservation: as 1\naesthetic quality: as 2"


# --- what the verdicts come to ---

OF_GROUP = {
    "Attribute shift": "COLOR",
    "Hybridization": "MATERIAL",
    "Spatiotemporal": "TIME",
    "Multi-Object": "Multi-Object",
}


def judged(scores: dict[str, list[float | None]]) -> list[tuple[dict[str, Any], list[Verdict]]]:
    def verdict(score: float | None) -> Verdict:
        return (
            Verdict(score, "", dict.fromkeys(DIMENSIONS, score))
            if score is not None
            else Verdict(None, unscored="cut")
        )

    return [({**CUBE, "type": OF_GROUP[name]}, [verdict(one)]) for name, many in scores.items() for one in many]


ROWS = [row for row in imagine_bench.PUBLISHED if None not in row["per_type"].values()]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["model"])
def test_the_published_rows_weigh_3_2_2_2_with_multi_object(row: dict[str, Any]) -> None:
    number = {"Attribute shift": 90}
    result = summarize(judged({name: [score] * number.get(name, 60) for name, score in row["per_type"].items()}))
    assert result["per_type"] == pytest.approx(row["per_type"])
    assert result["imagine_bench"] == pytest.approx(row["imagine_bench"], abs=0.0045)
    assert result["num_items"] == 270


@pytest.mark.parametrize(("model", "printed"), [("Bagel", 6.139), ("GPT-4o", 8.731)])
def test_what_the_released_script_prints(model: str, printed: float) -> None:
    (row,) = (row for row in ROWS if row["model"] == model)
    assert released_script_score(row["per_type"]) == printed
    result = summarize(judged({name: [score] for name, score in row["per_type"].items()}))
    assert result["released_script_score"] == printed


def test_every_type_has_a_group() -> None:
    assert {kind: group({**CUBE, "type": kind}) for kind in GROUPS} == GROUPS
    assert set(GROUPS.values()) == set(imagine_bench.GROUP_WEIGHTS)


def test_figures_of_a_few_items() -> None:
    scores = judged({"Attribute shift": [4.0, 6.0, None], "Multi-Object": [8.0, 8.0]})
    result = summarize(scores)
    assert result["per_type"] == {"Attribute shift": 5.0, "Multi-Object": 8.0}
    assert result["imagine_bench"] == pytest.approx((3 * 5 + 2 * 8) / 5)
    assert result["per_dimension"] == dict.fromkeys(DIMENSIONS, pytest.approx((3 * 5 + 2 * 8) / 5))
    assert (result["num_items"], result["num_unscored"]) == (5, 1)
    low, high = result["confidence_interval"]
    assert 5.6 <= low < result["imagine_bench"] < high <= 6.8
    assert result["per_type_confidence_interval"]["Multi-Object"] == [8.0, 8.0]
    assert summarize(scores) == result


def test_a_group_without_scores_leaves_no_overall_score() -> None:
    result = summarize(judged({"Attribute shift": [4.0, 6.0], "Multi-Object": [None]}))
    assert (result["imagine_bench"], result["confidence_interval"]) == (None, None)
    assert result["per_type"] == {"Attribute shift": 5.0, "Multi-Object": None}


def test_strict_scores_never_have_the_official_name() -> None:
    result = summarize(judged({"Attribute shift": [4.0, 6.0]}), protocol="strict")
    assert result["imagine_bench_strict"] == 5.0
    assert result.keys().isdisjoint({"imagine_bench", "released_script_score"})
