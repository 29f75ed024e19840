"""Pictures of many prompts, from `Echo4oPipeline` or any other text-to-image pipeline of diffusers.

A folder of samples holds `{number}_{sample}.png`, the number being that of the prompt, and `metadata.jsonl` with one
line per picture:
    {"file_name": "17_0.png", "prompt": "…", "number": 17, "sample": 0, "model": "…", "pipeline": "Echo4oPipeline",
     "seed": 0, "parameters": {…}, "dtype": "bfloat16", "device": "cuda", "software": "…"}
and `lora`, `attention`, `compiled`, `cache_interval`, `quantization`, `offload` where there are such; of references,
`parameters` holds names and hashes, `lora_sha256` is of the adapters, `model_fingerprint` of a model in a folder.
The lines are copies of what each picture says in its PNG text; `file_name` is what `load_dataset("imagefolder")`
wants. Where a pipeline says more about a picture (Echo-4o its plan, a safety checker its finding), that is added.

The noise of a picture depends on its own seed alone, which `draw_samples` makes of seed, number and sample: not on
batch, order, process or device. Neither does the picture, but for the rounding of floats, which differs between
devices and between sizes of a batch. What an interrupted run left is drawn in the batches that it would have had.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from ..model.checkpoint import BUNDLED_NAMES
from .pipeline_echo4o import Echo4oPipeline
from .records import JSON_TEXTS, check_others, is_drawn, save_png, write_metadata
from .source import Source

SET_HERE = (
    "prompt",
    "generator",
    "latents",
    "num_images_per_prompt",
    "output_type",
    "return_dict",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
)
OUTPUTS = {"texts": "plan", "nsfw_content_detected": "nsfw_content_detected"}  # of pipelines, and what we call them
JSON_TYPES = (type(None), bool, int, float, str, list, tuple, dict)


@dataclass(frozen=True)
class Sample:
    """A picture to draw.

    Attributes:
        number: of the prompt.
        index: which of the prompt's pictures.
        prompt: the text.
        seed: that its record names.
        noise: the seed of its noise.
        arguments: of the pipeline's call.
        references: pictures that Echo-4o sees before the prompt.
    """

    number: int
    index: int
    prompt: str
    seed: int
    noise: int
    arguments: Mapping[str, Any] = field(default_factory=dict)
    references: tuple[Path, ...] = ()

    @property
    def file_name(self) -> str:
        """Of its picture."""
        return f"{self.number}_{self.index}.png"


class Drawn(NamedTuple):
    """How many pictures of this process's share were drawn, and how many were there already."""

    new: int
    kept: int


def draw_samples(
    source: Source,
    prompts: Mapping[int, str],
    folder: Path,
    *,
    samples_per_prompt: int = 1,
    batch_size: int = 1,
    seed: int = 0,
    arguments: Mapping[str, Any] | None = None,
) -> Drawn:
    """Draw several pictures of each prompt, those that are missing in a folder: see `draw_missing`.

    Args:
        source: What draws them.
        prompts: By their numbers.
        folder: Is made where it is missing.
        samples_per_prompt: Pictures of each prompt.
        batch_size: Pictures at the same time.
        seed: With number and sample, of the noise.
        arguments: Of the pipeline's call.
    """
    if samples_per_prompt < 1:
        raise ValueError(f"samples_per_prompt={samples_per_prompt} must be at least 1")
    samples = [
        Sample(number, index, prompt, seed, noise_seed(seed, number, index), arguments or {})
        for number, prompt in prompts.items()
        for index in range(samples_per_prompt)
    ]
    return draw_missing(samples, folder, source, batch_size)


def draw_missing(samples: Sequence[Sample], folder: Path, source: Source, batch_size: int = 1) -> Drawn:
    """Draw what is missing in a folder of samples; processes of `accelerate launch` share the work.

    Args:
        samples: In this order; neighbours with the same arguments are drawn together.
        folder: Is made where it is missing.
        source: What draws them.
        batch_size: Pictures at the same time.

    Raises:
        OSError: the checkpoint or an adapter cannot be read, or a picture not be written.
        ValueError: a number below 1, an argument that the pipeline does not take, or a picture in `folder`, of these
            or with other seeds, that was drawn with other settings.
        KeyboardInterrupt: with how many pictures there are; all of them are whole.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    pipeline_class = find_pipeline_class(source.model)
    settings = {**source.settings(pipeline_class), **source.fingerprints()}
    records = {sample.file_name: _record(sample, settings, pipeline_class) for sample in samples}
    state = PartialState(cpu=torch.device(source.device).type == "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    check_others(folder, records)
    with state.split_between_processes(list(samples)) as mine:
        missing = [sample for sample in mine if not is_drawn(folder / sample.file_name, records[sample.file_name])]
    try:
        if missing:
            pipeline = source.load(pipeline_class)
            with tqdm(total=len(missing), unit="picture", disable=not state.is_main_process) as bar:
                for batch in _batches(missing, batch_size):
                    _draw(pipeline, batch, folder, records)
                    bar.update(len(batch))
    except KeyboardInterrupt:
        there = sum((folder / name).exists() for name in records)
        raise KeyboardInterrupt(
            f"interrupted; {there} of {len(records)} pictures are in {folder}, and the same command goes on"
        ) from None
    finally:
        write_metadata(folder)
    return Drawn(len(missing), len(mine) - len(missing))


def noise_seed(seed: int, number: int, sample: int) -> int:
    """The seed of one picture's noise, of 63 bits."""
    digest = hashlib.sha256(f"{seed}/{number}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def find_pipeline_class(model: str) -> type[DiffusionPipeline]:
    """`Echo4oPipeline`, or the class of diffusers that a saved pipeline names.

    Raises:
        ValueError: the pipeline is of another class, or cannot be given prompts and generators.
    """
    if model in BUNDLED_NAMES and not os.path.isdir(model):
        return Echo4oPipeline
    try:
        name = DiffusionPipeline.load_config(model).get("_class_name")
    except OSError:  # no model_index.json: the official layout, or else Echo4oPipeline says what is missing
        return Echo4oPipeline
    if name == Echo4oPipeline.__name__:
        return Echo4oPipeline
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
        raise ValueError(f"{model} is of the class {name}, which diffusers {version('diffusers')} does not have")
    lacking = {"prompt", "generator"} - inspect.signature(found.__call__).parameters.keys()
    if lacking:
        raise ValueError(f"{name} takes no {' and no '.join(sorted(lacking))}, so it cannot draw prompts from seeds")
    return found


def read_arguments(pipeline_class: type[DiffusionPipeline], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the pipeline's call, as JSON holds them: those given, and the defaults of the others.

    Raises:
        ValueError: one is set by `draw_samples` itself, or the pipeline does not take it.
    """
    parameters = inspect.signature(pipeline_class.__call__).parameters
    named = [name for name, one in parameters.items() if one.kind is not one.VAR_KEYWORD and name != "self"]
    free = [name for name in named if name not in SET_HERE]
    for name in given:
        if name in SET_HERE:
            raise ValueError(f"the pipeline's {name} is set by this command")
        if name not in free:
            near = difflib.get_close_matches(name, free, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it takes {', '.join(free)}"
            raise ValueError(f"{pipeline_class.__name__} takes no {name}; {hint}")
    missing = [name for name in free if parameters[name].default is inspect.Parameter.empty and name not in given]
    if missing:
        raise ValueError(f"{pipeline_class.__name__} also needs {', '.join(missing)}")
    defaults = {name: one.default for name in free if isinstance((one := parameters[name]).default, JSON_TYPES)}
    return json.loads(json.dumps({**defaults, **given}))


def read_picture(path: Path) -> Image.Image:
    """A picture, read to its end.

    Raises:
        OSError: there is no such file, or it is no whole picture.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f"{path} cannot be read as a picture: {error}") from error


def _record(sample: Sample, settings: Mapping[str, Any], pipeline_class: type[DiffusionPipeline]) -> dict[str, Any]:
    parameters = read_arguments(pipeline_class, sample.arguments)
    if sample.references:
        hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sample.references]
        parameters["image"] = [
            {"file": str(path), "sha256": value} for path, value in zip(sample.references, hashes, strict=True)
        ]
    record = {"prompt": sample.prompt, "number": sample.number, "sample": sample.index, **settings}
    return {**record, "seed": sample.seed, "parameters": parameters}


def _batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[Sample]]:
    for _, group in groupby(samples, key=lambda sample: sample.arguments):
        alike = list(group)
        for start in range(0, len(alike), batch_size):
            yield alike[start : start + batch_size]


def _draw(
    pipeline: DiffusionPipeline, batch: Sequence[Sample], folder: Path, records: Mapping[str, Mapping[str, Any]]
) -> None:
    # Pipelines of diffusers take one text against all prompts only where there is one prompt.
    arguments = {
        name: [value] * len(batch) if name.startswith("negative_prompt") and isinstance(value, str) else value
        for name, value in batch[0].arguments.items()
    }
    if any(sample.references for sample in batch):
        arguments["image"] = [[read_picture(path) for path in sample.references] for sample in batch]
    output = pipeline(
        prompt=[sample.prompt for sample in batch],
        generator=[torch.Generator().manual_seed(sample.noise) for sample in batch],  # the same on every device
        **arguments,
    )
    images = output.get("images", [])
    if len(images) != len(batch):
        raise ValueError(f"{type(pipeline).__name__} drew {len(images)} pictures of {len(batch)} prompts")
    for place, (sample, image) in enumerate(zip(batch, images, strict=True)):
        more = {ours: output[theirs][place] for theirs, ours in OUTPUTS.items() if output.get(theirs) is not None}
        record = {**records[sample.file_name], **more}
        texts = {name: json.dumps(value) if name in JSON_TEXTS else value for name, value in record.items()}
        save_png(image, folder / sample.file_name, texts)
