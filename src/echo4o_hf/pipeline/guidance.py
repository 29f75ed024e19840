"""Guidance by text and by images: velocities of up to three contexts combined into one.

The conditional velocity sees everything; two others lack the last text (`without_text`) or all images
(`without_images`). Guidance moves away from them and then shrinks the result to the conditional's norm
(Bagel, arXiv 2505.14683; official `Bagel._forward_flow`). diffusers' guiders know neither the nesting of the two
scales nor these norms.

Letters: B batch, N latent tokens, D values of a token.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Renorm = Literal["global", "channel", "text_channel"]
RENORMS: tuple[str, ...] = get_args(Renorm)


def is_active(timestep: Tensor, interval: tuple[float, float]) -> bool:
    """Whether guidance acts at a (shifted) timestep: the interval is open below and closed above."""
    # As tensors, so that 0.4 is the same float32 on both sides.
    return bool(timestep > interval[0]) and bool(timestep <= interval[1])


def guide(
    velocity: Tensor,
    without_text: Tensor,
    without_images: Tensor,
    *,
    text_scale: float,
    image_scale: float,
    renorm: Renorm,
    renorm_min: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """The guided velocity.

    Args:
        velocity: (B, N, D), of the whole context.
        without_text: (B, N, D), of the context without its last text.
        without_images: (B, N, D), of the context without images; not read if `image_scale` <= 1.
        text_scale: 1 or less is no guidance at all, whatever `image_scale` says.
        image_scale: 1 or less is none by images.
        renorm: what the result is shrunk to: "global", the norm of the image; "channel", that of each token;
            "text_channel", that of each token before the images act.
        renorm_min: the factor of shrinking is not smaller.
        mask: (B, N) bool, False on padding.

    Returns:
        (B, N, D). Each image has its own norm; the official "global" takes one over the whole batch, so that the
        images of a batch change each other.
    """
    if text_scale <= 1:
        return velocity
    guided = without_text + text_scale * (velocity - without_text)
    if renorm == "text_channel":
        guided = shrink(guided, velocity, per_token=True, minimum=renorm_min, mask=mask)
    if image_scale > 1:
        guided = without_images + image_scale * (guided - without_images)
    if renorm != "text_channel":
        guided = shrink(guided, velocity, per_token=renorm == "channel", minimum=renorm_min, mask=mask)
    return guided


def shrink(guided: Tensor, reference: Tensor, *, per_token: bool, minimum: float, mask: Tensor | None) -> Tensor:
    """Scale `guided` down to the norm of `reference`, by no less than `minimum` and never up: (B, N, D)."""
    dims = (-1,) if per_token else (-2, -1)
    if mask is not None:
        guided, reference = (x.masked_fill(~mask[..., None], 0) for x in (guided, reference))
    norms = [torch.linalg.vector_norm(x, dim=dims, keepdim=True) for x in (guided, reference)]  # (B, N or 1, 1)
    return guided * (norms[1] / (norms[0] + 1e-8)).clamp(minimum, 1)
