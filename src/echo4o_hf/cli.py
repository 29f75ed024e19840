"""The `echo4o` command. Each command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import __version__

if TYPE_CHECKING:
    from PIL.Image import Image

DTYPES = ("float32", "bfloat16", "float16")


class Command(NamedTuple):
    """One word after `echo4o`."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the short form: fewer items and training steps")
    parser.add_argument("--control", action="store_true", help="also train as many steps on the base's noisy captions")
    parser.add_argument(
        "--output", type=Path, default=Path("demo"), metavar="DIR", help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")


def _demo(args: argparse.Namespace) -> None:
    from .miniature.demo import run_demo

    run_demo(output=args.output, quick=args.quick, seed=args.seed, control=args.control)


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--model", required=True, help="folder, name on the Hub, or echo4o-miniature")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="PNG file to write")
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
    parser.add_argument(
        "--num-images",
        type=int,
        default=1,
        metavar="N",
        help="more than one: OUT gets an index (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, else float32")


def _generate(args: argparse.Namespace) -> None:
    if args.output.suffix.lower() != ".png":
        raise ValueError(f"OUT must end in .png, got {str(args.output)!r}")
    import torch
    from PIL import Image

    from .pipeline.pipeline_echo4o import Echo4oPipeline

    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {args.device!r} is not a device of torch, such as cpu, cuda or cuda:1") from error
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    references = [Image.open(path) for path in args.image or []]
    options = (
        "height",
        "width",
        "num_inference_steps",
        "guidance_scale",
        "image_guidance_scale",
        "thinking",
        "max_think_tokens",
    )
    given = {name: getattr(args, name) for name in options if getattr(args, name) is not None}

    pipe = Echo4oPipeline.from_pretrained(args.model, dtype=getattr(torch, dtype)).to(device)
    result = pipe(
        args.prompt,
        image=references or None,
        num_images_per_prompt=args.num_images,
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
        **{name: given.get(name, defaults[name].default) for name in options},
        "dtype": dtype,
        "software": f"echo4o-hf {__version__}",
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(result.images):
        path = args.output
        if args.num_images > 1:
            path = path.with_stem(f"{path.stem}-{index}")
        save_png(image, path, {**settings, "index": index})
        print(path)


def save_png(image: Image, path: Path, settings: Mapping[str, object]) -> None:
    """Write `path` in one piece, with each setting as a text chunk of the PNG."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for name, value in settings.items():
        chunks.add_text(name, str(value))
    temporary = path.with_name(f"{path.name}.tmp")
    image.save(temporary, format="PNG", pnginfo=chunks)
    os.replace(temporary, path)


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="checkpoint: a folder or a name on the Hub")
    parser.add_argument("dst", metavar="DST", type=Path, help="folder to write")
    parser.add_argument(
        "--to", choices=("ours", "official"), default="ours", help="layout of DST (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: as in SRC")


def _convert(args: argparse.Namespace) -> None:
    import torch

    from .pipeline.convert import convert

    convert(args.src, args.dst, dtype=getattr(torch, args.dtype) if args.dtype else None, to=args.to)


COMMANDS = (
    Command("demo", "the whole journey in miniature, on a CPU, offline", _demo_arguments, _demo),
    Command("generate", "pictures from a prompt, with or without references", _generate_arguments, _generate),
    Command("convert", "a checkpoint from the official layout to ours, or back", _convert_arguments, _convert),
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="echo4o", description="Echo-4o (Bagel) with transformers and diffusers.")
    parser.add_argument("--version", action="version", version=f"echo4o-hf {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(
            command.name, help=command.help, description=command.help[0].upper() + command.help[1:] + "."
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, 2 for what the user can mend (one line on stderr says what), 130 after Ctrl-C.
    """
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"echo4o: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("echo4o: interrupted", file=sys.stderr)
        return 130
    return 0
