"""`echo4o evaluate` and `echo4o install-metrics`."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .command import BENCHMARKS, Command, name_and_value


class _AddJudge(argparse.Action):
    """A judge with the options so far."""

    def __call__(self, parser: object, namespace: argparse.Namespace, value: Any, option: str | None = None) -> None:
        namespace.judges = [*(namespace.judges or []), (value, namespace.judge_options)]


class _AddJudgeOption(argparse.Action):
    """An option of the last judge, or of all to come."""

    def __call__(self, parser: object, namespace: argparse.Namespace, value: Any, option: str | None = None) -> None:
        given = dict([value])
        if namespace.judges:
            spec, options = namespace.judges[-1]
            namespace.judges = [*namespace.judges[:-1], (spec, {**options, **given})]
        else:
            namespace.judge_options = {**namespace.judge_options, **given}


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", metavar="BENCHMARK", choices=BENCHMARKS, help=" or ".join(BENCHMARKS))
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        metavar="DIR",
        help="1.png, 00001.jpg, 1_0.webp or 00000/samples/00000.png",
    )
    parser.add_argument("--items", type=Path, metavar="FILE", help="JSON lines (default: the benchmark's own)")
    parser.add_argument(
        "--numbering",
        choices=("0", "1", "id"),
        help="what names count from, where that is open; id: the items' own ids",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="results to write, as JSON")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the intervals' resampling (default: %(default)s)"
    )
    _judging_arguments(parser)


def _judging_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--judge",
        action=_AddJudge,
        required=True,
        dest="judges",
        metavar="JUDGE",
        help="openai:MODEL, hf:MODEL, transformers:MODEL, shapes or scripted:FILE; repeat it for several judges",
    )
    parser.add_argument(
        "--judge-option",
        action=_AddJudgeOption,
        default={},
        dest="judge_options",
        type=name_and_value,
        metavar="NAME=VALUE",
        help="of the judge before it, or of all judges after it where it comes first: such as max_tokens=2048, "
        "base_url=http://localhost:8000/v1 or, for the cost, prices=[2,8] of a million tokens in and out; "
        "repeat it for several",
    )
    parser.add_argument(
        "--store",
        type=Path,
        metavar="FILE",
        help="keeps every reply; what it holds is not asked again (default: verdicts.sqlite beside the results)",
    )
    parser.add_argument(
        "--protocol",
        choices=("official", "strict"),
        default="official",
        help="the published wording, or a verdict for each clause, under a name of its own (default: %(default)s)",
    )
    parser.add_argument(
        "--judge-text", type=Path, metavar="FILE", help="a copy of the official script, for its wording"
    )
    parser.add_argument(
        "--concurrency", type=int, default=16, metavar="N", help="requests at the same time (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="how often to ask about a picture (default: %(default)s)"
    )


def _evaluate(args: argparse.Namespace) -> None:
    from ..benchmarks.evaluation import evaluate_images, load_judges
    from ..benchmarks.images import find_images
    from ..benchmarks.items import load_items
    from ..benchmarks.results import write_results
    from ..judges.judge import JudgeStopped

    items = load_items(args.benchmark, args.items)
    pictures = find_images(args.images, items, args.numbering)
    store = args.store or args.output.parent / "verdicts.sqlite"
    try:
        results = evaluate_images(
            args.benchmark,
            pictures,
            items,
            judge=[
                judge
                for spec, options in args.judges
                for judge in load_judges(spec, args.benchmark, args.protocol, options)
            ],
            protocol=args.protocol,
            repeats=args.repeats,
            store=store,
            concurrency=args.concurrency,
            seed=args.seed,
            judge_text=args.judge_text,
        )
    except JudgeStopped as error:
        raise ValueError(f"{error} (replies so far are in {store})" if store.is_file() else str(error)) from error
    write_results(results, args.output)
    _print_scores(results)
    print(args.output)
    images = [image for item in results["items"] for image in item["images"]]
    if all(judgement["score"] is None for image in images for judgement in image["judgements"]):
        raise ValueError(f"nothing could be judged; the first picture: {images[0]['verdict']['unscored']}")


def _print_scores(results: Mapping[str, Any]) -> None:
    """The scores, what is unscored and why, and what sets them apart from published ones."""
    scores = results["scores"]
    for name, value in scores.items():
        if name.endswith("confidence_interval"):
            continue
        rows = value.items() if isinstance(value, dict) else [("", value)]
        for part, number in rows:
            shown = f"{number:.3f}" if isinstance(number, float) else str(number)
            print(f"{name} {part}".strip().ljust(44), shown)
    if interval := scores["confidence_interval"]:
        print("confidence_interval".ljust(44), f"{interval[0]:.3f} to {interval[1]:.3f}")
    for judge in results["judges"]:
        print(f"{judge['name']}: {', '.join(_usage(judge))}")
    verdicts = [image["verdict"] for item in results["items"] for image in item["images"]]
    for why, number in Counter(verdict["unscored"] for verdict in verdicts if verdict["unscored"]).most_common(5):
        print(f"{number} unscored: {why}")
    for deviation in results["deviations"]:
        print(f"not as published: {deviation}")


def _usage(judge: Mapping[str, Any]) -> Iterator[str]:
    """What a judge was asked, and what that cost."""
    yield f"{judge['calls']} calls"
    yield f"{judge['from_store']} replies from the store"
    if judge["input_tokens"] or judge["output_tokens"]:
        yield f"{judge['input_tokens']} tokens in"
        yield f"{judge['output_tokens']} out"
    if judge["cost"] is not None:
        yield f"estimated cost {judge['cost']:.4f} ({judge['total_cost']:.4f} with what the store holds)"


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    """For a command that is its name."""


def _install_metrics(args: argparse.Namespace) -> None:
    from ..benchmarks.metrics import install_metrics

    for path in install_metrics():
        print(path)


EVALUATE = Command("evaluate", "pictures of a benchmark's items, judged and scored", _evaluate_arguments, _evaluate)
INSTALL_METRICS = Command("install-metrics", "let evaluate.load find the metrics", _no_arguments, _install_metrics)
