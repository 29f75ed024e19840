"""Seconds per image and per training step on a CPU, and their ratio to bare matrix products of the same arithmetic.

    python benchmark/inference.py --threads 2 --repeats 5

Everything is measured in turns in one process. An image is a prompt of 24 tokens, then 20 updates that are all guided:
41 evaluations of the model, without decoding. It is drawn

- plain: the branches of guidance one after another, each with its context, as the official code does;
- packed: as the pipeline does, also several images at a time;
- compiled: likewise, after `pipe.compile()`;
- cached: likewise, with two of three updates forecast (`caching.py` measures how near that is), packed or compiled.

A training step is the forward and backward pass of a pack of 1024 tokens, without an optimizer. The bare products take
their right factors from as many matrices as the model has layers, as the model does. They allocate nothing, so that
what the model allocates is reused, as by the allocators of GPUs: on Linux, glibc is told to keep freed memory.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import TaylorSeerCacheConfig
from random_model import (
    Products,
    backward_products,
    flops,
    forward_products,
    make_pipeline,
    prompt,
    small_config,
    training_pack,
)
from torch import Tensor

from echo4o_hf.model.configuration_bagel import BagelConfig
from echo4o_hf.pipeline.caching import is_evaluated
from echo4o_hf.pipeline.guidance import Guidance, guide
from echo4o_hf.pipeline.pipeline_echo4o import Echo4oPipeline


@dataclass(frozen=True)
class Size:
    """What is measured: hidden size, layers, heads and so on of the model, and the tokens of its inputs."""

    model: tuple[int, int, int, int, int]  # hidden, layers, heads, key-value heads, intermediate
    side: int  # latent tokens along one side of an image
    prompt: int
    updates: int
    images: int  # in the training pack
    answer: int  # tokens of the text in the training pack that is learned


@dataclass(frozen=True)
class Task:
    """What runs, and the products that it needs."""

    run: Callable[[], object]
    products: Products


FULL = Size(model=(512, 8, 8, 4, 1408), side=16, prompt=24, updates=20, images=3, answer=154)
CACHE = TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1, taylor_factors_dtype=torch.float32)
TINY = Size(model=(32, 2, 4, 2, 48), side=2, prompt=4, updates=2, images=1, answer=6)


def image_products(config: BagelConfig, size: Size, images: int = 1, cached: bool = False) -> Products:
    """Of images of one prompt each: the prompts, then the evaluated updates, each with and without them."""
    latents = size.side**2
    seen = latents + 2
    texts = [(size.prompt, (size.prompt + 1) // 2)] * images
    prefill = forward_products(config, size.prompt * images, 0, texts, logits=images)
    update = forward_products(
        config, 4 * images, 2 * latents * images, [(seen, seen + size.prompt), (seen, seen)] * images
    )
    evaluated = sum(not cached or is_evaluated(step, CACHE) for step in range(size.updates))
    return prefill + Counter({shape: times * evaluated for shape, times in update.items()})


def training_products(config: BagelConfig, size: Size) -> Products:
    """Of the forward and backward pass of one pack."""
    latents, markers = size.side**2, 2
    target = (latents + markers, latents + markers + size.prompt)
    text = (size.prompt, (size.prompt + 1) // 2)
    answer = (size.answer, size.prompt + (size.answer + 1) // 2)
    understanding = size.images * (size.prompt + markers) + size.prompt + size.answer
    seen = [target, text] * size.images + [text, answer]
    forward = forward_products(config, understanding, size.images * latents, seen, logits=size.answer - 1)
    return forward + backward_products(forward)


def draw(pipe: Echo4oPipeline, size: Size, images: int = 1) -> Callable[[], object]:
    """Function that draws images of a prompt each, up to their latents."""
    pixels = size.side * pipe.model.config.latent_stride
    return lambda: pipe(
        [prompt(size.prompt)] * images,
        height=pixels,
        width=pixels,
        num_inference_steps=size.updates,
        guidance_scale=4.0,
        guidance_interval=(0.0, 1.0),
        output_type="latent",
    )


def draw_plain(pipe: Echo4oPipeline, size: Size) -> Callable[[], object]:
    """Function that draws one image without the pipeline's loop: each branch in a call of its own."""
    grid = (size.side, size.side)
    guidance = Guidance(text_scale=4.0, image_scale=1.0, interval=(0.0, 1.0), renorm="global")

    @torch.no_grad()
    def run() -> Tensor:
        contexts = pipe.encode_contexts([[prompt(size.prompt)]])
        with_text, without = (
            pipe.model.prepare_noisy_block([context], [grid])
            for context in (contexts.conditional, contexts.without_text)
        )
        latents = pipe.prepare_latents([grid], None, None)
        for step, timestep in enumerate(pipe.prepare_timesteps(size.updates)):
            at = pipe.scheduler.sigmas[step].expand(1)
            velocity = pipe.model.predict_velocity(latents, at, with_text)
            velocity = guide(velocity, pipe.model.predict_velocity(latents, at, without), velocity, guidance)
            latents = pipe.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return latents

    return run


def train(pipe: Echo4oPipeline, size: Size) -> Callable[[], None]:
    """Function that computes the gradients of all parameters on one pack."""
    model = pipe.model
    batch = training_pack(model.config, size.images, size.prompt, size.side, size.answer)

    def step() -> None:
        model.zero_grad()
        model(**batch).loss.backward()

    return step


def multiply(products: Products, layers: int) -> Callable[[], None]:
    """Function that computes nothing but the products, with `torch.mm`."""
    operands = {
        (rows, inner, columns): (
            torch.randn(rows, inner),
            [torch.randn(inner, columns) for _ in range(min(layers, times))],
            torch.empty(rows, columns),
        )
        for (rows, inner, columns), times in products.items()
    }

    def run() -> None:
        for shape, times in products.items():
            left, rights, out = operands[shape]
            for turn in range(times):
                torch.mm(left, rights[turn % len(rights)], out=out)

    return run


def keep_freed_memory() -> None:
    """As the environment variables MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ of a gibibyte."""
    if sys.platform == "linux":
        libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # as in malloc.h
        for parameter in (trim_threshold, mmap_threshold):
            if not libc.mallopt(parameter, 2**30):
                raise OSError(f"mallopt({parameter}, {2**30}) failed")


def interleave(tasks: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each task, one after the other in each repetition; a first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for repetition in range(repeats + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def with_cache(pipe: Echo4oPipeline) -> Echo4oPipeline:
    """A pipeline of the same parts that forecasts."""
    cached = Echo4oPipeline(**pipe.components)
    cached.set_progress_bar_config(disable=True)
    cached.enable_cache(CACHE)
    return cached


def measured(pipe: Echo4oPipeline, compiled: Echo4oPipeline, size: Size, batches: Sequence[int]) -> dict[str, Task]:
    """What is measured."""
    config = pipe.model.config
    ways = {"packed": (pipe, False), "compiled": (compiled, False)}
    ways |= {"packed, cached": (with_cache(pipe), True), "compiled, cached": (with_cache(compiled), True)}
    tasks = {"image, plain": Task(draw_plain(pipe, size), image_products(config, size))}
    for way, (drawing, cached) in ways.items():
        for images in batches if way == "packed" else sorted({1, max(batches)}):
            what = "image" if images == 1 else f"{images} images"
            tasks[f"{what}, {way}"] = Task(draw(drawing, size, images), image_products(config, size, images, cached))
    tasks["training step"] = Task(train(pipe, size), training_products(config, size))
    return tasks


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--attn-implementation", default="sdpa", choices=["eager", "sdpa"])
    parser.add_argument(
        "--tiny", action="store_true", help="only shows that the script runs: small, and compiled graphs run eagerly"
    )
    arguments = parser.parse_args(argv)
    if min(arguments.repeats, *arguments.batch_sizes) < 1:
        parser.error("--repeats and --batch-sizes must be at least 1")
    torch.set_num_threads(arguments.threads)

    size = TINY if arguments.tiny else FULL
    config = small_config(*size.model, max_latent_size=size.side)
    pipe, compiled = (make_pipeline(config, vae_channels=(8, 8, 8, 8), vae_layers=1) for _ in range(2))
    for one in (pipe, compiled):
        one.set_attention_backend(arguments.attn_implementation)
    compiled.compile(backend="eager" if arguments.tiny else "inductor")
    tasks = measured(pipe, compiled, size, sorted({1, *arguments.batch_sizes}))
    runs = {name: task.run for name, task in tasks.items()}
    bare = {f"{flops(task.products)} products": multiply(task.products, size.model[1]) for task in tasks.values()}
    seconds = interleave({**runs, **bare}, arguments.repeats)

    print(f"{size}")
    print(
        f"torch {torch.__version__}, float32, {arguments.threads} threads, {arguments.attn_implementation}, "
        f"{arguments.repeats} repetitions\n"
    )
    print(
        "| | GFLOP | seconds, minimum | seconds, median | bare products, minimum | median | ratio, minimum | median |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, task in tasks.items():
        whole, needed = seconds[name], seconds[f"{flops(task.products)} products"]
        figures = [min(whole), statistics.median(whole), min(needed), statistics.median(needed)]
        figures += [figures[0] / figures[2], figures[1] / figures[3]]
        print(
            f"| {name} | {flops(task.products) / 1e9:.4g} | "
            + " | ".join(f"{figure:.3g}" for figure in figures)
            + " |"
        )


if __name__ == "__main__":
    keep_freed_memory()
    main()
