"""Rows of a pack -> the one packed row of tensors that the model trains on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from ..model.packing import IGNORE, Segment, collate
from .packs import is_left_out
from .samples import OversizeError, Picture, Row, Sample, SampleBuilder, SampleError

OnError = Literal["raise", "skip"]


class PackCollator:
    """Builds the samples of one pack and packs them.

    A pack of an answer (question of 3 ids, answer of 4) and a drawing (text of 3 ids, 1x2 latent tokens), markers 8
    and 9:

        input_ids     [[1, 5, 2, 1, 6, 7, 2, 1, 5, 2, 8, 9]]
        shift_labels  [[-100, -100, -100, 6, 7, 2, -100, ...]]      always there
        latents       (1, 2, latent_dim)                             zeros until the VAE has encoded `pictures`
        noise         (1, 2, latent_dim)
        timestep      [[0.3, 0.3]]
        pictures      [Picture(start=0, ...)]                        those without moments in the store
        ids           ["p7", "p8"]
        left_out      [("p9", "output_image does not decode (...)")]

    and what else `collate` gives. `pictures`, `ids` and `left_out` are not for the model.

    Args:
        builder: of the samples.
        on_error: what a row that cannot be used does: "raise" its `SampleError`, or "skip", which lists it.
        always_all_parts: adds a sample of one vision patch and one latent token, 6 tokens without loss, to each pack,
            so that all parts of the model take part in every step: processes that train together wait for each
            other's gradients. See `all_parts_sample`.

    Raises:
        ValueError: an unknown `on_error`.
    """

    def __init__(self, builder: SampleBuilder, on_error: OnError = "raise", always_all_parts: bool = False) -> None:
        """See the class."""
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r} must be 'raise' or 'skip'")
        self.builder, self.on_error, self.always_all_parts = builder, on_error, always_all_parts

    def __call__(self, batch: Sequence[tuple[int, Sequence[Row]]]) -> dict[str, Any]:
        """The tensors of a batch of one pack: (epoch, rows).

        Raises:
            SampleError: a row that cannot be used, with `on_error="raise"`.
            ValueError: several packs, or with "skip" a pack of which no row can be used.
        """
        if len(batch) != 1:
            raise ValueError(f"a batch must be one pack, got {len(batch)}: set per_device_train_batch_size to 1")
        ((epoch, rows),) = batch
        samples: list[Sample] = []
        left_out: list[tuple[str, str]] = []
        for row in rows:
            try:
                samples.append(self.builder.build(row, epoch))
            except SampleError as error:
                if not is_left_out(isinstance(error, OversizeError), self.builder, self.on_error):
                    raise
                left_out.append((error.id, error.reason))
        if not samples:
            raise ValueError(f"no row of a pack can be used: {'; '.join(map(': '.join, left_out))}")
        if self.always_all_parts:
            samples.append(all_parts_sample(self.builder))
        return {**collate_samples(samples), "left_out": left_out}


def all_parts_sample(builder: SampleBuilder) -> Sample:
    """One vision patch and one clean latent token, all zeros and without loss.

    With it and with the labels that `collate_samples` always gives, a pack of any tasks brings a gradient (maybe zero)
    to every parameter, once the loss holds `0 * ends.sum()` for `ends = output.last_hidden_state[:, [0, -1]]` (the
    last layer has one output per stream, which may have no loss) and, in packs without targets,
    `0 * model.llm2vae(ends).sum()`.
    """
    patch, token = torch.zeros(1, builder.config.patch_dim), torch.zeros(1, builder.config.latent_dim)
    segments = [
        Segment("vision", builder.markers, patches=patch, grid=(1, 1)),
        Segment("latents", builder.markers, latents=token, grid=(1, 1)),
    ]
    return Sample("", segments, [Picture("", (1, 1), moments=token)], [token], [0.0])  # nothing to encode


def collate_samples(samples: Sequence[Sample]) -> dict[str, Any]:
    """Samples in one packed row: what `collate` gives, `noise`, `timestep`, `pictures` and `ids`.

    `shift_labels` are there also without any label: else the model would compute the logits of all tokens.
    """
    batch: dict[str, Any] = {**collate([sample.segments for sample in samples], packed=True)}
    batch.setdefault("shift_labels", torch.full_like(batch["input_ids"], IGNORE))
    noise = [tokens for sample in samples for tokens in sample.noise]
    if noise:
        timesteps = [timestep for sample in samples for timestep in sample.timesteps]
        lengths = torch.tensor([len(tokens) for tokens in noise])
        batch["noise"] = torch.cat(noise)[None]  # (1, G, D)
        batch["timestep"] = torch.tensor(timesteps).repeat_interleave(lengths)[None]  # (1, G)
    pictures = [picture for sample in samples for picture in sample.pictures]
    start = 0
    for picture, tokens in zip(pictures, noise, strict=True):
        picture.start = start
        start += len(tokens)
    batch["pictures"] = [picture for picture in pictures if picture.moments is None]
    batch["ids"] = [sample.id for sample in samples if sample.id]
    return batch
