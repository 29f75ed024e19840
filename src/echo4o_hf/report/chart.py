"""Loss curves, in SVG units."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

CHART = {"width": 640, "height": 270, "left": 52, "right": 12, "top": 12, "bottom": 46}  # SVG units


def chart(losses: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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
