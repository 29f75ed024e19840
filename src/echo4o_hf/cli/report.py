"""`echo4o report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .command import Command


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS", help="files that echo4o evaluate wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="file to write")
    parser.add_argument(
        "--format",
        choices=("html", "markdown", "latex", "model-index"),
        default="html",
        help="a page with all pictures, tables, or metadata of a model card (default: %(default)s)",
    )
    parser.add_argument(
        "--name",
        action="append",
        dest="names",
        metavar="NAME",
        help="of the model: one for all files, or one for each (default: from the files' names)",
    )
    parser.add_argument("--title", default="Evaluation", help="of the page (default: %(default)s)")


def _report(args: argparse.Namespace) -> None:
    from itertools import combinations

    from ..benchmarks.evaluation import BENCHMARKS, ITEMS_SHA256, read_results
    from ..benchmarks.statistics import compare
    from ..report import model_index, report, tables
    from ..report.runs import Comparison, Run

    names = _run_names(args.results, args.names)
    runs = [Run(name, read_results(path), path.parent) for name, path in zip(names, args.results, strict=True)]
    published = {(name, "official", ITEMS_SHA256[name]): module.PUBLISHED for name, module in BENCHMARKS.items()}
    comparisons = [
        Comparison(first, second, compare(first.results, second.results, first.results["seed"]))
        for first, second in combinations(runs, 2)
        if first.question == second.question and first.question[0] in BENCHMARKS
    ]
    if args.format == "html":
        absent = report.write_report(runs, args.output, title=args.title, published=published, comparisons=comparisons)
        for problem in absent[:5]:
            print(f"not shown: {problem}", file=sys.stderr)
        if absent[5:]:
            print(f"{len(absent)} pictures are not shown", file=sys.stderr)
    elif args.format == "model-index":
        model_index.write_model_index(runs, args.output, published)
    else:
        tables.write_tables(runs, args.output, args.format, published=published, comparisons=comparisons)
    print(args.output)


def _run_names(paths: Sequence[Path], names: Sequence[str] | None) -> list[str]:
    """What the report calls each file's model."""
    if names and len(names) not in (1, len(paths)):
        raise ValueError(f"--name was given {len(names)} times for {len(paths)} files; give it once, or for each")
    if names:
        return list(names) * len(paths) if len(names) == 1 else list(names)
    stems = [path.stem for path in paths]
    return [f"{path.resolve().parent.name}/{path.stem}" if stems.count(path.stem) > 1 else path.stem for path in paths]


REPORT = Command(
    "report", "results as a page with all pictures, as tables, or as metadata", _report_arguments, _report
)
