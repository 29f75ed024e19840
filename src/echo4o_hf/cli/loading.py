"""The options of commands that load a model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .command import DTYPES

if TYPE_CHECKING:
    import torch

    from ..pipeline.source import Source

QUANTIZATIONS = ("4bit", "8bit")


def add_loading_arguments(parser: argparse.ArgumentParser, model_help: str) -> None:
    """Which model, and where and how it runs."""
    parser.add_argument("--model", required=True, help=model_help)
    parser.add_argument("--attention", metavar="NAME", help="sdpa, eager, flex_attention, flash_attention_2 ...")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, else float32")
    parser.add_argument(
        "--quantize", choices=QUANTIZATIONS, help="the model's weights in fewer bits, with bitsandbytes: less memory"
    )
    parser.add_argument(
        "--offload",
        action="store_true",
        help="keep the weights in the machine's memory, each on the accelerator only while it is used: least memory",
    )


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    """What is put onto the model."""
    parser.add_argument(
        "--lora",
        type=adapter_and_scale,
        action="append",
        dest="loras",
        metavar="NAME[=SCALE]",
        help="adapter, a folder or name on the Hub; repeat it for several",
    )


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


def read_source(
    args: argparse.Namespace,
    adapters: Sequence[tuple[str, float]] = (),
    compiled: bool = False,
    cache_interval: int | None = None,
) -> Source:
    """The pipeline of the options, which is not loaded yet.

    Raises:
        ValueError: a device that is not here, or options that do not go together.
        ImportError: bitsandbytes is missing.
    """
    from ..pipeline.source import Source

    device = _read_device(args.device)
    for name, given in (("--quantize", args.quantize), ("--compile", compiled)):
        if args.offload and given:
            raise ValueError(f"--offload does not go with {name}: leave out one of them")
    if args.offload and device.type == "cpu":
        raise ValueError("--offload brings the weights to an accelerator while they are used, and the device is cpu")
    _check_attention(args.attention)
    if args.quantize and find_spec("bitsandbytes") is None:
        raise ImportError("--quantize needs bitsandbytes: pip install 'echo4o-hf[qlora]'")
    return Source(
        args.model,
        args.dtype or ("bfloat16" if device.type == "cuda" else "float32"),
        device,
        tuple(adapters),
        args.attention,
        compiled,
        cache_interval,
        args.quantize,
        args.offload,
    )


def _check_attention(name: str | None) -> None:
    """Refuse what transformers would, which is asked once the weights are loaded."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    names = sorted({"eager", *(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if "paged" not in key)})
    if name is not None and name not in names and "/" not in name:  # or a kernel's repository on the Hub
        raise ValueError(f"--attention {name} is unknown: choose one of {', '.join(names)}")


def _read_device(name: str | None) -> torch.device:
    """A device that is here; by default CUDA's, or else the CPU."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is not a device of torch, such as cpu, cuda or cuda:1") from error
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    numbers = {"cpu": 1} if accelerator is None else {"cpu": 1, accelerator.type: torch.accelerator.device_count()}
    if (device.index or 0) >= numbers.get(device.type, 0):
        here = [kind if number == 1 else f"{kind}:0 to {kind}:{number - 1}" for kind, number in numbers.items()]
        raise ValueError(f"--device {name} is not here: torch {torch.__version__} sees {' and '.join(here)}")
    return device
