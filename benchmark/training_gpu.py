"""Sections of `training.py --gpu`: steps of `Echo4oTrainer` with the settings of examples/, on Bagel's real sizes.

The rows are those of `mixture`, the packs as large as the trainer makes them. A step is everything: waiting for the
loader's workers, forward and backward pass with activation checkpointing, clipping, the optimizer. `mfu` is the
arithmetic of `pack_products`, which counts no recomputation and no vision, per second, as a share of `PEAK`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu import Record, Section, Size, now
from mixture import blurred, mixed_rows
from peft import PeftModel
from random_model import flops, pack_products
from torch import nn
from transformers import TrainerCallback

from echo4o_hf.pipeline.pipeline_echo4o import Echo4oPipeline
from echo4o_hf.training.arguments import Echo4oTrainingArguments, parse_arguments
from echo4o_hf.training.collator import PackCollator
from echo4o_hf.training.latents import LatentEncoder, precompute
from echo4o_hf.training.memory import memory_lines
from echo4o_hf.training.parameters import prepare_model
from echo4o_hf.training.train import Base, make_packs, sample_builder
from echo4o_hf.training.trainer import Echo4oTrainer

EXAMPLES = Path(__file__).parents[1] / "examples"
PEAK = 989e12  # of an H100 or H200 in bfloat16, without sparsity
WARM_UP = 2


class Amount(NamedTuple):
    """How much is measured."""

    rows: int
    steps: int
    workers: int


ON_A_CARD, ELSEWHERE = Amount(rows=40, steps=6, workers=4), Amount(rows=2, steps=3, workers=0)


class Clock(TrainerCallback):
    """What each step took; its arithmetic is that of the batch that the model was given."""

    def __init__(self, arguments: Echo4oTrainingArguments, size: Size) -> None:
        self.arguments, self.size = arguments, size
        self.records: list[Record] = []
        self.batch: dict[str, torch.Tensor] = {}
        self.started = self.ended = 0.0

    def watch(self, module: nn.Module, args: Any, batch: dict[str, Any]) -> None:
        """A hook before the model's forward pass."""
        names = ("input_ids", "segment_ids", "roles", "sample_ids", "shift_labels")
        self.batch = {name: batch[name].cpu() for name in names}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The first batch is loaded after this."""
        self.ended = now(self.arguments.device)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The batch is there."""
        self.started = now(self.arguments.device)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The weights have changed."""
        before, self.ended = self.ended, now(self.arguments.device)
        seconds, tokens = self.ended - before, self.batch["segment_ids"].numel()
        products = pack_products(self.size.config, self.batch, self.arguments.method, self.arguments.lora_rank)
        self.records.append(
            {
                "warm_up": len(self.records) < WARM_UP,
                "tokens": tokens,
                "seconds": seconds,
                "seconds_waiting": self.started - before,
                "tokens_per_second": tokens / seconds,
                "tflop_per_second": flops(products) / seconds / 1e12,
                "mfu": flops(products) / seconds / PEAK,
            }
        )


class Run:
    """An example's settings, and what training with them needs.

    Args:
        pipe: model, VAE and processor.
        example: name of the file in examples/.
        folder: for rows, latents and the trainer.
        cache: whether there is a cache of latents.
    """

    def __init__(self, pipe: Echo4oPipeline, example: str, folder: Path, cache: bool) -> None:
        pipe.vae.float()  # as published
        self.amount = ON_A_CARD if pipe.model.device.type == "cuda" else ELSEWHERE
        flags = {
            "output_dir": folder / "out",
            "max_steps": self.amount.steps,
            "gradient_accumulation_steps": 1,
            "warmup_steps": 0,
            "save_strategy": "no",
            "report_to": "none",
            "dataloader_num_workers": self.amount.workers,
            "use_cpu": pipe.model.device.type == "cpu",
            "latent_cache": folder / "latents",
        }
        command = [str(EXAMPLES / example)]
        for name, value in flags.items():
            command += [f"--{name}", str(value)]
        self.arguments = parse_arguments(command)
        if not cache:
            self.arguments.latent_cache = None
        base = Base(folder, pipe.model.config, pipe.processor, pipe.vae, pipe.scheduler)
        self.rows = mixed_rows(self.amount.rows, blurred)
        self.builder = sample_builder(self.arguments, base)
        self.encoder = LatentEncoder(pipe.vae, base.config.latent_patch_size, self.builder.store)

    def fill(self) -> None:
        """Encode all pictures."""
        precompute(self.rows, self.builder, self.encoder, num_workers=self.amount.workers)


def encode(pipe: Echo4oPipeline, size: Size) -> Iterator[Record]:
    """Pictures per second into the cache of latents."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(pipe, "train_lora.yaml", Path(folder), cache=True)
        start = time.perf_counter()
        run.fill()
        seconds = time.perf_counter() - start
        pictures = len(list(Path(folder).rglob("*.safetensors")))
        yield {"pictures": pictures, "seconds": seconds, "pictures_per_second": pictures / seconds}


def train(example: str, cache: bool = True) -> Section:
    """The section that trains with an example's settings."""

    def section(pipe: Echo4oPipeline, size: Size) -> Iterator[Record]:
        with tempfile.TemporaryDirectory() as folder:
            run = Run(pipe, example, Path(folder), cache)
            if cache:
                run.fill()
            if pipe.model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            model = prepare_model(pipe.model, run.arguments)
            pipe.model.set_attn_implementation("flex_attention" if pipe.model.device.type == "cuda" else "sdpa")
            clock = Clock(run.arguments, size)
            hook = model.register_forward_pre_hook(clock.watch, with_kwargs=True)
            estimate = memory_lines(model, run.arguments, run.builder.max_tokens)
            trainer = Echo4oTrainer(
                model,
                run.arguments,
                train_dataset=make_packs(run.arguments, run.rows, run.builder),
                data_collator=PackCollator(run.builder, always_all_parts=True),
                encoder=run.encoder,
                callbacks=[clock],
            )
            error = None
            try:
                trainer.train()
            except Exception as raised:  # after what was measured before it
                error = raised
            for record in clock.records:
                yield {**record, "gb_estimated": sum(line.num_bytes for line in estimate) / 1e9}
            hook.remove()
            if isinstance(model, PeftModel):
                model.unload()
            if error is not None:
                raise error

    return section


SECTIONS: dict[str, Section] = {
    "latents": encode,
    "lora": train("train_lora.yaml"),
    "lora-uncached": train("train_lora.yaml", cache=False),
    "generation": train("train_generation.yaml"),
}
