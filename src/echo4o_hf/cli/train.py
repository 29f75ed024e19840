"""`echo4o train`."""

from __future__ import annotations

import argparse

from .command import Command


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.prefix_chars = ""  # all that follows is for another parser, --help too
    parser.add_argument("arguments", nargs="*")


def _train(args: argparse.Namespace) -> None:
    from ..training.arguments import parse_arguments

    arguments = parse_arguments(args.arguments)
    from ..training.train import train

    train(arguments)


TRAIN = Command("train", "fine-tune: everything, the generation expert, or an adapter", _train_arguments, _train)
