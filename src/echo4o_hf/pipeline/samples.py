"""Pictures of many prompts, from `Echo4oPipeline` or any other text-to-image pipeline of diffusers.

A folder of samples holds `{number}_{sample}.png`, the number being that of the prompt, and `metadata.jsonl` with one
line per picture:
    {"file_name": "17_0.png", "prompt": "…", "number": 17, "sample": 0, "model": "…", "pipeline": "Echo4oPipeline",
     "seed": 0, "parameters": {…}, "dtype": "bfloat16", "device": "cuda", "software": "…"}
The lines are copies of what each picture says in its PNG text; `file_name` is what `load_dataset("imagefolder")`
wants. Where a pipeline says more about a picture (Echo-4o its plan, a safety checker its finding), that is added.

The noise of a picture depends on seed, number and sample alone: not on batch, order, process or device. Neither does
the picture, but for the rounding of floats, which differs between devices and between sizes of a batch.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import io
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from filelock import FileLock
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm

from ..model.checkpoint import BUNDLED_NAMES
from .pipeline_echo4o import Echo4oPipeline

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
COMPARED = ("prompt", "model", "pipeline", "seed", "parameters", "dtype")  # with another one, it is another picture
JSON_TEXTS = ("number", "sample", "seed", "parameters", "nsfw_content_detected")  # of the PNG texts, those not plain
OUTPUTS = {"texts": "plan", "nsfw_content_detected": "nsfw_content_detected"}  # of pipelines, and what we call them
JSON_TYPES = (type(None), bool, int, float, str, list, tuple, dict)
SOFTWARE = ("echo4o-hf", "diffusers", "transformers", "torch")

_NAME = re.compile(r"([0-9]+)_([0-9]+)\.png")


@dataclass(frozen=True)
class Sample:
    """A picture to draw: the prompt, its number, and which of the prompt's pictures it is."""

    number: int
    index: int
    prompt: str

    @property
    def file_name(self) -> str:
        """Of its picture."""
        return f"{self.number}_{self.index}.png"


class Drawn(NamedTuple):
    """How many pictures of this process's share were drawn, and how many were there already."""

    new: int
    kept: int


def draw_samples(
    model: str,
    prompts: Mapping[int, str],
    folder: Path,
    *,
    samples_per_prompt: int = 1,
    batch_size: int = 1,
    seed: int = 0,
    arguments: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
) -> Drawn:
    """Draw what is missing in a folder of samples; processes of `accelerate launch` share the work.

    Args:
        model: Checkpoint of Echo-4o (see `Echo4oPipeline.from_pretrained`), or saved pipeline of diffusers.
        prompts: By their numbers.
        folder: Is made where it is missing.
        samples_per_prompt: Pictures of each prompt.
        batch_size: Pictures at the same time.
        seed: With number and sample, of the noise.
        arguments: Of the pipeline's call.
        dtype: "float32", "bfloat16" or "float16".
        device: "cuda" is another one in each process.

    Raises:
        OSError: the checkpoint cannot be read, or a picture not be written.
        ValueError: a number below 1, an argument that the pipeline does not take, or a picture in `folder` that was
            drawn with other settings.
    """
    for name, value in (("samples_per_prompt", samples_per_prompt), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    device = torch.device(device)
    pipeline_class = find_pipeline_class(model)
    arguments = dict(arguments or {})
    settings = {
        "model": str(model),
        "pipeline": pipeline_class.__name__,
        "seed": seed,
        "parameters": read_arguments(pipeline_class, arguments),
        "dtype": dtype,
        "device": device.type,
        "software": ", ".join(f"{name} {version(name)}" for name in SOFTWARE),
    }
    samples = [Sample(number, index, prompts[number]) for number in prompts for index in range(samples_per_prompt)]
    state = PartialState(cpu=device.type == "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    with state.split_between_processes(samples) as mine:
        missing = [sample for sample in mine if not is_drawn(sample, folder, settings)]
    if missing:
        pipeline = load_pipeline(model, pipeline_class, getattr(torch, dtype)).to(device)
        batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
        try:
            with tqdm(total=len(missing), unit="picture", disable=not state.is_main_process) as bar:
                for batch in batches:
                    _draw(pipeline, batch, folder, settings, arguments)
                    bar.update(len(batch))
        finally:
            write_metadata(folder)
    else:
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


def load_pipeline(model: str, pipeline_class: type[DiffusionPipeline], dtype: torch.dtype) -> DiffusionPipeline:
    """Load a pipeline without its bars; of diffusers' only safetensors, for pickled files can run code."""
    if pipeline_class is Echo4oPipeline:
        pipeline = Echo4oPipeline.from_pretrained(model, dtype=dtype)
    else:
        pipeline = pipeline_class.from_pretrained(model, dtype=dtype, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def is_drawn(sample: Sample, folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a sample's picture is there, whole and drawn with these settings.

    Raises:
        ValueError: it was drawn with others.
    """
    path = folder / sample.file_name
    there = read_record(path)
    if there is None:
        return False
    if not there:
        raise ValueError(f"{path} was not drawn by this command: name another folder, or remove the picture")
    wanted = {"prompt": sample.prompt, **settings}
    before, now = there["parameters"], wanted["parameters"]
    pairs = [(name, there[name], wanted[name]) for name in COMPARED if name != "parameters"]
    pairs += [(name, before.get(name), now.get(name)) for name in {**now, **before}]
    for name, old, new in pairs:
        if old != new:
            raise ValueError(
                f"{path} was drawn with {name}={json.dumps(old)}, now it is {json.dumps(new)}: "
                "name another folder, or remove the pictures"
            )
    return True


def read_record(path: Path) -> dict[str, Any] | None:
    """What a picture's PNG text says of it, {} if nothing; None where no file is, or only part of one."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.verify()
            texts = {str(name): text for name, text in image.info.items()}
    except (OSError, SyntaxError):  # what Pillow raises for files that are damaged or cut off
        return None
    if not texts.keys() >= {*COMPARED, "number", "sample"}:
        return {}
    return {name: json.loads(text) if name in JSON_TEXTS else text for name, text in texts.items()}


def write_metadata(folder: Path) -> None:
    """Write metadata.jsonl anew from all pictures in a folder.

    A process does so after its last picture, one at a time, so that the last one to do it sees all of them.
    """
    with FileLock(folder / ".metadata.lock"):
        names = [match for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        lines = []
        for match in sorted(names, key=lambda match: (int(match[1]), int(match[2]))):
            record = read_record(folder / match[0])
            if record:
                lines.append(json.dumps({"file_name": match[0], **record}, ensure_ascii=False) + "\n")
        with replaced(folder / "metadata.jsonl") as partial:
            partial.write_text("".join(lines), encoding="utf-8")


def save_png(image: Image.Image, path: Path, settings: Mapping[str, object]) -> None:
    """Write `path` in one piece, with each setting as a text chunk of the PNG."""
    chunks = PngInfo()
    for name, value in settings.items():
        chunks.add_text(name, str(value))
    with replaced(path) as partial:
        image.save(partial, format="PNG", pnginfo=chunks)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A name to write to, that becomes `path` once all is written."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")  # other processes have other names
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _draw(
    pipeline: DiffusionPipeline,
    batch: Sequence[Sample],
    folder: Path,
    settings: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> None:
    seeds = [noise_seed(settings["seed"], sample.number, sample.index) for sample in batch]
    # Pipelines of diffusers take one text against all prompts only where there is one prompt.
    repeated = {
        name: [value] * len(batch) if name.startswith("negative_prompt") and isinstance(value, str) else value
        for name, value in arguments.items()
    }
    output = pipeline(
        prompt=[sample.prompt for sample in batch],
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],  # on the CPU: the same on every device
        **repeated,
    )
    images = output.get("images", [])
    if len(images) != len(batch):
        raise ValueError(f"{settings['pipeline']} drew {len(images)} pictures of {len(batch)} prompts")
    for place, (sample, image) in enumerate(zip(batch, images, strict=True)):
        more = {ours: output[theirs][place] for theirs, ours in OUTPUTS.items() if output.get(theirs) is not None}
        record = {"prompt": sample.prompt, "number": sample.number, "sample": sample.index, **settings, **more}
        texts = {name: json.dumps(value) if name in JSON_TEXTS else value for name, value in record.items()}
        save_png(image, folder / sample.file_name, texts)
