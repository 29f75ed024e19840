"""The guided velocity of a batch of images: all branches in one call of the model, prepared once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.context import NoisyBlock
from ..model.modeling_bagel import BagelForConditionalGeneration
from ..model.packing import Grid
from .caching import StepCache
from .contexts import PromptContexts
from .guidance import Guidance, guide

Rows = tuple[int, ...]


class Denoiser:
    """Predicts the velocity that the scheduler integrates.

    What would equal the conditional velocity, or is not used at a timestep, is not computed.

    Args:
        model: predicts the velocity of each branch.
        contexts: of the prompts.
        owners: the prompt of each image.
        grids: rows and columns of each image, in tokens.
        guidances: of each prompt.
        cache: forecasts the velocities of some updates; None evaluates all.
    """

    def __init__(
        self,
        model: BagelForConditionalGeneration,
        contexts: PromptContexts,
        owners: Sequence[int],
        grids: Sequence[Grid],
        guidances: Sequence[Guidance],
        cache: StepCache | None = None,
    ) -> None:
        """See the class."""
        self.model = model
        self.contexts = contexts
        self.owners = owners
        self.grids = grids
        self.guidances = [guidances[owner] for owner in owners]  # of each image
        self.cache = cache
        self._prepared: tuple[tuple[Rows, Rows], NoisyBlock] | None = None
        lengths = torch.tensor([rows * columns for rows, columns in grids])
        self._mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, N)
        self._is_padded = not bool(self._mask.all())

    @torch.no_grad()
    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The guided velocity (B, N, D), zero on padding.

        Args:
            latents: (B, N, D).
            timestep: in [0, 1], the scheduler's sigma.
        """
        images = range(len(self.owners))
        active = [row for row in images if self.guidances[row].is_active(timestep)]
        text_rows = tuple(row for row in active if self.contexts.text_differs[self.owners[row]])
        image_rows = tuple(
            row
            for row in active
            if self.contexts.images_differ[self.owners[row]] and self.guidances[row].image_scale > 1
        )
        velocities = self._velocities(latents, timestep, text_rows, image_rows)
        velocity, of_text, of_images = velocities.split([len(images), len(text_rows), len(image_rows)])

        without_text, without_images = _replaced(velocity, text_rows, of_text), velocity
        if image_rows:
            without_images = _replaced(velocity, image_rows, of_images)
        mask = self._mask.to(latents.device) if self._is_padded else None
        guided = velocity
        for guidance in dict.fromkeys(self.guidances[row] for row in active):
            chosen = tuple(row for row in active if self.guidances[row] == guidance)
            of_chosen = guide(
                _rows(velocity, chosen),
                _rows(without_text, chosen),
                _rows(without_images, chosen),
                guidance,
                None if mask is None else _rows(mask, chosen),
            )
            guided = _replaced(guided, chosen, of_chosen)
        return guided if mask is None else guided.masked_fill(~mask[..., None], 0)

    def _velocities(self, latents: Tensor, timestep: Tensor, text_rows: Rows, image_rows: Rows) -> Tensor:
        """Of the images, then of the rows without text and without images: (rows, N, D)."""
        images = range(len(self.owners))
        rows = [*images, *text_rows, *image_rows]

        def evaluate() -> Tensor:
            block = self._prepare(text_rows, image_rows)
            of_rows = latents if len(rows) == len(images) else latents[rows]
            return self.model.predict_velocity(of_rows, timestep.to(latents.device).expand(len(rows)), block)

        if self.cache is None:
            return evaluate()
        branches = [("conditional", row) for row in images]
        branches += [("without_text", row) for row in text_rows] + [("without_images", row) for row in image_rows]
        return self.cache(branches, evaluate)

    def _prepare(self, text_rows: Rows, image_rows: Rows) -> NoisyBlock:
        """What the model needs for these rows; kept until others are asked for."""
        key = (text_rows, image_rows)
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = None  # frees the memory first
            contexts = self.contexts.select(
                self.owners, [self.owners[row] for row in text_rows], [self.owners[row] for row in image_rows]
            )
            grids = [self.grids[row] for row in (*range(len(self.grids)), *text_rows, *image_rows)]
            self._prepared = key, self.model.prepare_noisy_block(contexts, grids, self._mask.shape[1])
        return self._prepared[1]


def _rows(x: Tensor, rows: Rows) -> Tensor:
    return x if len(rows) == len(x) else x[list(rows)]


def _replaced(x: Tensor, rows: Rows, new: Tensor) -> Tensor:
    """`x` with other values in some rows."""
    if len(rows) == len(x):
        return new
    return x.index_copy(0, torch.tensor(rows, device=x.device, dtype=torch.long), new) if rows else x
