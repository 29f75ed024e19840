"""`echo4o generate`."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .command import BENCHMARKS, DTYPES, Command, name_and_value

if TYPE_CHECKING:
    import torch


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to draw")
    what.add_argument("--benchmark", choices=BENCHMARKS, help="draw the prompts of a benchmark's items")
    parser.add_argument(
        "--model",
        required=True,
        help="folder, name on the Hub, or echo4o-miniature; with --benchmark also any pipeline of diffusers",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="PNG file to write; with --benchmark a folder, where what is there already stays",
    )
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        help="reference picture; repeat it for several, the last one sets the size",
    )
    parser.add_argument("--height", type=int, metavar="N", help="pixels")
    parser.add_argument("--width", type=int, metavar="N", help="pixels")
    parser.add_argument("--steps", type=int, dest="num_inference_steps", metavar="N", help="updates of the latents")
    parser.add_argument("--guidance-scale", type=float, metavar="S", help="towards the prompt")
    parser.add_argument("--image-guidance-scale", type=float, metavar="S", help="towards the reference pictures")
    parser.add_argument("--thinking", action="store_true", default=None, help="write a plan first, and print it")
    parser.add_argument("--max-think-tokens", type=int, metavar="N", help="length of the plan at most")
    parser.add_argument("--num-images", type=int, metavar="N", help="more than one: OUT gets an index (default: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, else float32")
    group = parser.add_argument_group("with --benchmark")
    group.add_argument("--items", type=Path, metavar="FILE", help="JSON lines (default: the benchmark's own)")
    group.add_argument("--images-per-prompt", type=int, metavar="N", help="default: 1")
    group.add_argument("--batch-size", type=int, metavar="N", help="pictures at the same time (default: 1)")
    group.add_argument(
        "--pipeline-argument",
        action="append",
        dest="pipeline_arguments",
        type=name_and_value,
        metavar="NAME=VALUE",
        help="of the pipeline's call, such as negative_prompt=blurry; repeat it for several",
    )


PIPELINE_OPTIONS = (
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "image_guidance_scale",
    "thinking",
    "max_think_tokens",
)
ONLY_WITH_A_PROMPT = ("image", "num_images")
ONLY_WITH_A_BENCHMARK = ("items", "images_per_prompt", "batch_size", "pipeline_arguments")


def _generate(args: argparse.Namespace) -> None:
    for name in ONLY_WITH_A_PROMPT if args.benchmark else ONLY_WITH_A_BENCHMARK:
        if getattr(args, name) is not None:
            option = f"--{name.removesuffix('s') if name == 'pipeline_arguments' else name}".replace("_", "-")
            raise ValueError(f"{option} goes {'with PROMPT, not with' if args.benchmark else 'only with'} --benchmark")
    given = {name: getattr(args, name) for name in PIPELINE_OPTIONS if getattr(args, name) is not None}
    if args.benchmark:
        _generate_benchmark(args, given)
    else:
        _generate_prompt(args, given)


def _device_and_dtype(args: argparse.Namespace) -> tuple[torch.device, str]:
    import torch

    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {args.device!r} is not a device of torch, such as cpu, cuda or cuda:1") from error
    return device, args.dtype or ("bfloat16" if device.type == "cuda" else "float32")


def _generate_benchmark(args: argparse.Namespace, given: dict[str, Any]) -> None:
    arguments = args.pipeline_arguments or []
    for name, value in arguments:
        if name in given:
            raise ValueError(f"{name} is given twice: {given[name]!r} and {value!r}")
        given[name] = value
    from ..benchmarks.items import load_items
    from ..pipeline.samples import draw_samples

    items = load_items(args.benchmark, args.items)
    key = "prompt" if args.benchmark == "geneval_pp" else "instruction"
    device, dtype = _device_and_dtype(args)
    new, kept = draw_samples(
        args.model,
        {item.get("id", place): item[key] for place, item in enumerate(items)},
        args.output,
        samples_per_prompt=1 if args.images_per_prompt is None else args.images_per_prompt,
        batch_size=1 if args.batch_size is None else args.batch_size,
        seed=args.seed,
        arguments=given,
        dtype=dtype,
        device=device,
    )
    print(f"{new} drawn, {kept} were there already")
    print(args.output)


def _generate_prompt(args: argparse.Namespace, given: dict[str, Any]) -> None:
    if args.output.suffix.lower() != ".png":
        raise ValueError(f"OUT must end in .png, got {str(args.output)!r}")
    import torch
    from PIL import Image

    from ..pipeline.pipeline_echo4o import Echo4oPipeline
    from ..pipeline.records import save_png

    device, dtype = _device_and_dtype(args)
    number = 1 if args.num_images is None else args.num_images
    references = [Image.open(path) for path in args.image or []]
    pipe = Echo4oPipeline.from_pretrained(args.model, dtype=getattr(torch, dtype)).to(device)
    result = pipe(
        args.prompt,
        image=references or None,
        num_images_per_prompt=number,
        generator=torch.Generator().manual_seed(args.seed),
        **given,
    )
    for text in result.texts or []:
        print(text)

    defaults = inspect.signature(Echo4oPipeline.__call__).parameters
    settings = {
        "prompt": args.prompt,
        "references": [str(path) for path in args.image or []],
        "model": args.model,
        "seed": args.seed,
        **{name: given.get(name, defaults[name].default) for name in PIPELINE_OPTIONS},
        "dtype": dtype,
        "software": f"echo4o-hf {__version__}",
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(result.images):
        path = args.output if number == 1 else args.output.with_stem(f"{args.output.stem}-{index}")
        save_png(image, path, {**settings, "index": index})
        print(path)


GENERATE = Command("generate", "pictures from a prompt, or of a benchmark's prompts", _generate_arguments, _generate)
