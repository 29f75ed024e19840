"""Seconds per image and per training step on a CPU, and their ratio to bare matrix products of the same arithmetic.

    python benchmark/inference.py --threads 2 --repeats 5

Everything is measured in turns in one process. An image is a prompt of 24 tokens, then 20 updates that are all guided:
41 evaluations of the model, without decoding. A training step is the forward and backward pass of a pack of 1024
tokens, without an optimizer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
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

from echo4o_hf.model.configuration_bagel import BagelConfig
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


FULL = Size(model=(512, 8, 8, 4, 1408), side=16, prompt=24, updates=20, images=3, answer=154)
TINY = Size(model=(32, 2, 4, 2, 48), side=2, prompt=4, updates=2, images=1, answer=6)


def image_products(config: BagelConfig, size: Size) -> Products:
    """Of one image: the prompt, then the updates, each with and without it."""
    latents = size.side**2
    seen = latents + 2
    prefill = forward_products(config, size.prompt, 0, [(size.prompt, (size.prompt + 1) // 2)], logits=1)
    update = forward_products(config, 4, 2 * latents, [(seen, seen + size.prompt), (seen, seen)])
    return prefill + Counter({shape: times * size.updates for shape, times in update.items()})


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


def draw(pipe: Echo4oPipeline, size: Size) -> Callable[[], object]:
    """Function that draws an image, up to its latents."""
    pixels = size.side * pipe.model.config.latent_stride
    return lambda: pipe(
        prompt(size.prompt),
        height=pixels,
        width=pixels,
        num_inference_steps=size.updates,
        guidance_scale=4.0,
        guidance_interval=(0.0, 1.0),
        output_type="latent",
    )


def train(pipe: Echo4oPipeline, size: Size) -> Callable[[], None]:
    """Function that computes the gradients of all parameters on one pack."""
    model = pipe.model
    batch = training_pack(model.config, size.images, size.prompt, size.side, size.answer)

    def step() -> None:
        model.zero_grad()
        model(**batch).loss.backward()

    return step


def multiply(products: Products) -> Callable[[], None]:
    """Function that computes nothing but the products, with `torch.mm`."""
    operands = {
        shape: (torch.randn(shape[0], shape[1]), torch.randn(shape[1], shape[2]), torch.empty(shape[0], shape[2]))
        for shape in products
    }

    def run() -> None:
        for shape, times in products.items():
            left, right, out = operands[shape]
            for _ in range(times):
                torch.mm(left, right, out=out)

    return run


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


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--attn-implementation", default="sdpa", choices=["eager", "sdpa"])
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that the script runs")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        parser.error(f"--repeats {arguments.repeats} must be at least 1")
    torch.set_num_threads(arguments.threads)

    size = TINY if arguments.tiny else FULL
    config = small_config(*size.model, max_latent_size=size.side)
    pipe = make_pipeline(config, vae_channels=(8, 8, 8, 8), vae_layers=1)
    pipe.model.set_attn_implementation(arguments.attn_implementation)
    products = {"image": image_products(config, size), "training step": training_products(config, size)}
    tasks = {
        "image": draw(pipe, size),
        "image, products": multiply(products["image"]),
        "training step": train(pipe, size),
        "training step, products": multiply(products["training step"]),
    }
    seconds = interleave(tasks, arguments.repeats)

    print(f"{size}")
    print(
        f"torch {torch.__version__}, float32, {arguments.threads} threads, {arguments.attn_implementation}, "
        f"{arguments.repeats} repetitions\n"
    )
    print(
        "| | GFLOP | seconds, minimum | seconds, median | bare products, minimum | median | ratio, minimum | median |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, needed in products.items():
        whole, bare = seconds[name], seconds[f"{name}, products"]
        figures = [min(whole), statistics.median(whole), min(bare), statistics.median(bare)]
        figures += [figures[0] / figures[2], figures[1] / figures[3]]
        print(f"| {name} | {flops(needed) / 1e9:.4g} | " + " | ".join(f"{figure:.3g}" for figure in figures) + " |")


if __name__ == "__main__":
    main()
