"""The guided velocity of a batch of images: all branches in one call of the model, prepared once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.context import NoisyBlock
from ..model.modeling_bagel import BagelForConditionalGeneration
from ..model.packing import Grid, real_tokens
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
        self._indices: dict[Rows, Tensor] = {}
        lengths = [rows * columns for rows, columns in grids]
        self._num_tokens = max(lengths)
        self._mask: Tensor | None = None  # (B, N), False on padding
        if min(lengths) < self._num_tokens:
            device = contexts.conditional.attention_mask.device
            self._mask = real_tokens(torch.tensor(lengths, device=device), self._num_tokens)

    @torch.no_grad()
    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The guided velocity (B, N, D), zero on padding.

        Args:
            latents: (B, N, D).
            timestep: in [0, 1], the scheduler's sigma, on the CPU.
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

        without_text = self._replace(velocity, text_rows, of_text)
        without_images = self._replace(velocity, image_rows, of_images)
        guided = velocity
        for guidance in dict.fromkeys(self.guidances[row] for row in active):
            chosen = tuple(row for row in active if self.guidances[row] == guidance)
            of_chosen = guide(
                self._select(velocity, chosen),
                self._select(without_text, chosen),
                self._select(without_images, chosen),
                guidance,
                None if self._mask is None else self._select(self._mask, chosen),
            )
            guided = self._replace(guided, chosen, of_chosen)
        return guided if self._mask is None else guided.masked_fill(~self._mask[..., None], 0)

    def _velocities(self, latents: Tensor, timestep: Tensor, text_rows: Rows, image_rows: Rows) -> Tensor:
        """Of the images, then of the rows without text and without images: (rows, N, D)."""
        images = range(len(self.owners))

        def evaluate() -> Tensor:
            block = self._prepare(text_rows, image_rows)
            of_rows = latents
            if text_rows or image_rows:
                of_rows = torch.cat([latents, *(self._select(latents, rows) for rows in (text_rows, image_rows))])
            # Filled on the device: a copy to it would wait for what it still computes.
            timesteps = torch.full((len(of_rows),), timestep.item(), dtype=timestep.dtype, device=latents.device)
            return self.model.predict_velocity(of_rows, timesteps, block)

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
            self._prepared = key, self.model.prepare_noisy_block(contexts, grids, self._num_tokens)
        return self._prepared[1]

    def _select(self, x: Tensor, rows: Rows) -> Tensor:
        return x if len(rows) == len(x) else x[:0] if not rows else x[self._index(rows)]

    def _replace(self, x: Tensor, rows: Rows, new: Tensor) -> Tensor:
        """`x` with other values in some rows."""
        return new if len(rows) == len(x) else x if not rows else x.index_copy(0, self._index(rows), new)

    def _index(self, rows: Rows) -> Tensor:
        """On the device, brought there once."""
        if rows not in self._indices:
            self._indices[rows] = torch.tensor(rows, device=self.contexts.conditional.attention_mask.device)
        return self._indices[rows]
