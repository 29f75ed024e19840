"""Draw the items of Shapes-140 with a pipeline and have the shapes judge score the pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest

from echo4o_hf.miniature.items import TAGS, Item
from echo4o_hf.miniature.judge import verdict
from echo4o_hf.pipeline.pipeline_echo4o import Echo4oPipeline

BATCH_SIZE = 35
STEPS = 20
GUIDANCE_SCALE = 3.0


def draw_and_score(
    pipeline: Echo4oPipeline,
    items: Sequence[Item],
    folder: Path,
    name: str,
    seed: int = 0,
    on_picture: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """One picture per item, saved below `folder`, and the score as `report` shows it.

    Args:
        pipeline: Draws.
        items: Questions; each gets noise of its own, whatever the batch.
        folder: Pictures go to `folder / name`.
        name: Of the run.
        seed: Of the noise.
        on_picture: Called with the number of pictures that were just drawn.

    Returns:
        `name`, `score` (mean of the tags' scores), `per_tag`, `num_items`, `confidence_interval` (Wilson, 95 %) and
        `items`, with paths relative to `folder`.
    """
    pipeline.set_progress_bar_config(disable=True)
    (folder / name).mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(items), BATCH_SIZE):
        batch = items[start : start + BATCH_SIZE]
        generators = [torch.Generator().manual_seed(seed * 1000 + start + index) for index in range(len(batch))]
        pictures = pipeline(
            [item.prompt for item in batch],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=generators,
            return_dict=False,
        )[0]
        for item, picture in zip(batch, pictures, strict=True):
            path = Path(name) / f"{len(rows):03d}.png"
            partial = folder / path.with_suffix(".partial")
            picture.save(partial, "PNG")
            os.replace(partial, folder / path)
            judged = verdict(item, picture)
            row = {"prompt": item.prompt, "tag": item.tag, "image": path.as_posix()}
            rows.append({**row, "correct": judged.correct, "reason": judged.reason})
        on_picture(len(batch))
    return {"name": name, **_score(rows), "items": rows}


def _score(rows: list[dict[str, Any]]) -> dict[str, Any]:
    per_tag: dict[str, float] = {}
    for tag in TAGS:
        correct = [row["correct"] for row in rows if row["tag"] == tag]
        if correct:
            per_tag[tag] = sum(correct) / len(correct)
    interval = binomtest(sum(row["correct"] for row in rows), len(rows)).proportion_ci(method="wilson")
    return {
        "score": sum(per_tag.values()) / len(per_tag),
        "per_tag": per_tag,
        "num_items": len(rows),
        "confidence_interval": [interval.low, interval.high],
    }
