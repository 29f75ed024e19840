"""Bagel's real sizes on one GPU, with random weights: memory, seconds per image, tokens per second of a training step.

    python benchmark/gpu.py --output gpu.jsonl
    python benchmark/gpu.py --tiny    # on the CPU, only to see that it runs

One JSON line per figure is printed, and appended to the file, as soon as it is measured. A section that fails or
takes longer than its minutes is reported as such, and the next one begins.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import TaylorSeerCacheConfig
from random_model import flops, forward_products, make_pipeline, prompt, small_config, training_pack
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from echo4o_hf.model.configuration_bagel import BagelConfig
from echo4o_hf.pipeline.pipeline_echo4o import Echo4oPipeline

GENERATION = ("_moe_gen", "vae2llm", "llm2vae", "time_embedder")  # in the names of what is trained
Record = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """What is measured."""

    config: BagelConfig
    vae_channels: tuple[int, ...]
    vae_layers: int
    dtype: torch.dtype
    side: int  # latent tokens along one side of an image
    prompt: int
    updates: int
    images: int  # in the training pack
    compiler: str


def full_size() -> Size:
    """The published model and its VAE, images of 1024x1024 pixels."""
    return Size(BagelConfig(), (128, 256, 512, 512), 2, torch.bfloat16, 64, 64, 49, 4, "inductor")


def tiny_size() -> Size:
    """Everything, in seconds."""
    config = small_config(64, 1, 2, 1, 96, max_latent_size=4)
    return Size(config, (8, 8, 8, 8), 1, torch.bfloat16, 4, 4, 4, 2, "eager")


def load(size: Size, device: torch.device) -> tuple[Echo4oPipeline, Record]:
    """The pipeline, and what it and its surroundings are."""
    start = now(device)
    pipe = make_pipeline(size.config, size.vae_channels, size.vae_layers, device, size.dtype)
    record = {
        "seconds": now(device) - start,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(size.dtype),
        "parameters": pipe.model.num_parameters(),
    }
    return pipe, record


def draw(pipe: Echo4oPipeline, size: Size) -> Iterator[Record]:
    """Seconds of an image with the defaults of `Echo4oPipeline`; the first one, in fewer updates, warms up."""
    device = pipe.model.device
    pixels = size.side * size.config.latent_stride
    for repetition in range(3):
        updates = min(size.updates, 6) if repetition == 0 else size.updates  # 6 have guided ones and others
        start = now(device)
        latents = pipe(
            prompt(size.prompt), height=pixels, width=pixels, num_inference_steps=updates, output_type="latent"
        ).images
        denoised = now(device)
        pipe.decode_latents(latents, pixels, pixels)
        decoded = now(device)
        evaluations = updates + int((pipe.scheduler.sigmas[:-1] > 0.4).sum())
        tokens = size.side**2
        one = flops(forward_products(size.config, 2, tokens, [(tokens + 2, tokens + 2 + size.prompt)]))
        yield {
            "warm_up": repetition == 0,
            "pixels": pixels,
            "updates": updates,
            "evaluations": evaluations,
            "seconds": decoded - start,
            "seconds_decoding": decoded - denoised,
            "tflop_per_second": evaluations * one / (denoised - start) / 1e12,
        }


def draw_profiled(pipe: Echo4oPipeline, size: Size) -> Iterator[Record]:
    """Where the time of guided updates goes: the operations that take most of it, and their shares."""
    pixels = size.side * size.config.latent_stride
    on_gpu = pipe.model.device.type == "cuda"
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]

    def run() -> None:
        pipe(prompt(size.prompt), height=pixels, width=pixels, num_inference_steps=3, output_type="latent")
        now(pipe.model.device)

    run()
    with profile(activities=activities) as profiled:
        run()
    seconds = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        for event in profiled.key_averages()
    }
    for name in sorted(seconds, key=lambda name: -seconds[name])[:12]:
        yield {"operation": name[:120], "seconds": seconds[name], "share": seconds[name] / sum(seconds.values())}


def draw_cached(pipe: Echo4oPipeline, size: Size) -> Iterator[Record]:
    """As `draw`, with velocities forecast in between: `cache_interval` - 1 of as many updates."""
    for interval in (2, 3, 5):
        pipe.enable_cache(
            TaylorSeerCacheConfig(
                cache_interval=interval, disable_cache_before_step=1, taylor_factors_dtype=torch.float32
            )
        )
        try:
            for record in draw(pipe, size):
                about_all = ("evaluations", "tflop_per_second")  # evaluated or not
                kept = {name: value for name, value in record.items() if name not in about_all}
                yield {"cache_interval": interval, **kept}
        finally:
            pipe.disable_cache()


def draw_compiled(pipe: Echo4oPipeline, size: Size) -> Iterator[Record]:
    """As `draw`, with every decoder layer compiled."""
    pipe.compile(backend=size.compiler)
    before = counters["stats"]["unique_graphs"]
    for record in draw(pipe, size):
        yield {**record, "graphs": counters["stats"]["unique_graphs"] - before}


def train(pipe: Echo4oPipeline, size: Size, attention: str) -> Iterator[Record]:
    """Tokens per second, forward and backward, of the generation expert alone; the first step warms up."""
    model = pipe.model
    model.set_attn_implementation({"text_config": attention})
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(part in name for part in GENERATION)
    model.activation_checkpointing_enable()
    model.train()
    batch = training_pack(size.config, size.images, size.prompt, size.side)
    batch = {name: value.to(model.device) for name, value in batch.items()}
    tokens = batch["segment_ids"].numel()
    try:
        for repetition in range(4):
            model.zero_grad()
            start = now(model.device)
            loss = model(**batch, logits_to_keep=1).loss
            loss.backward()
            seconds = now(model.device) - start
            yield {
                "warm_up": repetition == 0,
                "attention": attention,
                "tokens": tokens,
                "loss": loss.item(),
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
            }
    finally:
        model.zero_grad()
        model.eval()
        model.set_attn_implementation({"text_config": "sdpa"})


def train_flex(pipe: Echo4oPipeline, size: Size) -> Iterator[Record]:
    """As `train`, with flex attention, which has no backward pass on the CPU."""
    if pipe.model.device.type == "cpu":
        yield {"skipped": "flex attention does not train on the CPU"}
    else:
        yield from train(pipe, size, "flex_attention")


Section = Callable[[Echo4oPipeline, Size], Iterator[Record]]
SECTIONS: dict[str, Section] = {
    "image": draw,
    "image-profile": draw_profiled,
    "image-cached": draw_cached,
    "train": lambda pipe, size: train(pipe, size, "sdpa"),
    "train-flex": train_flex,
    "image-compiled": draw_compiled,  # last: the layers stay compiled
}


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in whatever still runs after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds / 60:g} minutes")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_section(
    name: str, section: Section, pipe: Echo4oPipeline, size: Size, seconds: float, report: Callable[[Record], None]
) -> bool:
    """Report a section's records as they come; False, and the error reported, if it did not end well."""
    device = pipe.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        # Closed at once, so that a section that failed has tidied up before the next begins.
        with time_limit(seconds), contextlib.closing(section(pipe, size)) as records:
            for record in records:
                report({"section": name, **record, **_memory(device)})
    except Exception as error:  # one visit: what can still be measured is
        report({"section": name, "error": f"{type(error).__name__}: {error}", **_memory(device)})
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return True


def now(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _memory(device: torch.device) -> Record:
    """Gigabytes (1e9 bytes) of the GPU's memory, now and at most in this section."""
    if device.type != "cuda":
        return {}
    return {
        "gb": torch.cuda.memory_allocated(device) / 1e9,
        "gb_peak": torch.cuda.max_memory_allocated(device) / 1e9,
    }


def main(argv: Sequence[str] | None = None, sections: dict[str, Section] = SECTIONS) -> int:
    """Parse the command line, load, run the sections; 1 if one of them did not end well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file that the JSON lines are appended to")
    parser.add_argument("--minutes", type=float, default=5.0, help="the most that one section may take")
    parser.add_argument("--sections", nargs="+", choices=sections, default=list(sections))
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that the script runs, on the CPU")
    parser.add_argument("--device", help="cuda by default, cpu with --tiny")
    arguments = parser.parse_args(argv)
    size = tiny_size() if arguments.tiny else full_size()
    device = torch.device(arguments.device or ("cpu" if arguments.tiny else "cuda"))

    def report(record: Record) -> None:
        rounded = {name: float(f"{x:.4g}") if isinstance(x, float) else x for name, x in record.items()}
        line = json.dumps(rounded)
        print(line, flush=True)
        if arguments.output is not None:
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    with time_limit(60 * arguments.minutes):
        pipe, loaded = load(size, device)
    report({"section": "load", **loaded, **_memory(device)})
    seconds = 60 * arguments.minutes
    done = [run_section(name, sections[name], pipe, size, seconds, report) for name in arguments.sections]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
