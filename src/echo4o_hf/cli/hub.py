"""`echo4o hub`: metric."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command import BENCHMARKS, Command, Group


def _hub_metric_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", choices=BENCHMARKS, help=" or ".join(BENCHMARKS))
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--push-to-hub", metavar="REPO", help="also upload to this Space, such as me/geneval_pp")


def _hub_metric(args: argparse.Namespace) -> None:
    from ..benchmarks.space import write_space

    for path in write_space(args.name, args.output, args.push_to_hub):
        print(path)


METRIC = Command("metric", "the Space of a metric", _hub_metric_arguments, _hub_metric)
HUB = Group("hub", "folders for the Hub", (METRIC,))
