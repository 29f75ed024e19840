"""The context of a generated image or text: cached keys and values, written once and only read afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache


@dataclass
class Context:
    """What a batch of noisy images, or of next tokens, attends to.

    Attributes:
        cache: Keys and values of every layer, (batch, key-value heads, tokens, head size) each.
        attention_mask: (batch, tokens) bool, False on padding.
        next_position: (batch,) rope position that the next segment gets.
    """

    cache: DynamicCache
    attention_mask: Tensor
    next_position: Tensor

    @classmethod
    def empty(cls, batch_size: int, device: torch.device | str | None = None) -> Context:
        """A context without tokens, as text guidance uses for text-to-image."""
        mask = torch.ones(batch_size, 0, dtype=torch.bool, device=device)
        return cls(DynamicCache(), mask, torch.zeros(batch_size, dtype=torch.long, device=device))

    def __len__(self) -> int:
        """Number of tokens, padding included."""
        return self.attention_mask.shape[1]

    def copy(self) -> Context:
        """The same tokens; what is appended to one is not in the other. Nothing is copied in memory."""
        return Context(_cache(self._layers()), self.attention_mask, self.next_position)

    def select(self, rows: Sequence[int]) -> Context:
        """The given rows, in that order; a row may be repeated."""
        index = torch.tensor(list(rows), device=self.attention_mask.device)
        layers = [(keys[index], values[index]) for keys, values in self._layers()]
        return Context(_cache(layers), self.attention_mask[index], self.next_position[index])

    @staticmethod
    def concatenate(contexts: Sequence[Context]) -> Context:
        """All rows of several contexts as one batch, padded on the left to the longest."""
        length = max(len(context) for context in contexts)
        with_tokens = [context for context in contexts if len(context)]
        mask = torch.cat([_pad_left(context.attention_mask, length, dim=1) for context in contexts])
        position = torch.cat([context.next_position for context in contexts])
        layers = []
        for layer, (reference, _) in enumerate(with_tokens[0]._layers() if with_tokens else []):
            pieces: tuple[list[Tensor], list[Tensor]] = ([], [])
            for context in contexts:
                empty = reference.new_zeros(context.attention_mask.shape[0], reference.shape[1], 0, reference.shape[3])
                pair = context._layers()[layer] if len(context) else (empty, empty)
                for piece, states in zip(pieces, pair, strict=True):
                    piece.append(_pad_left(states, length, dim=2))
            layers.append((torch.cat(pieces[0]), torch.cat(pieces[1])))
        return Context(_cache(layers), mask, position)

    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        return [(layer.keys, layer.values) for layer in self.cache.layers]


def _cache(layers: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache


def _pad_left(x: Tensor, length: int, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = length - shape[dim]
    return x if shape[dim] == 0 else torch.cat([x.new_zeros(shape), x], dim=dim)
