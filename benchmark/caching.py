"""Step caching (`pipe.enable_cache`): how much faster, and how far from the exact pictures.

    python benchmark/caching.py --updates 20 --threads 1

Quality is that of `echo4o-miniature` on the 140 items of Shapes-140, each setting from the noise of the exact run: the
score, how many of its verdicts differ, the mean distance of pixel values (0 to 255) and the median PSNR in dB. Fewer
updates save evaluations too, so they are in the table. Speed is also that of the random model of `inference.py`, whose
updates are all guided and whose pictures mean nothing.

Seconds are of the CPU, summed over threads, from the prompt to the decoded picture, or with the random model to the
latents. All settings are measured in turns in one process. An evaluation is that of one branch of guidance of one
image.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import inference
import numpy as np
import torch
from diffusers import TaylorSeerCacheConfig
from random_model import make_pipeline, small_config

from echo4o_hf.miniature.items import Item, load_items
from echo4o_hf.miniature.judge import verdict
from echo4o_hf.miniature.scoring import BATCH_SIZE, GUIDANCE_SCALE
from echo4o_hf.pipeline.pipeline_echo4o import Echo4oPipeline


@dataclass
class Run:
    """A setting, and what it gave.

    Attributes:
        config: of the cache; None is none.
        updates: of each image.
        seconds: of each turn.
        evaluations: of all images.
        pictures: (height, width, 3), 0 to 255.
        correct: the verdict on each picture.
    """

    config: TaylorSeerCacheConfig | None
    updates: int
    seconds: list[float] = field(default_factory=list)
    evaluations: int = 0
    pictures: list[np.ndarray] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)


def intervals(updates: int) -> dict[str, Run]:
    """The exact run and caches that evaluate one update of two, three, four."""
    configs = {
        f"interval {interval}": TaylorSeerCacheConfig(
            interval, disable_cache_before_step=1, taylor_factors_dtype=torch.float32
        )
        for interval in (2, 3, 4)
    }
    return {f"{updates} updates, exact": Run(None, updates)} | {
        name: Run(one, updates) for name, one in configs.items()
    }


def settings(updates: int) -> dict[str, Run]:
    """Those, variants of interval 2, and exact runs of fewer updates."""
    runs = intervals(updates)
    second = runs["interval 2"].config
    assert second is not None
    configs = {
        "interval 2, order 0": replace(second, max_order=0),
        "interval 2, order 2": replace(second, max_order=2),
        "interval 2, bfloat16": replace(second, taylor_factors_dtype=torch.bfloat16),
        "interval 2, last 3 updates exact": replace(second, disable_cache_after_step=updates - 3),
        "diffusers' defaults": TaylorSeerCacheConfig(),
    }
    fewer = {f"{count} updates, exact": Run(None, count) for count in (-(-updates // 2), -(-updates // 3))}
    return runs | {name: Run(config, updates) for name, config in configs.items()} | fewer


def take_turn(pipe: Echo4oPipeline, run: Run, draw: Callable[[], Any]) -> Any:
    """What `draw` gives with a run's setting; seconds and evaluations are added to the run."""

    def count(_: torch.nn.Module, hidden: tuple[torch.Tensor]) -> None:
        run.evaluations += len(hidden[0])

    pipe.disable_cache()
    if run.config is not None:
        pipe.enable_cache(run.config)
    with pipe.model.llm2vae.register_forward_pre_hook(count):
        start = time.process_time()
        drawn = draw()
        run.seconds.append(time.process_time() - start)
    return drawn


def draw_items(pipe: Echo4oPipeline, runs: dict[str, Run], items: Sequence[Item]) -> None:
    """Draw and judge all items with all settings, from the noise of `draw_and_score`."""
    for start in range(0, len(items), BATCH_SIZE):
        batch = items[start : start + BATCH_SIZE]
        for run in runs.values():
            call = partial(
                pipe,
                [item.prompt for item in batch],
                num_inference_steps=run.updates,
                guidance_scale=GUIDANCE_SCALE,
                generator=[torch.Generator().manual_seed(start + index) for index in range(len(batch))],
            )
            pictures = take_turn(pipe, run, call).images
            run.pictures += [np.asarray(picture, dtype=np.float64) for picture in pictures]
            run.correct += [verdict(item, picture).correct for item, picture in zip(batch, pictures, strict=True)]


def draw_random(pipe: Echo4oPipeline, runs: dict[str, Run], size: inference.Size, repeats: int) -> None:
    """Draw one image with all settings, `repeats` times; a first round warms up and is dropped."""
    for repetition in range(repeats + 1):
        for run in runs.values():
            take_turn(pipe, run, inference.draw(pipe, replace(size, updates=run.updates)))
            if not repetition:
                run.seconds, run.evaluations = [], 0


def psnr(picture: np.ndarray, exact: np.ndarray) -> float:
    """In dB; infinite for equal pictures."""
    error = float(((picture - exact) ** 2).mean())
    return 10 * np.log10(255**2 / error) if error else float("inf")


def print_quality(runs: dict[str, Run]) -> None:
    """A table of speed and quality."""
    exact = next(iter(runs.values()))
    images = len(exact.pictures)
    print("| | evaluations per image | times faster | score | verdicts changed | pixel distance | PSNR, median |")
    print("|---|---|---|---|---|---|---|")
    for name, run in runs.items():
        pairs = list(zip(run.pictures, exact.pictures, strict=True))
        changed = sum(one != other for one, other in zip(run.correct, exact.correct, strict=True))
        distance = statistics.fmean(float(abs(one - other).mean()) for one, other in pairs)
        ratio = f"{sum(exact.seconds) / sum(run.seconds):.2f}"
        figures = [f"{run.evaluations / images:.4g}", ratio, f"{sum(run.correct) / images:.3f}", f"{changed}"]
        figures += [f"{distance:.2f}", f"{statistics.median(psnr(*pair) for pair in pairs):.1f}"]
        print(f"| {name} | " + " | ".join(figures) + " |")


def print_speed(runs: dict[str, Run]) -> None:
    """A table of speed alone: ratios of neighbouring turns."""
    exact = next(iter(runs.values()))
    print("| | evaluations per image | CPU seconds, minimum | median | times faster, median | quartiles |")
    print("|---|---|---|---|---|---|")
    for name, run in runs.items():
        low, median, high = np.quantile(np.array(exact.seconds) / np.array(run.seconds), [0.25, 0.5, 0.75])
        figures = [run.evaluations / len(run.seconds), min(run.seconds), statistics.median(run.seconds), median]
        shown = " | ".join(f"{figure:.3g}" for figure in figures)
        print(f"| {name} | {shown} | {low:.3g} to {high:.3g} |")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--updates", type=int, default=20, help="of the miniature")
    parser.add_argument("--every", type=int, default=1, help="2: only every second item, and so on")
    parser.add_argument("--repeats", type=int, default=5, help="of the random model; 0 leaves it out")
    parser.add_argument("--tiny", action="store_true", help="only shows that the script runs")
    arguments = parser.parse_args(argv)
    if arguments.updates < 4 or arguments.every < 1 or arguments.repeats < 0:
        parser.error("--updates must be at least 4, --every at least 1, --repeats at least 0")
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, float32, {arguments.threads} threads\n")

    pipe = Echo4oPipeline.from_pretrained("echo4o-miniature", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe("a first call warms up", num_inference_steps=1)
    runs = settings(arguments.updates)
    items = load_items()[:: 70 if arguments.tiny else arguments.every]
    draw_items(pipe, runs, items)
    print(f"echo4o-miniature, {len(items)} items\n")
    print_quality(runs)

    if arguments.repeats:
        size = inference.TINY if arguments.tiny else inference.FULL
        pipe = make_pipeline(
            small_config(*size.model, max_latent_size=size.side), vae_channels=(8, 8, 8, 8), vae_layers=1
        )
        runs = intervals(4 if arguments.tiny else size.updates)
        draw_random(pipe, runs, size, arguments.repeats)
        print(f"\n{size}\n")
        print_speed(runs)


if __name__ == "__main__":
    main()
