"""The context of a generated image or text: cached keys and values, written once and only read afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache


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

    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        return [(layer.keys, layer.values) for layer in self.cache.layers]


def _cache(layers: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache


class Branch(NamedTuple):
    """Rows of a batch that lie side by side, and what they see in one layer besides themselves.

    Attributes:
        num_rows: how many.
        keys: (rows, key-value heads, cached tokens, head size) or None; with `has_room`, places for the keys of the
            rows themselves follow, which each call writes.
        values: likewise.
        mask: of the attention, in the form that its implementation takes.
        is_causal: whether it is causal instead.
        has_room: whether `keys` and `values` have places at their ends.
    """

    num_rows: int
    keys: Tensor | None
    values: Tensor | None
    mask: Any = None
    is_causal: bool = False
    has_room: bool = False

    @classmethod
    def after(cls, cache: Cache | None, layer: int, num_rows: int, mask: Any, is_causal: bool) -> Branch:
        """What is cached already, if anything."""
        if cache is None or not cache.get_seq_length(layer):
            return cls(num_rows, None, None, mask, is_causal)
        cached = cache.layers[layer]
        return cls(num_rows, cached.keys, cached.values, mask, is_causal)

    @classmethod
    def with_room(cls, context: Context, layer: int, num_tokens: int, mask: Any) -> Branch:
        """A context, written once into tensors with places for `num_tokens` more."""
        num_rows = len(context.next_position)
        if not len(context):
            return cls(num_rows, None, None, mask)
        cached = context.cache.layers[layer]
        keys, values = (
            torch.cat([x, x.new_empty(*x.shape[:2], num_tokens, x.shape[3])], dim=2)
            for x in (cached.keys, cached.values)
        )
        for states in (keys, values):  # compiled layers serve contexts of all lengths
            torch._dynamo.maybe_mark_dynamic(states, 2)
        if isinstance(mask, Tensor):
            torch._dynamo.maybe_mark_dynamic(mask, mask.dim() - 1)
        return cls(num_rows, keys, values, mask, has_room=True)

    def append(self, cached: Tensor, new: Tensor) -> Tensor:
        """The cached keys or values, and the new ones after them."""
        if not self.has_room:
            return torch.cat([cached, new], dim=2)
        cached[:, :, -new.shape[2] :] = new
        return cached


@dataclass
class NoisyBlock:
    """What noisy images bring to each of their updates, and what they see.

    Attributes:
        markers: (batch, 2, hidden) the embedded start and end of image.
        latent_positions: (batch, tokens, hidden) position embeddings.
        position_embeddings: rope, 2 x (batch, 2 + tokens, head size).
        branches: for each layer, the contexts.
    """

    markers: Tensor
    latent_positions: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    branches: list[list[Branch]]
