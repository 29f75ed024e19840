"""Guidance by text and by images: velocities of up to three contexts combined into one.

The conditional velocity sees everything; two others lack the last text (`without_text`) or all images
(`without_images`). Guidance moves away from them and then shrinks the result to the conditional's norm
(Bagel, arXiv 2505.14683; official `Bagel._forward_flow`). diffusers' guiders know neither the nesting of the two
scales nor these norms.

Letters: B batch, N latent tokens, D values of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from .arguments import MAX_GUIDANCE_SCALE, check_choice, check_number, is_number

Renorm = Literal["global", "channel", "text_channel"]
RENORMS: tuple[str, ...] = get_args(Renorm)


@dataclass(frozen=True)
class Guidance:
    """How strongly, when and how an image is guided.

    Attributes:
        text_scale: 1 or less is no guidance at all, whatever `image_scale` says.
        image_scale: 1 or less is none by images.
        interval: shifted timesteps at which guidance acts, open below and closed above.
        renorm: what the result is shrunk to: "global", the norm of the image; "channel", that of each token;
            "text_channel", that of each token before the images act.
        renorm_min: the factor of shrinking is not smaller.

    Raises:
        ValueError: an unknown `renorm`, an interval or a `renorm_min` outside of [0, 1], scales that are negative or
            above `MAX_GUIDANCE_SCALE`.
    """

    text_scale: float
    image_scale: float
    interval: tuple[float, float]
    renorm: Renorm
    renorm_min: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        check_number("guidance_scale", self.text_scale, 0, MAX_GUIDANCE_SCALE)
        check_number("image_guidance_scale", self.image_scale, 0, MAX_GUIDANCE_SCALE)
        check_choice("guidance_renorm", self.renorm, RENORMS)
        interval: object = self.interval
        in_range = isinstance(interval, tuple) and [is_number(bound, 0, 1) for bound in interval] == [True, True]
        if not in_range or self.interval[0] > self.interval[1]:
            raise ValueError(f"guidance_interval={interval!r:.80} must be (start, end) with 0 <= start <= end <= 1")
        check_number("guidance_renorm_min", self.renorm_min, 0, 1)

    def is_active(self, timestep: Tensor) -> bool:
        """Whether guidance acts at a shifted timestep."""
        start, end = self.interval
        # Compared as tensors, so that 0.4 is the same float32 on both sides.
        return self.text_scale > 1 and bool(timestep > start) and bool(timestep <= end)


# The documented settings of Bagel for text-to-image, and of Bagel and Echo-4o for editing and references.
TEXT_TO_IMAGE = Guidance(text_scale=4.0, image_scale=1.0, interval=(0.4, 1.0), renorm="global")
REFERENCES = Guidance(text_scale=4.0, image_scale=2.0, interval=(0.0, 1.0), renorm="text_channel")


def read_guidance(
    has_references: bool,
    text_scale: float,
    image_scale: float | None,
    interval: Sequence[float] | None,
    renorm: str | None,
    renorm_min: float,
) -> Guidance:
    """The settings of a prompt; None is the documented value for one with, or without, references."""
    default = REFERENCES if has_references else TEXT_TO_IMAGE
    return Guidance(
        text_scale,
        default.image_scale if image_scale is None else image_scale,
        default.interval if interval is None else cast(tuple[float, float], _as_tuple(interval)),
        default.renorm if renorm is None else cast(Renorm, renorm),
        renorm_min,
    )


def _as_tuple(interval: Sequence[float]) -> Sequence[float]:
    return tuple(interval) if isinstance(interval, list) else interval


def guide(
    velocity: Tensor, without_text: Tensor, without_images: Tensor, guidance: Guidance, mask: Tensor | None = None
) -> Tensor:
    """The guided velocity of images at whose timestep guidance is active.

    Args:
        velocity: (B, N, D), of the whole context.
        without_text: (B, N, D), of the context without its last text.
        without_images: (B, N, D), of the context without images; not read if the image scale is 1 or less.
        guidance: the settings.
        mask: (B, N) bool, False on padding.

    Returns:
        (B, N, D). Each image has its own norm; the official "global" takes one over the whole batch, so that the
        images of a batch change each other.
    """
    if guidance.text_scale <= 1:
        return velocity
    guided = without_text + guidance.text_scale * (velocity - without_text)
    if guidance.renorm == "text_channel":
        guided = shrink(guided, velocity, per_token=True, minimum=guidance.renorm_min, mask=mask)
    if guidance.image_scale > 1:
        guided = without_images + guidance.image_scale * (guided - without_images)
    if guidance.renorm != "text_channel":
        per_token = guidance.renorm == "channel"
        guided = shrink(guided, velocity, per_token=per_token, minimum=guidance.renorm_min, mask=mask)
    return guided


def shrink(guided: Tensor, reference: Tensor, *, per_token: bool, minimum: float, mask: Tensor | None) -> Tensor:
    """Scale `guided` down to the norm of `reference`, by no less than `minimum` and never up: (B, N, D)."""
    dims = (-1,) if per_token else (-2, -1)
    if mask is not None:
        guided, reference = (x.masked_fill(~mask[..., None], 0) for x in (guided, reference))
    norms = [torch.linalg.vector_norm(x, dim=dims, keepdim=True) for x in (guided, reference)]  # (B, N or 1, 1)
    factor: Tensor = (norms[1] / (norms[0] + 1e-8)).clamp(minimum, 1)
    return guided * factor
