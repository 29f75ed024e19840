"""The `echo4o` command. Each command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import __version__

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
BENCHMARKS = ("geneval_pp", "imagine_bench")
SUBSETS = ("surreal_fantasy", "multi_reference", "instruction_following")


class Command(NamedTuple):
    """One word after `echo4o`, or after the name of a group."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


class Group(NamedTuple):
    """One word after `echo4o` that a command's name follows."""

    name: str
    help: str
    commands: tuple[Command, ...]


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
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to draw")
    what.add_argument("--benchmark", choices=BENCHMARKS, help="draw the prompts of a benchmark's items")
    parser.add_argument(
        "--model",
        required=True,
        help="folder, name on the Hub, or echo4o-miniature; with --benchmark also any pipeline of diffusers",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="PNG file to write; with --benchmark a folder, where what is there already stays",
    )
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
    parser.add_argument("--num-images", type=int, metavar="N", help="more than one: OUT gets an index (default: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, else float32")
    group = parser.add_argument_group("with --benchmark")
    group.add_argument("--items", type=Path, metavar="FILE", help="JSON lines (default: the benchmark's own)")
    group.add_argument("--images-per-prompt", type=int, metavar="N", help="default: 1")
    group.add_argument("--batch-size", type=int, metavar="N", help="pictures at the same time (default: 1)")
    group.add_argument(
        "--pipeline-argument",
        action="append",
        dest="pipeline_arguments",
        type=_name_and_value,
        metavar="NAME=VALUE",
        help="of the pipeline's call, such as negative_prompt=blurry; repeat it for several",
    )


PIPELINE_OPTIONS = (
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "image_guidance_scale",
    "thinking",
    "max_think_tokens",
)
ONLY_WITH_A_PROMPT = ("image", "num_images")
ONLY_WITH_A_BENCHMARK = ("items", "images_per_prompt", "batch_size", "pipeline_arguments")


def _generate(args: argparse.Namespace) -> None:
    for name in ONLY_WITH_A_PROMPT if args.benchmark else ONLY_WITH_A_BENCHMARK:
        if getattr(args, name) is not None:
            option = f"--{name.removesuffix('s') if name == 'pipeline_arguments' else name}".replace("_", "-")
            raise ValueError(f"{option} goes {'with PROMPT, not with' if args.benchmark else 'only with'} --benchmark")
    given = {name: getattr(args, name) for name in PIPELINE_OPTIONS if getattr(args, name) is not None}
    if args.benchmark:
        _generate_benchmark(args, given)
    else:
        _generate_prompt(args, given)


def _device_and_dtype(args: argparse.Namespace) -> tuple[torch.device, str]:
    import torch

    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {args.device!r} is not a device of torch, such as cpu, cuda or cuda:1") from error
    return device, args.dtype or ("bfloat16" if device.type == "cuda" else "float32")


def _generate_benchmark(args: argparse.Namespace, given: dict[str, Any]) -> None:
    arguments = args.pipeline_arguments or []
    for name, value in arguments:
        if name in given:
            raise ValueError(f"{name} is given twice: {given[name]!r} and {value!r}")
        given[name] = value
    from .benchmarks.items import load_items
    from .pipeline.samples import draw_samples

    items = load_items(args.benchmark, args.items)
    key = "prompt" if args.benchmark == "geneval_pp" else "instruction"
    device, dtype = _device_and_dtype(args)
    new, kept = draw_samples(
        args.model,
        {item.get("id", place): item[key] for place, item in enumerate(items)},
        args.output,
        samples_per_prompt=1 if args.images_per_prompt is None else args.images_per_prompt,
        batch_size=1 if args.batch_size is None else args.batch_size,
        seed=args.seed,
        arguments=given,
        dtype=dtype,
        device=device,
    )
    print(f"{new} drawn, {kept} were there already")
    print(args.output)


def _generate_prompt(args: argparse.Namespace, given: dict[str, Any]) -> None:
    if args.output.suffix.lower() != ".png":
        raise ValueError(f"OUT must end in .png, got {str(args.output)!r}")
    import torch
    from PIL import Image

    from .pipeline.pipeline_echo4o import Echo4oPipeline
    from .pipeline.samples import save_png

    device, dtype = _device_and_dtype(args)
    number = 1 if args.num_images is None else args.num_images
    references = [Image.open(path) for path in args.image or []]
    pipe = Echo4oPipeline.from_pretrained(args.model, dtype=getattr(torch, dtype)).to(device)
    result = pipe(
        args.prompt,
        image=references or None,
        num_images_per_prompt=number,
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
        **{name: given.get(name, defaults[name].default) for name in PIPELINE_OPTIONS},
        "dtype": dtype,
        "software": f"echo4o-hf {__version__}",
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(result.images):
        path = args.output if number == 1 else args.output.with_stem(f"{args.output.stem}-{index}")
        save_png(image, path, {**settings, "index": index})
        print(path)


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
    parser.add_argument("--push-to-hub", metavar="REPO", help="also upload to this repository, such as me/name")
    parser.add_argument("--private", action="store_true", help="make that repository a private one")


def _build(args: argparse.Namespace) -> None:
    from .data.build import build

    for subset, number in build(**_without_run(args)).items():
        print(f"{subset}: {number} rows")
    print(args.output)


def _stats_arguments(parser: argparse.ArgumentParser) -> None:
    _source_arguments(parser)
    _subset_argument(parser)
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with histograms and samples")


def _stats(args: argparse.Namespace) -> None:
    from .data.stats import stats, table, write_html

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
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write")
    _source_arguments(parser)
    parser.add_argument("--subset", choices=(*SUBSETS, "all"), default="all", help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in OUTPUT")
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help="of a file of bagel or webdataset, about (default: 500MB)"
    )


def _export(args: argparse.Namespace) -> None:
    from .data.export import export

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
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with the pairs")
    parser.add_argument("--drop", type=Path, metavar="OUTPUT", help="also write a copy without the rows found")


def _benchmark_file(benchmark: str) -> tuple[str, Path]:
    """The name and the file of prompts; the official benchmarks' are downloaded once."""
    name, equals, path = benchmark.partition("=")
    if equals and name and path:
        return name, Path(path)
    from .benchmarks.items import ITEMS, pinned_path

    if benchmark == "shapes_140":
        return benchmark, Path(__file__).parent / "miniature" / "items.jsonl"
    if benchmark in ITEMS:
        return benchmark, pinned_path(ITEMS[benchmark], f"--benchmark {benchmark}=FILE")
    raise ValueError(f"--benchmark {benchmark!r} is none of {', '.join([*ITEMS, 'shapes_140'])}: give NAME=FILE")


def _overlap(args: argparse.Namespace) -> None:
    from .data.overlap import drop, overlap, table, write_html

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
    if args.html:
        write_html(report, args.html)
        print(args.html)
    if args.drop:
        drop(report, args.drop, args.data_dir, revision=args.revision, on_error=args.on_error)
        print(args.drop)


DATA_COMMANDS = (
    Command("build", "Parquet files that load without this package", _build_arguments, _build),
    Command("stats", "rows, sizes and lengths per subset and category", _stats_arguments, _stats),
    Command("export", "the formats of trainers", _export_arguments, _export),
    Command("overlap", "training instructions that are also prompts of a benchmark", _overlap_arguments, _overlap),
)


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
        "--judge",
        action="append",
        required=True,
        dest="judges",
        metavar="JUDGE",
        help="openai:MODEL, hf:MODEL, transformers:MODEL, shapes or scripted:FILE; repeat it for several judges",
    )
    parser.add_argument(
        "--judge-option",
        action="append",
        default=[],
        dest="judge_options",
        type=_name_and_value,
        metavar="NAME=VALUE",
        help="of every judge, such as max_tokens=2048 or base_url=http://localhost:8000/v1; repeat it for several",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="results to write, as JSON")
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
    parser.add_argument(
        "--numbering",
        choices=("0", "1", "id"),
        help="what names count from, where that is open; id: the items' own ids",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the intervals' resampling (default: %(default)s)"
    )


def _name_and_value(text: str) -> tuple[str, Any]:
    """`NAME=VALUE`, the value being JSON or else a text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _evaluate(args: argparse.Namespace) -> None:
    from .benchmarks.evaluation import evaluate_images, load_judges
    from .benchmarks.images import find_images
    from .benchmarks.items import load_items
    from .benchmarks.results import write_results
    from .judges.judge import JudgeStopped

    items = load_items(args.benchmark, args.items)
    pictures = find_images(args.images, items, args.numbering)
    store = args.store or args.output.parent / "verdicts.sqlite"
    try:
        results = evaluate_images(
            args.benchmark,
            pictures,
            items,
            judge=load_judges(args.judges, args.benchmark, args.protocol, dict(args.judge_options)),
            protocol=args.protocol,
            repeats=args.repeats,
            store=store,
            concurrency=args.concurrency,
            seed=args.seed,
            judge_text=args.judge_text,
        )
    except JudgeStopped as error:
        raise ValueError(f"{error} (replies so far are in {store})") from error
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
        print(f"{judge['name']}: {judge['calls']} calls, {judge['from_store']} replies from the store")
    verdicts = [image["verdict"] for item in results["items"] for image in item["images"]]
    for why, number in Counter(verdict["unscored"] for verdict in verdicts if verdict["unscored"]).most_common(5):
        print(f"{number} unscored: {why}")
    for deviation in results["deviations"]:
        print(f"not as published: {deviation}")


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

    from .benchmarks.evaluation import BENCHMARKS, ITEMS_SHA256, read_results
    from .benchmarks.statistics import compare
    from .report import model_index, report, tables
    from .report.runs import Comparison, Run

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


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    """For a command that is its name."""


def _install_metrics(args: argparse.Namespace) -> None:
    from .benchmarks.metrics import install_metrics

    for path in install_metrics():
        print(path)


def _hub_metric_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", choices=BENCHMARKS, help=" or ".join(BENCHMARKS))
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--push-to-hub", metavar="REPO", help="also upload to this Space, such as me/geneval_pp")


def _hub_metric(args: argparse.Namespace) -> None:
    from .benchmarks.space import write_space

    for path in write_space(args.name, args.output, args.push_to_hub):
        print(path)


HUB_COMMANDS = (Command("metric", "the Space of a metric", _hub_metric_arguments, _hub_metric),)

COMMANDS = (
    Command("demo", "the whole journey in miniature, on a CPU, offline", _demo_arguments, _demo),
    Command("generate", "pictures from a prompt, or of a benchmark's prompts", _generate_arguments, _generate),
    Command("convert", "a checkpoint from the official layout to ours, or back", _convert_arguments, _convert),
    Group("data", "Echo-4o-Image: build, describe, export, compare with benchmarks", DATA_COMMANDS),
    Command("evaluate", "pictures of a benchmark's items, judged and scored", _evaluate_arguments, _evaluate),
    Command("report", "results as a page with all pictures, as tables, or as metadata", _report_arguments, _report),
    Command("install-metrics", "let evaluate.load find the metrics", _no_arguments, _install_metrics),
    Group("hub", "folders for the Hub", HUB_COMMANDS),
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="echo4o", description="Echo-4o (Bagel) with transformers and diffusers.")
    parser.add_argument("--version", action="version", version=f"echo4o-hf {__version__}")
    _add_commands(parser, COMMANDS)
    return parser


def _add_commands(parser: argparse.ArgumentParser, commands: Sequence[Command | Group]) -> None:
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in commands:
        subparser = subparsers.add_parser(
            command.name, help=command.help, description=command.help[0].upper() + command.help[1:] + "."
        )
        if isinstance(command, Group):
            _add_commands(subparser, command.commands)
        else:
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)


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


if __name__ == "__main__":  # accelerate launch -m echo4o_hf.cli
    sys.exit(main())
