"""`echo4o demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command import Command


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the short form: fewer items, and too few steps to learn")
    parser.add_argument("--control", action="store_true", help="also train as many steps on the base's noisy captions")
    parser.add_argument(
        "--output", type=Path, default=Path("demo"), metavar="DIR", help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")


def _demo(args: argparse.Namespace) -> None:
    from ..miniature.demo import run_demo

    run_demo(output=args.output, quick=args.quick, seed=args.seed, control=args.control)


DEMO = Command("demo", "the whole journey in miniature, on a CPU, offline", _demo_arguments, _demo)
