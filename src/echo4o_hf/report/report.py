"""Results to one self-contained HTML page: scores, comparisons, agreement, and every picture with its verdict.

The page loads nothing: pictures are thumbnails inside it, and its only script, which filters the gallery, and its
style are allowed by their hashes. Whatever comes from results stays text.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from echo4o_hf.report.chart import chart
from echo4o_hf.report.pictures import Thumbnail, thumbnail
from echo4o_hf.report.runs import Comparison, Published, Run, Section, sections, state, visible

SIDES = {400: 512, 10**9: 320}  # up to so many pictures: pixels of a thumbnail's longer side
LONGEST = 4000  # characters of a reply that are shown
FAR = {1.0: 0.5, 10.0: 3.0}  # by the highest score: scores that are as far apart are said to differ


def write_report(
    runs: Sequence[Run],
    output: Path,
    *,
    title: str,
    published: Published | None = None,
    comparisons: Sequence[Comparison] = (),
    losses: Sequence[Mapping[str, Any]] = (),
    seconds: Mapping[str, float] | None = None,
) -> list[str]:
    """Write the page.

    Args:
        runs: Those with the same benchmark, protocol and items stand side by side.
        output: The HTML file.
        title: Of the page.
        published: Rows of the literature, by the questions that they answer.
        comparisons: Of pairs of `runs`.
        losses: Curves, as {"name", "steps", "values"}.
        seconds: What took how long.

    Returns:
        Why pictures are not shown, one text for each such picture that was judged.

    Raises:
        ValueError: the runs do not fit together, or do not fit their schema.
        OSError: the page cannot be written.
    """
    parts = sections(runs, published, comparisons)
    environment = Environment(
        loader=PackageLoader("echo4o_hf.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters["shorten"] = _shorten
    try:
        galleries = _galleries(parts)
        page = environment.get_template("report.html.jinja").render(
            title=title,
            sections=[(section, _ranking(section), cards) for section, cards in zip(parts, galleries, strict=True)],
            counts=[Counter(name for card in cards for name in card["states"]) for cards in galleries],
            unscored=[_unscored(section, cards) for section, cards in zip(parts, galleries, strict=True)],
            chart=chart(losses) if losses else None,
            seconds=seconds or {},
            **_inline(environment),
        )
    except (KeyError, TypeError, UndefinedError) as error:
        raise ValueError(f"the results do not fit their schema: {error!r}") from error
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, output)
    return [
        image["thumbnail"].problem
        for cards in galleries
        for card in cards
        for entry in card["entries"]
        for image in entry["images"]
        if image["thumbnail"].problem and image["sha256"] is not None
    ]


def _inline(environment: Environment) -> dict[str, Markup]:
    """Style and script, and the policy that allows them by their hashes and nothing else but inline pictures."""
    texts = {name: environment.get_template(f"{name}.jinja").render() for name in ("style.css", "filter.js")}
    hashes = {
        name: base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
        for name, text in texts.items()
    }
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes['style.css']}'; "
        f"script-src 'sha256-{hashes['filter.js']}'; base-uri 'none'; form-action 'none'"
    )
    return {"style": Markup(texts["style.css"]), "script": Markup(texts["filter.js"]), "policy": Markup(policy)}


def _ranking(section: Section) -> list[Any]:
    """All rows, the best first, those without a score last."""
    rows = [*section.rows, *section.published]
    return sorted(rows, key=lambda row: -1.0 if row.overall.value is None else row.overall.value, reverse=True)


def _galleries(parts: Sequence[Section]) -> list[list[dict[str, Any]]]:
    """Of each section a card for each item, with the pictures of all runs."""
    pictures = [
        (image, run.folder)
        for section in parts
        for run in section.runs
        for item in run.results["items"]
        for image in item["images"]
    ]
    side = next(side for most, side in SIDES.items() if len(pictures) <= most)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        thumbnails = list(threads.map(lambda picture: thumbnail(picture[0], picture[1], side), pictures))
    of_image = {id(image): found for (image, _), found in zip(pictures, thumbnails, strict=True)}
    return [_cards(section, of_image) for section in parts]


def _cards(section: Section, thumbnails: Mapping[int, Thumbnail]) -> list[dict[str, Any]]:
    by_id = [{item["id"]: item for item in run.results["items"]} for run in section.runs]
    cards = []
    for name, item in by_id[0].items():
        entries = [
            {
                "run": place,
                "name": run.name,
                "images": [_image(section, image, thumbnails[id(image)]) for image in items[name]["images"]],
            }
            for place, (run, items) in enumerate(zip(section.runs, by_id, strict=True))
        ]
        cards.append(
            {
                "id": name,
                "group": item["group"],
                "prompt": item["prompt"],
                "checklist": item["checklist"] or item["item"].get("note"),
                "entries": entries,
                "states": _states(section, entries),
            }
        )
    return cards


def _image(section: Section, image: Mapping[str, Any], found: Thumbnail) -> dict[str, Any]:
    return {**image, "thumbnail": found, "state": state(section, image["verdict"]["score"])}


def _states(section: Section, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the gallery's filter finds a card by."""
    images = [image for entry in entries for image in entry["images"]]
    states = list(dict.fromkeys(image["state"] for image in images))
    means = [_mean([image["verdict"]["score"] for image in entry["images"]]) for entry in entries]
    of_judges = [[judgement["score"] for judgement in image["judgements"]] for image in images]
    if _differ(section, means):
        states.append("models")
    if any(_differ(section, scores) for scores in of_judges):
        states.append("judges")
    return states


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else None


def _differ(section: Section, scores: Sequence[float | None]) -> bool:
    known = [score for score in scores if score is not None]
    return len(known) > 1 and max(known) - min(known) >= FAR[section.maximum]


def _unscored(section: Section, cards: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[Any]]]:
    """Run, why there is no score, and the ids of the items, the most frequent first."""
    found: dict[tuple[str, str], list[Any]] = {}
    for card in cards:
        for entry in card["entries"]:
            for why in dict.fromkeys(image["verdict"]["unscored"] for image in entry["images"]):
                if why is not None:
                    found.setdefault((entry["name"], why), []).append(card["id"])
    return [(name, why, ids) for (name, why), ids in sorted(found.items(), key=lambda pair: -len(pair[1]))]


def _shorten(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]} … and {len(text) - LONGEST} more characters"
