"""What a judge's reply comes to, and the JSON that stands in replies.

A reply is text that anybody may have written: nothing here raises on it, and what cannot be read for certain is
unscored, with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Protocol = Literal["official", "strict"]
PROTOCOLS: tuple[Protocol, ...] = ("official", "strict")


@dataclass(frozen=True)
class Verdict:
    """The parsed reply of a judge on one image.

    Attributes:
        score: In the benchmark's unit; None when the reply gives none.
        reason: The judge's.
        parts: What the score is made of, by name.
        unscored: Why there is no score; None exactly when there is one.

    Raises:
        ValueError: both a score and a reason for its absence are given, or neither.
    """

    score: float | None
    reason: str = ""
    parts: Mapping[str, float | bool] = field(default_factory=dict)
    unscored: str | None = None

    def __post_init__(self) -> None:
        if (self.score is None) == (self.unscored is None):
            raise ValueError(f"a verdict has a score or says why not; got {self.score!r} and {self.unscored!r}")
        for name in ("reason", "unscored"):
            if isinstance(value := getattr(self, name), str):  # half a surrogate pair cannot be written as UTF-8
                object.__setattr__(self, name, value.encode("utf-8", "replace").decode("utf-8"))


def check_protocol(protocol: str) -> None:
    """Raise ValueError for a protocol that is not one."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}; got {protocol!r}")


def answer(reply: str) -> str:
    """The reply without the thinking that some models write in front of it; "" when it breaks off while thinking."""
    rest = reply.rpartition("</think>")[2]  # some templates put the opening tag into the prompt
    return "" if rest.lstrip().startswith("<think>") else rest


@dataclass(frozen=True)
class JsonPart:
    """One outermost object in a text: `value` when it is JSON; `cut` when it never closes; `listed` after a comma."""

    value: dict[str, Any] | None
    text: str
    cut: bool
    listed: bool


# A brace with a key behind it, as JSON, as a Python dict, with typographic quotes or with none.
_START = re.compile(r"\{\s*(?:[\"'“”‘’]|\w{1,40}\s*:)")
_REST = re.compile(r"[\w.+-]*+\s*")  # of a text that ends within a number or a word
_BRACE = re.compile(r"[{}]")
_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
_MOST_PARTS = 20  # after a cut: hostile text must not make the search quadratic


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A repeated key holds all its values, for neither is the answer."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        found[key] = [found[key], value] if key in found and found[key] != value else value
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, strict=False)


def json_parts(text: str) -> list[JsonPart]:
    """The outermost objects of a text, in order. What stands inside one that is cut off or broken is none."""
    parts: list[JsonPart] = []
    position = 0
    while match := _START.search(text, position):
        start = match.start()
        listed = bool(parts) and text[position:start].strip() == ","
        value: dict[str, Any] | None = None
        end: int | None
        try:
            value, end = _DECODER.raw_decode(text, start)
        except json.JSONDecodeError as error:
            # When the text runs out, a brace before may be a string's or an inner object's.
            ran_out = error.msg.startswith("Unterminated string") or _REST.fullmatch(text, error.pos)
            end = None if ran_out else _closing(text, start)
        except (ValueError, RecursionError):  # a number of thousands of digits, objects in thousands of objects
            end = _closing(text, start)
        parts.append(JsonPart(value, text[start:end], cut=end is None, listed=listed))
        if end is None:
            # A code block that ends, ends what it holds.
            fence = _FENCE.search(text, start)
            if fence is None or len(parts) > _MOST_PARTS:
                break
            end = fence.end()
        position = end
    return parts


def _closing(text: str, start: int) -> int | None:
    """Where the brace at `start` closes, strings not looked at: the text is not JSON."""
    depth = 0
    for brace in _BRACE.finditer(text, start):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return brace.end()
    return None


def plain_key(key: str) -> str:
    """A JSON key as it is compared: lower case, words apart, no markdown, no "(0-10)" and no "score" behind it."""
    if len(key) > 100:  # hostile text
        return key
    words = re.sub(r"\([^)]*\)", " ", key).replace("_", " ").replace("-", " ").replace("*", " ").casefold().split()
    return " ".join(words[:-1] if words[1:] and words[-1] in ("score", "rating") else words)


_WRAPPERS = {"answer", "evaluation", "judgement", "judgment", "output", "response", "result", "scores", "verdict"}


def unwrapped(value: dict[str, Any]) -> dict[str, Any]:
    """The inner object of one like {"result": {...}}, else the object; keys as `plain_key` writes them."""
    plain = {plain_key(key): inner for key, inner in value.items()}
    if len(plain) < len(value):  # two keys that read the same: neither is the answer
        plain |= {
            key: [inner for other, inner in value.items() if plain_key(other) == key]
            for key in plain
            if sum(plain_key(other) == key for other in value) > 1
        }
    ((name, inner),) = plain.items() if len(plain) == 1 else (("", None),)
    return unwrapped(inner) if name in _WRAPPERS and isinstance(inner, dict) else plain


_YES = {"1", "1.0", "true", "yes"}
_NO = {"0", "0.0", "false", "no"}


def yes_or_no(value: object) -> bool | None:
    """1, true, "1", "true", "yes" and their opposites; None for everything else."""
    if not isinstance(value, bool | int | float | str):
        return None
    text = str(value).strip(" \t\r\n*_`.").casefold()
    return True if text in _YES else False if text in _NO else None


def reason_text(value: object) -> str:
    """A reason as text, whatever the judge put there."""
    if value is None:
        return ""
    return value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


_REFUSAL = re.compile(r"\b(?:sorry|apolog\w+|cannot|can't|can’t|unable|not able|refuse|decline|against\W+my)\b", re.I)


def no_verdict(reply: str, expected: str) -> str:
    """Why a reply without a readable verdict is unscored."""
    text = answer(reply)
    if not text.strip():
        return "the reply is empty" if not reply.strip() else "the reply broke off while thinking"
    if any(part.cut for part in json_parts(text)):
        return f"the reply is cut off: {_short(text)}"
    if _REFUSAL.search(text):
        return f"the judge refused: {_short(text)}"
    return f"no {expected} in the reply: {_short(text)}"


def _short(text: str, length: int = 120) -> str:
    flat = " ".join(text[: 4 * length].split())
    return flat if len(flat) <= length else flat[:length] + " …"
