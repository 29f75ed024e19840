"""Draw the items of Shapes-140 with a pipeline and have the shapes judge score the pictures."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from echo4o_hf.benchmarks import geneval_pp
from echo4o_hf.benchmarks.items import items_sha256
from echo4o_hf.benchmarks.results import SCHEMA_VERSION
from echo4o_hf.benchmarks.verdict import Verdict
from echo4o_hf.miniature.items import Item
from echo4o_hf.miniature.judge import verdict
from echo4o_hf.pipeline.pipeline_echo4o import Echo4oPipeline

BATCH_SIZE = 35
STEPS = 20
GUIDANCE_SCALE = 3.0
BENCHMARK = "shapes_140"  # in results


def draw_and_score(
    pipeline: Echo4oPipeline,
    items: Sequence[Item],
    folder: Path,
    name: str,
    seed: int = 0,
    on_picture: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """One picture per item, saved below `folder`, and the results as `echo4o evaluate` gives them.

    Args:
        pipeline: Draws.
        items: Questions; each gets noise of its own, whatever the batch.
        folder: Pictures go to `folder / name`.
        name: Of the run.
        seed: Of the noise.
        on_picture: Called with the number of pictures that were just drawn.

    Returns:
        Results of the benchmark `shapes_140`, with paths relative to `folder`.
    """
    pipeline.set_progress_bar_config(disable=True)
    (folder / name).mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    verdicts: list[Verdict] = []
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
            verdicts.append(Verdict(float(judged.correct), judged.reason))
            sha256 = hashlib.sha256((folder / path).read_bytes()).hexdigest()
            image = {"path": path.as_posix(), "sha256": sha256, "verdict": asdict(verdicts[-1]), "judgements": []}
            rows.append(_row(len(rows), item, image))
        on_picture(len(batch))
    return _results(rows, verdicts, seed)


def _row(place: int, item: Item, image: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": place,
        "group": item.tag,
        "prompt": item.prompt,
        "item": {"tag": item.tag, "prompt": item.prompt},
        "checklist": None,
        "images": [image],
    }


def _results(rows: list[dict[str, Any]], verdicts: list[Verdict], seed: int) -> dict[str, Any]:
    """Results in the schema of `echo4o evaluate`; the arithmetic is GenEval++'s, as the tags are."""
    items = [row["item"] for row in rows]
    scores = geneval_pp.summarize([(item, [one]) for item, one in zip(items, verdicts, strict=True)])
    usage = {"calls": len(rows), "from_store": 0, "failures": 0}
    cost = dict.fromkeys(("input_tokens", "output_tokens", "prices", "cost", "total_cost"))
    return {
        "schema_version": SCHEMA_VERSION,
        "benchmark": BENCHMARK,
        "protocol": "official",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "software": {"echo4o-hf": version("echo4o-hf")},
        "items_sha256": items_sha256(items),
        "texts_sha256": None,  # its judge is code
        "repeats": 1,
        "deviations": [],
        "judges": [{"name": "shapes", "parameters": {}, **usage, **cost}],
        "scores": {BENCHMARK: scores.pop(geneval_pp.NAME), **scores},
        "per_judge": {},
        "agreement": None,
        "self_agreement": None,
        "items": rows,
    }
