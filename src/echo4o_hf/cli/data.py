"""`echo4o data`: build, stats, export, overlap."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .command import Command, Group

SUBSETS = ("surreal_fantasy", "multi_reference", "instruction_following")


def _source_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command of `echo4o data` reads."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data-dir", metavar="DIR", help="Echo-4o-Image as downloaded, as extracted, or as built; default: the Hub"
    )
    source.add_argument(
        "--revision", metavar="REV", help="commit, tag or branch of the Hub's repository; default: main"
    )
    parser.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="what to do with broken rows: stop and list them, or leave them out and list them (default: %(default)s)",
    )


def _subset_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--subset", action="append", dest="subsets", choices=SUBSETS, help="repeat it for several (default: all three)"
    )


def _without_run(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a command that are the parameters of its function."""
    return {name: value for name, value in vars(args).items() if name != "run"}


def _build_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write; run again to go on after a stop")
    _source_arguments(parser)
    _subset_argument(parser)
    parser.add_argument(
        "--max-shard-size", default="500MB", metavar="SIZE", help="of a Parquet file (default: %(default)s)"
    )
    parser.add_argument(
        "--overlap", type=Path, metavar="FILE", help="what `echo4o data overlap --output` wrote, for the card's table"
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="also upload to this repository, such as me/name")
    parser.add_argument("--private", action="store_true", help="make that repository a private one")


def _build(args: argparse.Namespace) -> None:
    from ..data.build import build

    if args.overlap:
        args.overlap = json.loads(args.overlap.read_text(encoding="utf-8"))
    for subset, number in build(**_without_run(args)).items():
        print(f"{subset}: {number} rows")
    print(args.output)


def _stats_arguments(parser: argparse.ArgumentParser) -> None:
    _source_arguments(parser)
    _subset_argument(parser)
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with histograms and samples")


def _stats(args: argparse.Namespace) -> None:
    from ..data.stats import stats, table, write_html

    found = stats(args.data_dir, subsets=args.subsets, revision=args.revision, on_error=args.on_error)
    print(table(found))
    if args.html:
        write_html(found, args.html)
        print(args.html)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "format",
        metavar="FORMAT",
        choices=("bagel", "webdataset", "imagefolder", "jsonl"),
        help="bagel (the official trainer's), webdataset, imagefolder or jsonl",
    )
    parser.add_argument(
        "output",
        type=Path,
        metavar="OUTPUT",
        help="folder to write; OUTPUT.report.json beside it says what was left out",
    )
    _source_arguments(parser)
    parser.add_argument("--subset", choices=(*SUBSETS, "all"), default="all", help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in OUTPUT")
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help="of a file of bagel or webdataset, about (default: 500MB)"
    )


def _export(args: argparse.Namespace) -> None:
    from ..data.export import export

    report = export(**_without_run(args))
    for name, reason in report.left_out:
        print(f"left out: {name}: {reason}")
    print(f"{report.rows} rows, {len(report.left_out)} left out")
    print(args.output)


def _overlap_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--benchmark",
        action="append",
        required=True,
        dest="benchmarks",
        metavar="NAME[=FILE]",
        help="geneval_pp, imagine_bench, shapes_140, or any name with a file of JSON lines; repeat it for several",
    )
    _source_arguments(parser)
    _subset_argument(parser)
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.7,
        metavar="J",
        help="Jaccard similarity of n-grams from which two texts are near (default: %(default)s)",
    )
    parser.add_argument("--ngram", type=int, default=3, metavar="N", help="tokens of one (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the figures and all pairs as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with the pairs")
    parser.add_argument("--drop", type=Path, metavar="OUTPUT", help="also write a copy without the rows found")


def _benchmark_file(benchmark: str) -> tuple[str, Path]:
    """The name and the file of prompts; the official benchmarks' are downloaded once."""
    name, equals, path = benchmark.partition("=")
    if equals and name and path:
        return name, Path(path)
    from ..benchmarks.items import ITEMS, pinned_path

    if benchmark == "shapes_140":
        return benchmark, Path(__file__).parents[1] / "miniature" / "items.jsonl"
    if benchmark in ITEMS:
        return benchmark, pinned_path(ITEMS[benchmark], f"--benchmark {benchmark}=FILE")
    raise ValueError(f"--benchmark {benchmark!r} is none of {', '.join([*ITEMS, 'shapes_140'])}: give NAME=FILE")


def _overlap(args: argparse.Namespace) -> None:
    from ..data.overlap import drop, overlap, table, write_html, write_report

    report = overlap(
        args.data_dir,
        dict(map(_benchmark_file, args.benchmarks)),
        subsets=args.subsets,
        revision=args.revision,
        on_error=args.on_error,
        threshold=args.threshold,
        ngram=args.ngram,
    )
    print(table(report))
    if args.output:
        write_report(report, args.output)
        print(args.output)
    if args.html:
        write_html(report, args.html)
        print(args.html)
    if args.drop:
        drop(report, args.drop, args.data_dir, revision=args.revision, on_error=args.on_error)
        print(args.drop)


def _naming_options(run: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """A command whose errors name its options, not the parameters of the functions behind it."""

    def run_and_name(args: argparse.Namespace) -> None:
        try:
            run(args)
        except (ValueError, OSError) as error:
            if len(error.args) == 1:
                text = re.sub(r"(?<![\w/.-])data_dir(?!\.?[\w/-])", "--data-dir", str(error))
                error.args = (re.sub(r"\w+ \((--[\w-]+)\)", r"\1", text),)  # where both are named
            raise

    return run_and_name


COMMANDS = (
    Command("build", "Parquet files that load without this package", _build_arguments, _build),
    Command("stats", "rows, sizes and lengths per subset and category", _stats_arguments, _stats),
    Command("export", "the formats of trainers", _export_arguments, _export),
    Command("overlap", "training instructions that are also prompts of a benchmark", _overlap_arguments, _overlap),
)


DATA = Group(
    "data",
    "Echo-4o-Image: build, describe, export, compare with benchmarks",
    tuple(command._replace(run=_naming_options(command.run)) for command in COMMANDS),
)
