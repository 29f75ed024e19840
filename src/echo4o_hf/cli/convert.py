"""`echo4o convert`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command import DTYPES, Command


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="checkpoint: a folder or a name on the Hub")
    parser.add_argument("dst", metavar="DST", type=Path, help="folder to write")
    parser.add_argument(
        "--to", choices=("ours", "official"), default="ours", help="layout of DST (default: %(default)s)"
    )
    parser.add_argument("--lora", metavar="DIR", help="adapter to add to the weights: a folder or a name on the Hub")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as in SRC")


def _convert(args: argparse.Namespace) -> None:
    import torch

    from ..pipeline.convert import convert

    dtype = getattr(torch, args.dtype) if args.dtype else None
    convert(args.src, args.dst, dtype=dtype, to=args.to, lora=args.lora)


CONVERT = Command("convert", "a checkpoint from the official layout to ours, or back", _convert_arguments, _convert)
