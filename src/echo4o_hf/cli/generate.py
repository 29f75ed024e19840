"""`echo4o generate`."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .command import BENCHMARKS, Command, name_and_value
from .loading import add_adapter_argument, add_loading_arguments, read_adapters, read_source

if TYPE_CHECKING:
    from ..pipeline.prompt_file import Request
    from ..pipeline.samples import Sample
    from ..pipeline.source import Source

RENORMS = ("global", "channel", "text_channel")
MAX_GRID = 256  # pictures; larger grids are more than Pillow opens without a warning


def seeds_of(text: str) -> list[int]:
    """`3`, `0,1,2`, `8-11` and `0-2,7`."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or bool(dash) != last.isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} is not like 7, 0,1,2 or 0-3")
        if last and int(last) < int(first):
            raise argparse.ArgumentTypeError(f"{part!r} ends below where it begins; write {last}-{first}")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to draw")
    what.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='a prompt per line, or JSON such as {"prompt": "...", "images": ["a.png"], "seed": 7, "height": 512}',
    )
    what.add_argument("--benchmark", choices=BENCHMARKS, help="draw the prompts of a benchmark's items")
    add_loading_arguments(
        parser, "folder, name on the Hub, or echo4o-miniature; with --benchmark also any pipeline of diffusers"
    )
    add_adapter_argument(parser)
    parser.add_argument("--compile", action="store_true", help="compile the layers that draw, with torch.compile")
    parser.add_argument(
        "--cache-interval",
        type=int,
        metavar="N",
        help="evaluate the model at one of N updates and forecast the others: faster, not exact",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="PNG file to write; with --prompts, --seeds or --benchmark a folder, where what is there already stays",
    )
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        help="reference picture; repeat it for several, the last one sets the size",
    )
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    seeds.add_argument(
        "--seeds", type=seeds_of, nargs="+", metavar="N", help="a picture of each prompt for each: 0 1 7, or 0-3,7"
    )
    parser.add_argument("--grid", type=Path, metavar="FILE", help="PNG of all pictures, a row per prompt")
    parser.add_argument("--batch-size", type=int, metavar="N", help="pictures at the same time (default: 1)")
    _pipeline_arguments(parser.add_argument_group("of the drawing; a line of --prompts may have its own"))
    group = parser.add_argument_group("with --benchmark")
    group.add_argument("--items", type=Path, metavar="FILE", help="JSON lines (default: the benchmark's own)")
    group.add_argument("--images-per-prompt", type=int, metavar="N", help="default: 1")
    group.add_argument(
        "--pipeline-argument",
        action="append",
        dest="pipeline_arguments",
        type=name_and_value,
        metavar="NAME=VALUE",
        help="of the pipeline's call, such as negative_prompt=blurry; repeat it for several",
    )


def _pipeline_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--height", type=int, metavar="N", help="pixels")
    group.add_argument("--width", type=int, metavar="N", help="pixels")
    group.add_argument("--steps", type=int, dest="num_inference_steps", metavar="N", help="updates of the latents")
    group.add_argument("--guidance-scale", type=float, metavar="S", help="towards the prompt")
    group.add_argument("--image-guidance-scale", type=float, metavar="S", help="towards the reference pictures")
    group.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("START", "END"), help="timesteps at which guidance acts"
    )
    group.add_argument("--guidance-renorm", choices=RENORMS, help="the norm that guidance may not exceed")
    group.add_argument("--guidance-renorm-min", type=float, metavar="F", help="shrink by no smaller factor")
    group.add_argument("--thinking", action="store_true", default=None, help="write a plan first, and print it")
    group.add_argument("--max-think-tokens", type=int, metavar="N", help="length of the plan at most")


PIPELINE_OPTIONS = (
    "height",
    "width",
    "num_inference_steps",
    "guidance_scale",
    "image_guidance_scale",
    "guidance_interval",
    "guidance_renorm",
    "guidance_renorm_min",
    "thinking",
    "max_think_tokens",
)
ONLY_WITH_A_BENCHMARK = ("items", "images_per_prompt", "pipeline_arguments")


def _generate(args: argparse.Namespace) -> None:
    args.seeds = None if args.seeds is None else [seed for some in args.seeds for seed in some]
    given = {name: getattr(args, name) for name in PIPELINE_OPTIONS if getattr(args, name) is not None}
    if args.benchmark:
        _refuse(args, ("image",), "goes with PROMPT, not with --benchmark")
        _refuse(args, ("seeds", "grid"), "goes with PROMPT or --prompts, not with --benchmark")
        _generate_benchmark(args, given)
        return
    _refuse(args, ONLY_WITH_A_BENCHMARK, "goes only with --benchmark")
    if args.prompts:
        _refuse(args, ("image",), 'goes with PROMPT; lines of --prompts have "images"')
        _generate_folder(args, given)
    elif args.seeds:
        _generate_folder(args, given)
    else:
        _refuse(args, ("grid",), "goes with --prompts or --seeds")
        _refuse(args, ("batch_size",), "goes with --prompts, --seeds or --benchmark")
        _generate_prompt(args, given)


def _refuse(args: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            option = name.removesuffix("s") if name == "pipeline_arguments" else name
            raise ValueError(f"--{option.replace('_', '-')} {why}")


def _generate_benchmark(args: argparse.Namespace, given: dict[str, Any]) -> None:
    arguments = args.pipeline_arguments or []
    for name, value in arguments:
        if name in given:
            raise ValueError(f"{name} is given twice: {given[name]!r} and {value!r}")
        given[name] = value
    from ..benchmarks.items import load_items
    from ..pipeline.pipeline_echo4o import Echo4oPipeline
    from ..pipeline.prompt_file import Request
    from ..pipeline.samples import draw_samples, find_pipeline_class

    items = load_items(args.benchmark, args.items)
    key = "prompt" if args.benchmark == "geneval_pp" else "instruction"
    prompts = {item.get("id", place): item[key] for place, item in enumerate(items)}
    if find_pipeline_class(args.model) is Echo4oPipeline:
        _check(args, [Request(prompt, number) for number, prompt in prompts.items()], given, "item")
    new, kept = draw_samples(
        _source(args),
        prompts,
        args.output,
        samples_per_prompt=1 if args.images_per_prompt is None else args.images_per_prompt,
        batch_size=1 if args.batch_size is None else args.batch_size,
        seed=args.seed,
        arguments=given,
    )
    print(f"{new} drawn, {kept} were there already")
    print(args.output)


def _generate_folder(args: argparse.Namespace, given: dict[str, Any]) -> None:
    if args.output.suffix.lower() == ".png":
        raise ValueError(f"OUT must be a folder with --prompts or --seeds, got {str(args.output)!r}")
    from ..pipeline.samples import draw_missing

    samples = _samples(args, given)
    if args.grid:
        _check_grid(args, samples)
    new, kept = draw_missing(samples, args.output, _source(args), 1 if args.batch_size is None else args.batch_size)
    print(f"{new} drawn, {kept} were there already")
    print(args.output)
    if args.grid:
        _write_grid(args, samples)


def _samples(args: argparse.Namespace, given: dict[str, Any]) -> list[Sample]:
    from ..pipeline.samples import Sample

    samples = []
    for request in _requests(args, given):
        if request.seed is not None and args.seeds:
            raise ValueError(f"{args.prompts}, line {request.line} has a seed of its own: leave it out, or --seeds")
        seeds = args.seeds or [args.seed if request.seed is None else request.seed]
        arguments = {**given, **request.arguments}
        samples += [
            Sample(request.line, seed, request.prompt, seed, seed, arguments, request.references) for seed in seeds
        ]
    return samples


def _requests(args: argparse.Namespace, given: dict[str, Any]) -> list[Request]:
    """What to draw, checked with all that is known of a model without its weights."""
    from ..pipeline.prompt_file import Request, check_seed, read_prompt_file
    from ..pipeline.samples import find_pipeline_class

    if args.prompts:
        requests = read_prompt_file(args.prompts)
    else:
        requests = [Request(args.prompt, references=tuple(args.image or []))]
    for seed in args.seeds or [args.seed]:
        check_seed(seed)
    if args.seeds and len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds names a seed twice: {', '.join(map(str, args.seeds))}")
    pipeline_class = find_pipeline_class(args.model)
    if pipeline_class.__name__ != "Echo4oPipeline":
        raise ValueError(f"{args.model} is a {pipeline_class.__name__}, which draws only with --benchmark")
    _check(args, requests, given, f"{args.prompts}, line" if args.prompts else None)
    return requests


def _check(args: argparse.Namespace, requests: list[Request], given: dict[str, Any], place: str | None) -> None:
    """Refuse what Echo-4o cannot draw before its weights are read; the error begins with `place` and the line."""
    from ..model.configuration_bagel import BagelConfig
    from ..model.processing_bagel import BagelProcessor
    from ..pipeline.prompt_file import check_request

    processor, config = BagelProcessor.from_pretrained(args.model), BagelConfig.from_pretrained(args.model)
    for request in requests:
        try:
            check_request(request, {**given, **request.arguments}, config, processor)
        except (ValueError, OSError) as error:
            raise ValueError(f"{place} {request.line}: {error}" if place else str(error)) from error


def _source(args: argparse.Namespace) -> Source:
    if args.cache_interval is not None and args.cache_interval < 2:
        raise ValueError(f"--cache-interval {args.cache_interval} must be at least 2; without it, all are evaluated")
    return read_source(args, read_adapters(args), args.compile, args.cache_interval)


def _check_grid(args: argparse.Namespace, samples: list[Sample]) -> None:
    if args.grid.suffix.lower() != ".png":
        raise ValueError(f"--grid must end in .png, got {str(args.grid)!r}")
    if args.grid.resolve() in {(args.output / sample.file_name).resolve() for sample in samples}:
        raise ValueError(f"--grid {args.grid} is the name of a picture: choose another one")
    if len(samples) > MAX_GRID:
        raise ValueError(f"--grid holds {MAX_GRID} pictures at most, these are {len(samples)}: draw them without")


def _write_grid(args: argparse.Namespace, samples: list[Sample]) -> None:
    from accelerate import PartialState

    from ..pipeline.records import replaced
    from ..pipeline.samples import read_picture
    from ..training.grid import picture_grid

    state = PartialState()
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    columns = len(args.seeds or [args.seed])
    captions = [sample.prompt for sample in samples]
    if columns > 1:
        captions = [
            f"seed {sample.seed}" + ("" if place % columns else f": {sample.prompt}")
            for place, sample in enumerate(samples)
        ]
    pictures = [read_picture(args.output / sample.file_name) for sample in samples]
    args.grid.parent.mkdir(parents=True, exist_ok=True)
    with replaced(args.grid) as partial:
        picture_grid(pictures, captions, columns).save(partial, format="PNG")
    print(args.grid)


def _generate_prompt(args: argparse.Namespace, given: dict[str, Any]) -> None:
    if args.output.suffix.lower() != ".png":
        raise ValueError(f"OUT must end in .png, got {str(args.output)!r}; with --seeds it is a folder")
    import torch

    from ..pipeline.pipeline_echo4o import Echo4oPipeline
    from ..pipeline.records import save_png
    from ..pipeline.samples import read_picture

    (request,) = _requests(args, given)
    source = _source(args)
    more = {**source.extras(), **source.fingerprints()}
    pipe = source.load(Echo4oPipeline)
    pipe.set_progress_bar_config(disable=False)
    result = pipe(
        request.prompt,
        image=[read_picture(path) for path in request.references] or None,
        generator=torch.Generator().manual_seed(args.seed),
        **given,
    )
    for text in result.texts or []:
        print(text)

    defaults = inspect.signature(Echo4oPipeline.__call__).parameters
    settings = {
        "prompt": request.prompt,
        "references": [str(path) for path in request.references],
        "model": args.model,
        "seed": args.seed,
        **{name: given.get(name, defaults[name].default) for name in PIPELINE_OPTIONS},
        "dtype": source.dtype,
        **more,
        "software": f"echo4o-hf {__version__}",
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_png(result.images[0], args.output, settings)
    print(args.output)


GENERATE = Command("generate", "pictures from a prompt, or of a benchmark's prompts", _generate_arguments, _generate)
