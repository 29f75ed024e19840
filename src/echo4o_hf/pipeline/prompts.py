"""What a user passes as prompts, references and sizes, read and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from ..model.configuration_bagel import BagelConfig
from ..model.image_processing_bagel import ImageLike
from ..model.packing import Grid
from ..model.processing_bagel import BagelProcessor, images_per_text

Item: TypeAlias = str | Image.Image  # a text or a reference

# Given to the model before the prompt when it is to think; our wording, what it asks for is the official one's.
THINKING_PROMPT = (
    "Before the image is drawn, work out what it should show: the subjects and how many there are, their looks and "
    "places, the setting and the style. Write this plan between <think> and </think>. The image will follow the plan."
)


def read_prompts(prompt: Any, image: Any, resize: Callable[[ImageLike], Image.Image]) -> list[list[Item]]:
    """One list per prompt: its references, then its texts, with images that stand between them in their place.

    Args:
        prompt: a text, a list of texts, a list that mixes texts and images (one prompt), or a list of such lists.
        image: the references, as `images_per_text` takes them.
        resize: makes an RGB image of the size that the VAE takes.

    Raises:
        ValueError: no prompt, one of another type, or references that cannot be told apart.
    """
    if isinstance(prompt, str):
        prompts = [[prompt]]
    elif not isinstance(prompt, (list, tuple)):
        raise ValueError(f"a prompt must be a string, got {type(prompt).__name__}: {prompt!r:.80}")
    elif any(isinstance(item, (list, tuple)) for item in prompt):
        prompts = [list(item) if isinstance(item, (list, tuple)) else [item] for item in prompt]
    elif any(isinstance(item, (Image.Image, np.ndarray, torch.Tensor)) for item in prompt):
        prompts = [list(prompt)]
    else:
        prompts = [[item] for item in prompt]
    if not prompts or not all(prompts):
        raise ValueError(f"no prompt given (got {prompt!r:.80}); pass a text or a list of texts")
    references = images_per_text(image, len(prompts))
    return [
        [*map(resize, images), *(_read_item(item, resize) for item in items)]
        for items, images in zip(prompts, references, strict=True)
    ]


def last_image(items: Sequence[Item]) -> Image.Image | None:
    """The last reference of a prompt."""
    return next((item for item in reversed(items) if isinstance(item, Image.Image)), None)


def latent_grid(reference: Image.Image | None, height: int | None, width: int | None, config: BagelConfig) -> Grid:
    """Rows and columns of latent tokens of the image to be drawn.

    Args:
        reference: the prompt's last one, whose size is the default; without, it is the largest that the model draws.
        height: pixels, or None.
        width: pixels, or None.
        config: of the model.

    Raises:
        ValueError: a side off the grid of tokens or beyond the model's table of positions.
    """
    stride, most = config.latent_stride, config.max_latent_size
    default = (most * stride, most * stride) if reference is None else (reference.height, reference.width)
    tokens: list[int] = []
    for name, given, otherwise in zip(("height", "width"), (height, width), default, strict=True):
        side = otherwise if given is None else given
        if not isinstance(side, Integral):
            raise ValueError(f"{name}={side!r} must be a whole number of pixels")
        nearest = min(max((int(side) + stride // 2) // stride, 1), most) * stride
        if side != nearest:
            raise ValueError(
                f"{name}={side!r:.80} cannot be drawn: sides are multiples of {stride} up to {most * stride}; "
                f"the nearest is {nearest}"
            )
        tokens.append(nearest // stride)
    return tokens[0], tokens[1]


def count_positions(items: Sequence[Item], processor: BagelProcessor, thinking: bool) -> int:
    """Rope positions of a prompt and its image: one per token of text, two per reference, one for the image.

    Positions are what is limited, not tokens, as in the official code: four large references are more tokens than
    `max_position_embeddings`, but few positions.

    Args:
        items: the prompt.
        processor: counts the tokens.
        thinking: count what asks for a plan and surrounds it, but not the plan.
    """
    texts = [item for item in items if isinstance(item, str)]
    num_references = len(items) - len(texts)
    num_others = 2 * num_references + 1
    if thinking:
        texts.append(THINKING_PROMPT)
        num_others += 2
    return sum(len(processor.text_segment(text).input_ids) for text in texts) + num_others


def _read_item(item: Any, resize: Callable[[ImageLike], Image.Image]) -> Item:
    if isinstance(item, str):
        return item
    if isinstance(item, (Image.Image, np.ndarray, torch.Tensor)):
        return resize(item)
    raise ValueError(
        f"a prompt must be a string (or a list of strings and images), got {type(item).__name__}: {item!r:.80}"
    )
