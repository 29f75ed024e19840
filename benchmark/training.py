"""Speed of training on a CPU: tokens per second, how full packs are, what loading data and the latent cache change.

    python benchmark/training.py --threads 2 --repeats 5
    python benchmark/training.py --gpu --output training.jsonl   # instead: the published sizes, on a card of 80 GB

All times that are compared are measured in turns in one process. Steps are forward and backward passes, without an
optimizer, of a model with random weights: so the shares of all else are upper bounds.

1. A pack of 1024 tokens against bare products of the arithmetic that it needs (`random_model.pack_products`), for each
   method of training.
2. Rows as in Echo-4o-Image (`mixture`) planned into packs at the published sizes.
3. The same mixture at a quarter of the sides, with its files at their full size: seconds for loading (rows, decoding,
   packing), for the VAE, and for the steps, without the cache and with it. The VAE is the published one at a
   sixteenth of its width, so that it has about the share of a step's arithmetic that it has at the published sizes.
   Loading is in the same process as the rest: workers would hide it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import datasets
import gpu
import torch
import training_gpu
from inference import FULL, TINY, Size, interleave, multiply
from mixture import black, blurred, mixed_rows
from random_model import flops, make_pipeline, make_processor, pack_products, small_config, training_pack
from torch import nn

from echo4o_hf.model.configuration_bagel import BagelConfig
from echo4o_hf.model.packing import PADDING
from echo4o_hf.pipeline.pipeline_echo4o import Echo4oPipeline
from echo4o_hf.training.arguments import Echo4oTrainingArguments
from echo4o_hf.training.collator import PackCollator
from echo4o_hf.training.latents import LatentEncoder, LatentStore, precompute, vae_id
from echo4o_hf.training.packs import EagerPacks, plan_packs
from echo4o_hf.training.parameters import prepare_model
from echo4o_hf.training.samples import SampleBuilder, training_sizes
from echo4o_hf.training.train import default_max_tokens
from echo4o_hf.training.trainer import NOT_FOR_THE_MODEL

METHODS = ("full", "generation", "lora")
Row = tuple[str, ...]


@dataclass(frozen=True)
class Amount:
    """How much is measured."""

    size: Size
    planned: int  # rows that are packed at the published sizes
    rows: int  # of the smaller mixture
    packs: int  # of these rows, how many are trained on
    max_tokens: int  # of these packs
    vision: int  # patches along one side of a reference
    vae: tuple[int, ...]  # channels


ALL = Amount(FULL, planned=20_000, rows=60, packs=5, max_tokens=30_720 // 16, vision=9, vae=(8, 16, 32, 32))
SOME = Amount(TINY, planned=100, rows=6, packs=2, max_tokens=256, vision=2, vae=(8, 8, 8, 8))


def make_model(pipe: Echo4oPipeline, method: str) -> nn.Module:
    """A copy of the model, prepared for a method of training."""
    settings = Echo4oTrainingArguments(output_dir=tempfile.gettempdir(), model="random", method=method, use_cpu=True)
    return prepare_model(copy.deepcopy(pipe.model), settings)


def train(model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Function that computes the gradients of what is trained on one pack."""

    def step() -> None:
        model.zero_grad()
        losses = model(**batch, loss_reduction="none")
        (losses["flow_loss"].sum() + losses["text_loss"].sum()).backward()

    return step


def measure_steps(pipe: Echo4oPipeline, size: Size, repeats: int) -> list[Row]:
    """Tokens per second of each method, and the ratio to its products."""
    config = pipe.model.config
    batch = training_pack(config, size.images, size.prompt, size.side, size.answer)
    products = {method: pack_products(config, batch, method) for method in METHODS}
    tasks: dict[str, Callable[[], object]] = {}
    for method in METHODS:
        tasks[method] = train(make_model(pipe, method), batch)
        tasks[f"{method}, products"] = multiply(products[method], size.model[1])
    seconds = interleave(tasks, repeats)
    tokens = batch["segment_ids"].numel()
    rows = [("", "GFLOP", "tokens per second, median", "best", "seconds, median", "bare products", "ratio", "least")]
    for method in METHODS:
        whole, bare = seconds[method], seconds[f"{method}, products"]
        median, bare_median = statistics.median(whole), statistics.median(bare)
        figures = [flops(products[method]) / 1e9, tokens / median, tokens / min(whole), median, bare_median]
        figures += [median / bare_median, min(whole) / min(bare)]
        rows.append((method, *map(_rounded, figures)))
    return rows


def measure_packs(planned: int) -> list[Row]:
    """How full packs are planned at the published sizes."""
    config = BagelConfig()
    processor = make_processor(config)
    sizes = training_sizes(processor, config)
    max_tokens = default_max_tokens(config, sizes)
    vae_config = {"scaling_factor": 1.0, "shift_factor": 0.0}
    builder = SampleBuilder(processor, config, vae_config, sizes=sizes, max_tokens=max_tokens)
    rows = mixed_rows(min(planned, 2000), black)
    lengths = [builder.num_tokens(row) for row in rows] * (planned // len(rows))
    start = time.perf_counter()
    packs = plan_packs(lengths, max_tokens, seed=0)
    seconds = time.perf_counter() - start
    head = ("rows", "tokens of a pack", "packs", "rows per pack", "tokens / room", "seconds to plan")
    share = sum(lengths) / (len(packs) * max_tokens)
    figures = (len(lengths) / len(packs), share, seconds)
    return [head, (str(len(lengths)), str(max_tokens), str(len(packs)), *map(_rounded, figures))]


class SmallMixture:
    """The mixture at a quarter of the sides, its packs, and the model that is trained on them.

    Args:
        pipe: what is trained.
        amount: how much.
        folder: for rows and latents.
    """

    def __init__(self, pipe: Echo4oPipeline, amount: Amount, folder: Path) -> None:
        mixed_rows(amount.rows, blurred).save_to_disk(folder / "rows")
        rows = datasets.load_from_disk(folder / "rows")
        config = pipe.model.config
        store = LatentStore(folder / "latents", vae_id(pipe.vae))
        without = SampleBuilder(
            pipe.processor,
            config,
            pipe.vae.config,
            sizes=training_sizes(pipe.processor, config),
            max_tokens=amount.max_tokens,
        )
        cached = copy.copy(without)
        cached.store = store
        precompute(rows, cached, LatentEncoder(pipe.vae, config.latent_patch_size, store))
        self.collators = {"without": PackCollator(without), "with": PackCollator(cached)}
        self.encoder = LatentEncoder(pipe.vae, config.latent_patch_size)
        self.model = make_model(pipe, "full")
        self.packs = EagerPacks(rows, without, amount.max_tokens, seed=0)
        self.number = min(amount.packs, len(self.packs))

    def train(self, cache: str, index: int) -> tuple[float, float, float]:
        """Seconds for loading, the VAE, and the forward and backward pass of a pack."""
        times = [time.perf_counter()]
        batch = self.collators[cache]([self.packs[0, index]])
        times.append(time.perf_counter())
        self.encoder.fill(batch)
        times.append(time.perf_counter())
        train(self.model, {name: value for name, value in batch.items() if name not in NOT_FOR_THE_MODEL})()
        times.append(time.perf_counter())
        loading, encoding, step = (end - start for start, end in pairwise(times))
        return loading, encoding, step

    def count(self) -> tuple[int, int, int]:
        """Tokens of all packs: planned, left after conditions were dropped, computed."""
        batches = [self.collators["with"]([self.packs[0, index]]) for index in range(len(self.packs))]
        real = sum(int((batch["segment_ids"] != PADDING).sum()) for batch in batches)
        return sum(self.packs.lengths), real, sum(batch["segment_ids"].numel() for batch in batches)


def measure_data(mixture: SmallMixture, repeats: int) -> list[Row]:
    """Seconds of a pack, without the latent cache and with it; medians of passes over the packs."""
    passes: dict[str, list[list[float]]] = {cache: [] for cache in mixture.collators}
    for repetition in range(repeats + 1):
        sums = {cache: [0.0, 0.0, 0.0] for cache in passes}
        for index in range(mixture.number):
            for cache, sum_of in sums.items():
                for place, seconds in enumerate(mixture.train(cache, index)):
                    sum_of[place] += seconds / mixture.number
        for cache, kept in passes.items():
            kept += [sums[cache]] if repetition else []  # the first warms up
    whole = {cache: statistics.median(map(sum, kept)) for cache, kept in passes.items()}
    rows = [("latent cache", "loading", "VAE", "step", "sum", "loading / sum", "speed-up")]
    for cache, kept in passes.items():
        figures = [statistics.median(part) for part in zip(*kept, strict=True)]
        share = statistics.median(one[0] / sum(one) for one in kept)
        rows.append((cache, *map(_rounded, [*figures, whole[cache], share, whole["without"] / whole[cache]])))
    return rows


def _rounded(figure: float) -> str:
    return f"{figure:.3g}" if abs(figure) < 1000 else f"{figure:.0f}"


def _print(title: str, rows: list[Row]) -> None:
    head, *body = rows
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in body:
        print(f"| {' | '.join(row)} |")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that the script runs")
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="the published sizes on one card: training_gpu.py; takes the options of gpu.py",
    )
    arguments, others = parser.parse_known_args(argv)
    if arguments.gpu:
        return gpu.main([*others, *(["--tiny"] if arguments.tiny else [])], training_gpu.SECTIONS)
    if others:
        parser.error(f"{others[0]} goes with --gpu")
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats} must be at least 1")
    torch.set_num_threads(arguments.threads)
    datasets.disable_progress_bars()

    amount = SOME if arguments.tiny else ALL
    config = small_config(*amount.size.model, max_latent_size=amount.size.side, max_vision_size=amount.vision)
    pipe = make_pipeline(config, amount.vae, vae_layers=2)
    print(amount)
    print(f"torch {torch.__version__}, float32, {arguments.threads} threads, {arguments.repeats} repetitions")
    _print("Forward and backward pass of a pack", measure_steps(pipe, amount.size, arguments.repeats))
    _print("Packs at the published sizes, nothing dropped", measure_packs(amount.planned))
    with tempfile.TemporaryDirectory() as folder:
        mixture = SmallMixture(pipe, amount, Path(folder))
        planned, real, computed = mixture.count()
        room = len(mixture.packs) * amount.max_tokens
        shares = (str(len(mixture.packs)), *map(_rounded, (planned / room, real / room, real / computed)))
        head = ("packs", "tokens planned / room", "after conditions were dropped / room", "tokens / computed")
        _print("Packs of the smaller mixture", [head, shares])
        _print("Seconds of a pack of it", measure_data(mixture, arguments.repeats))
    return 0


if __name__ == "__main__":
    sys.exit(main())
