"""Clauses of the shapes world in words, and words back into clauses.

The vocabulary is closed: a caption reads "a picture of two red circles on the left and a blue star on the right".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from echo4o_hf.miniature.world import COLORS, SHAPES

COUNT_WORDS = ("one", "two", "three", "four")
REGIONS = ("left", "right", "above", "below")
SIZES = ("larger", "smaller")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
REGION_WORDS = {
    "left": ("on the left",),
    "right": ("on the right",),
    "above": ("at the top", "above"),
    "below": ("at the bottom", "below"),
}
MEDIA = ("photo", "picture", "image", "drawing")
ANY_SHAPE = "shape"  # the noun of a noisy caption that does not name the shape
_PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in (*SHAPES, ANY_SHAPE)}
_SINGULARS = {plural: shape for shape, plural in _PLURALS.items() if shape != ANY_SHAPE}


@dataclass(frozen=True)
class Clause:
    """One line of an item's `include`: so many objects of a class, with what else is asked of them."""

    class_name: str
    count: int
    color: str | None = None
    region: str | None = None
    size: str | None = None


def caption_for(
    clauses: Sequence[Clause], rng: np.random.Generator, omit: Sequence[frozenset[str]] | None = None
) -> str:
    """Word clauses in their order; `omit` holds, per clause, the names of the fields to leave unsaid."""
    omit = omit or [frozenset()] * len(clauses)
    groups = [_phrase(clause, rng, left_out) for clause, left_out in zip(clauses, omit, strict=True)]
    text = groups[0]
    if len(groups) == 2:
        text = " and ".join(groups)
    elif len(groups) > 2:
        text = ", ".join(groups[:-1]) + rng.choice([", and ", " and "]) + groups[-1]
    if rng.random() < 0.6:
        text = f"{_with_article(rng.choice(MEDIA))} of {text}"
    return text[0].upper() + text[1:] if rng.random() < 0.2 else text


def parse_caption(caption: str) -> tuple[Clause, ...] | None:
    """The clauses of a caption, in its order, or None when it is not in this world's wording."""
    text = caption.strip().lower().rstrip(".")
    text = re.sub(rf"^an? (?:{'|'.join(MEDIA)}) of ", "", text)
    clauses = [_parse_phrase(part) for part in re.split(r", and |, | and ", text)]
    complete = tuple(clause for clause in clauses if clause is not None)
    return complete if len(complete) == len(clauses) else None


def _phrase(clause: Clause, rng: np.random.Generator, omit: frozenset[str]) -> str:
    noun = ANY_SHAPE if "class_name" in omit else clause.class_name
    plural = clause.count > 1 or "count" in omit
    words = [_PLURALS[noun] if plural else noun]
    if clause.color and "color" not in omit:
        words.insert(0, clause.color)
    if clause.size and "size" not in omit:
        words.insert(0, clause.size)
    text = " ".join(words)
    if "count" not in omit:
        spelt_out = clause.count > 1 or rng.random() < 0.3
        text = f"{COUNT_WORDS[clause.count - 1]} {text}" if spelt_out else _with_article(text)
    if clause.region and "region" not in omit:
        text += " " + rng.choice(REGION_WORDS[clause.region])
    return text


def _with_article(text: str) -> str:
    return ("an " if text[0] in "aeiou" else "a ") + text


def _parse_phrase(text: str) -> Clause | None:
    regions = {words: region for region, ways in REGION_WORDS.items() for words in ways}
    match = re.fullmatch(
        rf"(?P<count>an?|{'|'.join(COUNT_WORDS)}) (?:(?P<size>{'|'.join(SIZES)}) )?(?:(?P<color>{'|'.join(COLORS)}) )?"
        rf"(?P<noun>[a-z]+)(?: (?P<region>{'|'.join(regions)}))?",
        text.strip(),
    )
    if match is None:
        return None
    noun = _SINGULARS.get(match["noun"], str(match["noun"]))
    if noun not in SHAPES:
        return None
    count = COUNT_WORDS.index(match["count"]) + 1 if match["count"] in COUNT_WORDS else 1
    return Clause(noun, count, match["color"], regions.get(match["region"] or ""), match["size"])
