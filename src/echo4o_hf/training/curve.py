"""A chart of losses or scores over steps, as a PNG: model cards do not show SVG.

The report's `chart` says where everything goes; here Pillow draws it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..report.chart import chart

SCALE = 2  # pixels per unit of the chart
SMOOTHING = 4  # drawn so much larger, then reduced
COLORS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700")
BACKGROUND, INK, RULE = "white", "#57606a", "#d0d7de"
FONT_SIZE = 12


def curve_picture(series: Sequence[Mapping[str, Any]], y_label: str) -> Image.Image:
    """Draw lines over steps.

    Args:
        series: each with `name`, `steps` and `values`; at least one point in all.
        y_label: what the values are.
    """
    where = chart(series)
    unit = SCALE * SMOOTHING
    picture = Image.new("RGB", (where["width"] * unit, where["height"] * unit), BACKGROUND)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE * unit)
    left, right = where["left"], where["width"] - where["right"]
    top, bottom = where["top"], where["height"] - where["bottom"]

    def line(points: Sequence[tuple[float, float]], color: str, width: float) -> None:
        scaled = [(x * unit, y * unit) for x, y in points]
        draw.line(scaled, color, round(width * unit), joint="curve")

    def text(x: float, y: float, content: str, anchor: str, color: str = INK) -> None:
        draw.text((x * unit, y * unit), content, color, font, anchor)

    for tick in where["y_ticks"]:
        line([(left, tick["at"]), (right, tick["at"])], RULE, 0.75)
        text(left - 6, tick["at"], tick["label"], "rm")
    for tick in where["x_ticks"]:
        text(tick["at"], bottom + 6, tick["label"], "ma")
    line([(left, bottom), (right, bottom)], INK, 1)
    text((left + right) / 2, where["height"] - 6, "step", "md")
    text(left + 4, top, y_label, "la")
    end = float(right)  # of the next name: below, where no line passes
    for place, drawn in enumerate(where["lines"]):
        color = COLORS[place % len(COLORS)]
        points = [(float(x), float(y)) for x, y in (point.split(",") for point in drawn["points"].split())]
        line(points, color, 1.75)
        for x, y in points if len(points) < 40 else ():
            draw.ellipse([(x - 2.5) * unit, (y - 2.5) * unit, (x + 2.5) * unit, (y + 2.5) * unit], color)
        text(end, where["height"] - 6, drawn["name"], "rd", color)
        end -= font.getlength(drawn["name"]) / unit + FONT_SIZE
    return picture.reduce(SMOOTHING)
