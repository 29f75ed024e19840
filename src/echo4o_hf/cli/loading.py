"""The options of commands that load a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .command import DTYPES

if TYPE_CHECKING:
    import torch


def add_loading_arguments(parser: argparse.ArgumentParser, model_help: str) -> None:
    """Which model, what is put onto it, and where it runs."""
    parser.add_argument("--model", required=True, help=model_help)
    parser.add_argument(
        "--lora",
        type=adapter_and_scale,
        action="append",
        dest="loras",
        metavar="NAME[=SCALE]",
        help="adapter, a folder or name on the Hub; repeat it for several",
    )
    parser.add_argument("--attention", metavar="NAME", help="sdpa, eager, flex_attention, flash_attention_2 ...")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, else float32")


def adapter_and_scale(text: str) -> tuple[str, float]:
    """`NAME=SCALE`, or `NAME` for all of it; a folder's own name may hold an equals sign."""
    name, equals, scale = text.rpartition("=")
    if not equals or Path(text).is_dir():
        return text, 1.0
    try:
        return name, float(scale)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a folder nor NAME=SCALE") from error


def read_adapters(args: argparse.Namespace) -> tuple[tuple[str, float], ...]:
    """The adapters of --lora, all of which are there.

    Raises:
        OSError: one is not.
        ValueError: one is named twice.
    """
    from ..model.checkpoint import find_adapter

    adapters = tuple(args.loras or ())
    for place, (name, _) in enumerate(adapters):
        if name in [other for other, _ in adapters[:place]]:
            raise ValueError(f"--lora {name} is given twice")
        find_adapter(name)
    return adapters


def device_and_dtype(args: argparse.Namespace) -> tuple[torch.device, str]:
    """Those of --device and --dtype, or their defaults.

    Raises:
        ValueError: torch knows no such device.
    """
    import torch

    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {args.device!r} is not a device of torch, such as cpu, cuda or cuda:1") from error
    return device, args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
