"""What stands as JSON in a text that anybody may have written."""

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo4o_hf.benchmarks.verdict import Verdict, answer, check_protocol, json_parts, no_verdict, unwrapped, yes_or_no


def values(text: str) -> list[Any]:
    return [part.value for part in json_parts(text)]


def test_a_verdict_has_a_score_or_says_why_not() -> None:
    assert Verdict(0.0).unscored is None
    assert Verdict(None, unscored="no image").score is None
    for score, unscored in ((None, None), (1.0, "refused")):
        with pytest.raises(ValueError, match="has a score or says why not"):
            Verdict(score, unscored=unscored)


def test_a_verdict_can_be_written_as_utf_8() -> None:
    assert Verdict(1.0, "half \ud800 a pair").reason == "half ? a pair"
    assert Verdict(None, unscored="\udfff").unscored == "?"


def test_protocols() -> None:
    check_protocol("strict")
    with pytest.raises(ValueError, match="must be one of official, strict; got 'Official'"):
        check_protocol("Official")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no braces", []),
        ("the set {1, 2} and { } and }{", []),
        ('{"a": 1}', [{"a": 1}]),
        ('x {"a": {"b": "}"}} y {"c": 2}', [{"a": {"b": "}"}}, {"c": 2}]),
        ('{"a": "two\nlines"}', [{"a": "two\nlines"}]),
        ('{"a": 1, "a": 0}', [{"a": [1, 0]}]),
        ('{"a": 1,} {"b": 2}', [None, {"b": 2}]),
        ("{'a': 1}", [None]),
        ("{a: 1}", [None]),
        ('{"a": {"b": 1}', [None]),
        ('{"a": "cut off {"b": 1}', [None]),
        ('```json\n{"a": "cut\n```\nagain\n```json\n{"b": 1}\n```', [None, {"b": 1}]),
        ('{"a": ' + "1" * 5000 + "}", [None]),
    ],
)
def test_outermost_objects(text: str, expected: list[Any]) -> None:
    assert values(text) == expected


def test_cut_and_listed() -> None:
    assert [part.cut for part in json_parts('{"a": 1} {"b": "')] == [False, True]
    assert [part.listed for part in json_parts('[{"a": 1}, {"a": 2}] {"a": 3}')] == [False, True, False]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='{}[]"\\:,`\n a1', max_size=60))
def test_any_text_has_parts_that_are_in_it(text: str) -> None:
    for part in json_parts(text):
        assert part.text in text
        assert part.value is None or json.loads(part.text, strict=False) is not None


@pytest.mark.parametrize(
    "text",
    ['{"a":' * 50_000, '{"a\n```\n' * 20_000, '{"a"}' * 5_000, '{"' + " " * 100_000, '{"' + "(" * 100_000 + '":1}'],
)
def test_hostile_text_takes_no_time(text: str) -> None:
    start = time.process_time()
    for part in json_parts(text):
        if part.value:
            unwrapped(part.value)
    assert time.process_time() - start < 2


def test_thinking_is_no_answer() -> None:
    assert answer("<think>1</think>2") == answer("1</think>2") == "2"
    assert answer("\n<think>1") == ""
    assert answer("reason: <think> is written here") == "reason: <think> is written here"


def test_unwrapped() -> None:
    assert unwrapped({"Result": {"Correct": 1}}) == {"correct": 1}
    assert unwrapped({"reason": {"correct": 1}}) == {"reason": {"correct": 1}}
    assert unwrapped({"correct": 1, "Correct": 0}) == {"correct": [1, 0]}
    assert unwrapped({"**Fantasy_Fulfillment** (0–10)": 1, "aesthetic-quality score": 2}) == {
        "fantasy fulfillment": 1,
        "aesthetic quality": 2,
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, True),
        (0, False),
        (True, True),
        (1.0, True),
        ("1", True),
        (" Yes. ", True),
        ("**no**", False),
        ("FALSE", False),
    ]
    + [(value, None) for value in (2, -1, 0.5, None, "", "maybe", "10", [1], {"a": 1}, float("nan"))],
)
def test_yes_or_no(value: object, expected: bool | None) -> None:
    assert yes_or_no(value) is expected


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (" \n", "the reply is empty"),
        ("<think>The image", "the reply broke off while thinking"),
        ("I'm sorry, but I can't judge this.", "the judge refused: I'm sorry"),
        ('{"correct": 1, "reas', "the reply is cut off: "),
        ("A nice picture. " * 100, "no verdict in the reply: A nice picture."),
    ],
)
def test_why_there_is_no_verdict(reply: str, reason: str) -> None:
    assert no_verdict(reply, "verdict").startswith(reason)
    assert len(no_verdict(reply, "verdict")) < 200
