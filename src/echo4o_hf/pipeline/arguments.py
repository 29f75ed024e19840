"""Checks of the single arguments of `Echo4oPipeline.__call__`, before anything is computed.

All raise a `ValueError` that names the argument and the value seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_GUIDANCE_SCALE = 1000.0  # far beyond any use; squares of much larger velocities are infinite in float32


def check_flag(name: str, value: Any) -> None:
    """True or False: of other values, "no" would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r:.80} must be True or False")


def check_count(name: str, value: Any, most: int | None = None, advice: str = "") -> None:
    """A whole number of at least 1, and of `most` at most."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r:.80} must be a whole number{advice}")
    if value < 1:
        raise ValueError(f"{name}={value!r:.80} must be at least 1{advice}")
    if most is not None and value > most:
        raise ValueError(f"{name}={value!r:.80} must be at most {most}{advice}")


def is_number(value: Any, least: float, most: float) -> bool:
    """Whether it is a number in this range, which NaN is not."""
    is_real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return is_real and bool(least <= value <= most)


def check_number(name: str, value: Any, least: float, most: float) -> None:
    """A number in this range."""
    if not is_number(value, least, most):
        raise ValueError(f"{name}={value!r:.80} must be a number between {least:g} and {most:g}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """One of some words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r:.80} is unknown; choose one of {', '.join(choices)}")


def check_generator(generator: Any, num_images: int) -> None:
    """None, one, or one per image."""
    each = generator if isinstance(generator, (list, tuple)) else [generator]
    for one in each:
        if one is not None and not isinstance(one, torch.Generator):
            raise ValueError(
                f"a generator must be a torch.Generator, as torch.Generator().manual_seed(1), got {one!r:.80}"
            )
    if each is generator and len(each) != num_images:
        raise ValueError(f"{len(each)} generators for {num_images} images; pass one, or one per image")


def check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    """None, or finite floats of this shape."""
    if latents is None:
        return
    if not isinstance(latents, Tensor):
        raise ValueError(f"latents must be a torch.Tensor, got {type(latents).__name__}")
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents have shape {tuple(latents.shape)}, expected (images, tokens, values) = {shape}")
    if latents.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"latents have dtype {latents.dtype}, expected floats such as torch.float32")
    if not latents.isfinite().all():
        raise ValueError("latents hold NaN or infinite values; pass noise as torch.randn draws it")


def check_callback(callback: Any, tensor_inputs: Any, offered: Sequence[str]) -> None:
    """None or a function, and names of tensors that there are."""
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end={callback!r:.80} must be a function")
    if not isinstance(tensor_inputs, (list, tuple)):
        raise ValueError(f"callback_on_step_end_tensor_inputs={tensor_inputs!r:.80} must be a list of names")
    unknown = [name for name in tensor_inputs if name not in offered]
    if unknown:
        raise ValueError(f"callbacks get {', '.join(offered)}, not {', '.join(map(str, unknown))}")


def read_callback(returned: Any, latents: Tensor) -> Tensor:
    """The latents after a callback, which may return None, or a dict with other ones.

    Args:
        returned: by the callback.
        latents: that it was given.
    """
    if returned is None:
        return latents
    if not isinstance(returned, dict):
        raise ValueError(
            f"callback_on_step_end returned {type(returned).__name__}, expected a dict of tensors or None"
        )
    unknown = [name for name in returned if name != "latents"]
    if unknown:
        raise ValueError(f"callback_on_step_end returned {', '.join(map(str, unknown))}; only latents can be changed")
    changed = returned.get("latents", latents)
    if not isinstance(changed, Tensor) or changed.shape != latents.shape or not changed.is_floating_point():
        seen = f"{changed.dtype} of shape {tuple(changed.shape)}" if isinstance(changed, Tensor) else repr(changed)
        expected = f"floats of shape {tuple(latents.shape)}"
        raise ValueError(f"callback_on_step_end returned latents that are {seen:.80}, expected {expected}")
    return changed.to(latents)
