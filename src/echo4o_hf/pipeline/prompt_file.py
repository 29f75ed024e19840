"""Files of prompts: a prompt per line, or a line of JSON with settings of its own.

    a red cat on a blue hat
    {"prompt": "two cats", "seed": 7, "guidance_scale": 3.0}
    {"prompt": "this cat in the rain", "images": ["cat.png"], "height": 512, "width": 768}

Whatever else a line of JSON names is an argument of `Echo4oPipeline.__call__`. A line that starts with { is JSON;
empty lines are left out. A line that starts with # is an error, for it may be meant as a comment, which there are
none of, or as a prompt, which is {"prompt": "# ..."}.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..model.configuration_bagel import BagelConfig
from ..model.processing_bagel import BagelProcessor
from .arguments import check_count, check_flag
from .guidance import read_guidance
from .pipeline_echo4o import Echo4oPipeline
from .prompts import count_positions, latent_grid
from .samples import read_arguments, read_picture

MAX_SEED = 2**63 - 1
MAX_STEPS = 1000  # `num_train_timesteps` of the scheduler of every Echo-4o


@dataclass(frozen=True)
class Request:
    """A prompt to draw.

    Attributes:
        prompt: the text.
        line: of its file, from 1 on.
        references: pictures that go before it.
        seed: of its noise; None leaves that open.
        arguments: of the pipeline's call.
    """

    prompt: str
    line: int = 1
    references: tuple[Path, ...] = ()
    seed: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


def read_prompt_file(path: Path) -> list[Request]:
    """The prompts of a file; paths of pictures are relative to it.

    Raises:
        OSError: there is no such file.
        ValueError: with file and line, what is not as above.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    requests = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        try:
            if text.startswith("{"):
                requests.append(_read_json(text, number, path.parent))
            elif text.startswith("#"):
                advice = json.dumps({"prompt": text}, ensure_ascii=False)
                raise ValueError(f"there are no comments; leave the line out, or if it is a prompt, write {advice}")
            elif text:
                requests.append(Request(text, number))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not requests:
        raise ValueError(f"{path} holds no prompts; write one per line")
    return requests


def check_seed(seed: Any) -> int:
    """The seed, if it is one.

    Raises:
        ValueError: it is none.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"a seed must be a whole number from 0 to {MAX_SEED}, got {seed!r:.80}")
    return seed


def check_request(
    request: Request, arguments: Mapping[str, Any], config: BagelConfig, processor: BagelProcessor
) -> None:
    """Refuse what the pipeline will refuse, before there is one.

    Args:
        request: to be drawn.
        arguments: of the pipeline's call, its own among them.
        config: of the model.
        processor: of the model.

    Raises:
        OSError: a picture cannot be read.
        ValueError: what else cannot work.
    """
    for path in request.references:
        read_picture(path)
    defaults = {name: one.default for name, one in inspect.signature(Echo4oPipeline.__call__).parameters.items()}
    every = {**defaults, **arguments}
    check_count("num_inference_steps", every["num_inference_steps"], MAX_STEPS)
    check_flag("thinking", every["thinking"])
    if every["thinking"]:
        check_count("max_think_tokens", every["max_think_tokens"])
    latent_grid(None, every["height"], every["width"], config)
    read_guidance(
        bool(request.references),
        every["guidance_scale"],
        every["image_guidance_scale"],
        every["guidance_interval"],
        every["guidance_renorm"],
        every["guidance_renorm_min"],
    )
    positions = count_positions([request.prompt], processor, every["thinking"]) + 2 * len(request.references)
    limit = config.text_config.max_position_embeddings  # type: ignore[union-attr]
    if positions + every["thinking"] > limit:  # a plan needs one at least
        raise ValueError(f"the prompt needs {positions} positions, the model has {limit}: shorten it")


def _read_json(text: str, line: int, folder: Path) -> Request:
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ValueError(f"no JSON, though it starts with a brace: {error}") from error
    prompt, images, seed = (settings.pop(name, None) for name in ("prompt", "images", "seed"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f'"prompt" must be a text, got {prompt!r:.80}')
    images = [] if images is None else images
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise ValueError(f'"images" must be a list of files, got {images!r:.80}')
    if "image" in settings:
        raise ValueError(f'pictures are listed in "images", got "image": {settings["image"]!r:.80}')
    read_arguments(Echo4oPipeline, settings)
    references = tuple(folder / name for name in images)
    return Request(prompt, line, references, None if seed is None else check_seed(seed), settings)
