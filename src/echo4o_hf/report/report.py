"""Results to one self-contained HTML page: scores, pictures with verdicts, loss curves, times.

The results hold nothing but JSON; every key is required:

    {
      "title": "Demo", "created": "2026-11-21 18:00", "seconds": {"fine-tuning": 181.5},
      "tags": ["counting", "color_attr"],                       # in the order of the table
      "runs": [{
        "name": "bagel-miniature",
        "score": 0.31, "per_tag": {"counting": 0.35, "color_attr": null},          # null: unscored
        "num_items": 140, "confidence_interval": [0.24, 0.39],                      # or null
        "items": [{"prompt": "two red circles", "tag": "counting",
                   "image": "images/0.png",                     # below the folder of the results
                   "correct": true, "reason": "one circle"}]    # true | false | null: unscored
      }],
      "losses": [{"name": "fine-tuning", "steps": [0, 10], "values": [0.9, 0.7]}]
    }
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

THUMBNAIL = 512  # pixels: larger pictures are scaled down to this
CHART = {"width": 640, "height": 270, "left": 52, "right": 12, "top": 12, "bottom": 46}  # SVG units

_KEYS = {
    "results": ("title", "created", "seconds", "tags", "runs", "losses"),
    "run": ("name", "score", "per_tag", "num_items", "confidence_interval", "items"),
    "item": ("prompt", "tag", "image", "correct", "reason"),
    "loss": ("name", "steps", "values"),
}


def write_report(results: Mapping[str, Any], output: Path, folder: Path | None = None) -> None:
    """Write the page, pictures included, to `output`.

    Args:
        results: as in the module's docstring.
        output: the HTML file.
        folder: where the picture paths start, that is the folder of results.json; by default that of `output`.

    Raises:
        ValueError: the results do not fit their schema, or name a picture outside `folder`.
        OSError: a picture is missing or does not decode.
    """
    check_results(results)
    environment = Environment(
        loader=PackageLoader("echo4o_hf.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["score"] = _format_score
    page = environment.get_template("report.html.jinja").render(
        results=results,
        unscored=[sum(item["correct"] is None for item in run["items"]) for run in results["runs"]],
        cards=_cards(results, output.parent if folder is None else folder),
        chart=_chart(results["losses"]) if results["losses"] else None,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{output.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, output)


def check_results(results: Mapping[str, Any]) -> None:
    """Compare results with the schema in the module's docstring.

    Raises:
        ValueError: names the place and what is wrong there.
    """
    _require(results, "results", "the results")
    for r, run in enumerate(results["runs"]):
        _require(run, "run", f"runs[{r}]")
        for tag in run["per_tag"]:
            _check_tag(tag, results["tags"], f"runs[{r}].per_tag")
        for i, item in enumerate(run["items"]):
            _require(item, "item", f"runs[{r}].items[{i}]")
            _check_tag(item["tag"], results["tags"], f"runs[{r}].items[{i}].tag")
            if item["correct"] not in (True, False, None):
                raise ValueError(f"runs[{r}].items[{i}].correct must be true, false or null, got {item['correct']!r}")
    for n, loss in enumerate(results["losses"]):
        _require(loss, "loss", f"losses[{n}]")
        if not loss["steps"] or len(loss["steps"]) != len(loss["values"]):
            raise ValueError(f"losses[{n}] has {len(loss['steps'])} steps and {len(loss['values'])} values")
        if not all(map(math.isfinite, loss["values"])):
            raise ValueError(f"losses[{n}].values must be finite")


def _require(part: Mapping[str, Any], kind: str, where: str) -> None:
    if missing := [key for key in _KEYS[kind] if key not in part]:
        raise ValueError(f"{where} must have {', '.join(map(repr, missing))}")


def _check_tag(tag: str, tags: Sequence[str], where: str) -> None:
    if tag not in tags:
        raise ValueError(f"{where} has {tag!r}, which is not one of the tags {list(tags)}")


def _format_score(score: float | None) -> str:
    return "–" if score is None else f"{score:.3f}"


def _cards(results: Mapping[str, Any], folder: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Tag -> prompt -> the pictures of all runs, each with its run's name."""
    cards: dict[str, dict[str, list[dict[str, Any]]]] = {tag: {} for tag in results["tags"]}
    for run in results["runs"]:
        for item in run["items"]:
            picture = {**item, "run": run["name"], **_embed(item["image"], folder)}
            cards[item["tag"]].setdefault(item["prompt"], []).append(picture)
    return cards


def _embed(name: str, folder: Path) -> dict[str, Any]:
    """A picture as a PNG data URL, with its size in pixels."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"picture {name!r} lies outside {str(folder)!r}")
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"picture {name!r} of the results is not in {str(folder)!r}") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f"picture {str(path)!r} does not decode: {error}") from error
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    png = io.BytesIO()
    image.save(png, format="PNG", optimize=True)
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode('ascii')}"
    return {"url": url, "width": image.width, "height": image.height}


def _chart(losses: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where the template draws the axes' ticks and each loss's line, in SVG units."""
    x_low, x_high = _range([step for loss in losses for step in loss["steps"]])
    y_low, y_high = _range([value for loss in losses for value in loss["values"]])
    plot_width = CHART["width"] - CHART["left"] - CHART["right"]
    plot_height = CHART["height"] - CHART["top"] - CHART["bottom"]

    def x(step: float) -> float:
        return round(CHART["left"] + (step - x_low) / (x_high - x_low) * plot_width, 1)

    def y(value: float) -> float:
        return round(CHART["top"] + (y_high - value) / (y_high - y_low) * plot_height, 1)

    lines = [
        {
            "name": loss["name"],
            "points": " ".join(
                f"{x(step)},{y(value)}" for step, value in zip(loss["steps"], loss["values"], strict=True)
            ),
        }
        for loss in losses
    ]
    x_ticks = [{"at": x(step), "label": f"{step:g}"} for step in _ticks(x_low, x_high)]
    y_ticks = [{"at": y(value), "label": f"{value:g}"} for value in _ticks(y_low, y_high)]
    return {**CHART, "lines": lines, "x_ticks": x_ticks, "y_ticks": y_ticks}


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """The multiples of 1, 2 or 5 times a power of ten in the range: two to six of them."""
    power = 10 ** math.floor(math.log10(high - low))
    unit = next(unit for unit in (0.2 * power, 0.5 * power, power, 2 * power) if (high - low) / unit <= 5)
    first, last = math.ceil(low / unit), math.floor(high / unit)
    return [round(n * unit, 12) for n in range(first, last + 1)]
