"""Segments (a text, an image for seeing, an image for drawing) and how they become the model's two streams.

A sample is a list of segments. The model takes it as two streams that share one attention: *understanding* (texts, the
markers around images, vision patches) and *generation* (latent tokens). Order inside a stream says nothing but the
order of text; `position_ids`, `segment_ids`, `roles` and `sample_ids` say the rest, each over both streams:
(batch, understanding + generation).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

TEXT, IMAGE, TARGET = 0, 1, 2
PADDING = -1
IGNORE = -100

Role = Literal["text", "vision", "latents", "target"]
Grid = tuple[int, int]


@dataclass
class Segment:
    """One piece of a sample.

    Attributes:
        role: "text" (causal), "vision" (an image through the vision encoder), "latents" (a clean image through the
            VAE) or "target" (an image to be denoised, which nothing else sees).
        input_ids: All ids of a text; the two markers of an image.
        patches: (rows * columns, 3 * patch_size**2), for "vision".
        latents: (rows * columns, latent_dim), for "latents" and "target".
        grid: Rows and columns of `patches` or `latents`.
        labels: For a text: the id that each token must predict, -100 where there is no loss.
        advance: Rope positions that it takes; by default its length for a text, 1 for an image, 0 for a target
            (official `PackedDataset`: a clean copy of the target takes the same position).
    """

    role: Role
    input_ids: list[int]
    patches: Tensor | None = None
    latents: Tensor | None = None
    grid: Grid | None = None
    labels: list[int] | None = None
    advance: int | None = None

    @property
    def rope_advance(self) -> int:
        """Rope positions that the segment takes."""
        if self.advance is not None:
            return self.advance
        return {"text": len(self.input_ids), "vision": 1, "latents": 1, "target": 0}[self.role]


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(..., channels, height, width) -> (..., rows * columns, patch_size**2 * channels), channels fastest."""
    *batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    if rows * patch_size != height or columns * patch_size != width:
        raise ValueError(f"height={height} and width={width} must be multiples of patch_size={patch_size}")
    x = images.reshape(*batch, channels, rows, patch_size, columns, patch_size)
    x = x.movedim(-5, -1).movedim(-3, -4)  # (..., rows, columns, patch row, patch column, channels)
    return x.reshape(*batch, rows * columns, patch_size**2 * channels)


def unpatchify(tokens: Tensor, grid: Grid, patch_size: int, channels: int) -> Tensor:
    """(..., rows * columns, patch_size**2 * channels) -> (..., channels, height, width); inverse of `patchify`."""
    *batch, _, _ = tokens.shape
    rows, columns = grid
    x = tokens.reshape(*batch, rows, columns, patch_size, patch_size, channels)
    x = x.movedim(-4, -3).movedim(-1, -5)  # (..., channels, rows, patch row, columns, patch column)
    return x.reshape(*batch, channels, rows * patch_size, columns * patch_size)


def grid_position_ids(grid: Grid, max_per_side: int, interpolate: bool = False) -> Tensor:
    """Ids into a square table of positions, row by row: (rows * columns,).

    The stride is the table's side, not the image's (official `get_flattened_position_ids_extrapolate`); with
    `interpolate`, the image is spread over the whole table (`get_flattened_position_ids_interpolate`, whose float32
    steps decide at the edges of cells).

    Raises:
        ValueError: The grid is larger than the table.
    """
    rows, columns = grid
    if not (0 < rows <= max_per_side and 0 < columns <= max_per_side):
        raise ValueError(
            f"an image of {rows}x{columns} tokens does not fit the table of {max_per_side}x{max_per_side}"
        )
    row_ids, column_ids = torch.arange(rows), torch.arange(columns)
    if interpolate:
        edges = torch.arange(1 / max_per_side, 1.0, 1 / max_per_side)
        row_ids = torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / rows), edges, right=True)
        column_ids = torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / columns), edges, right=True)
    return (row_ids[:, None] * max_per_side + column_ids).flatten()


def real_tokens(lengths: Tensor, num_tokens: int) -> Tensor:
    """Rows of `num_tokens` that are padded at the end: (rows,) -> (rows, num_tokens) bool, False on padding."""
    return torch.arange(num_tokens, device=lengths.device) < lengths[:, None]


@dataclass
class _Row:
    """The two streams of one row, as lists of pieces."""

    input_ids: list[int] = field(default_factory=list)
    vision_mask: list[bool] = field(default_factory=list)
    shift_labels: list[int] = field(default_factory=list)
    structure: tuple[list[list[int]], list[list[int]]] = field(default_factory=lambda: ([], []))
    patches: list[Tensor] = field(default_factory=list)
    vision_grids: list[Grid] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    latent_grids: list[Grid] = field(default_factory=list)

    def add(self, segment: Segment, sample: int, index: int, position: int) -> None:
        understanding, generation = self.structure
        ids = segment.input_ids
        role = {"text": TEXT, "vision": IMAGE, "latents": IMAGE, "target": TARGET}[segment.role]
        for offset in range(len(ids)):
            understanding.append([position + (offset if role == TEXT else 0), index, role, sample])
        self.input_ids += ids
        self.vision_mask += [False] * len(ids)
        self.shift_labels += segment.labels if segment.labels is not None else [IGNORE] * len(ids)
        if segment.patches is not None and segment.grid is not None:
            count = segment.patches.shape[0]
            understanding.extend([[position, index, role, sample]] * count)
            self.input_ids += [0] * count
            self.vision_mask += [True] * count
            self.shift_labels += [IGNORE] * count
            self.patches.append(segment.patches)
            self.vision_grids.append(segment.grid)
        if segment.latents is not None and segment.grid is not None:
            generation.extend([[position, index, role, sample]] * segment.latents.shape[0])
            self.latents.append(segment.latents)
            self.latent_grids.append(segment.grid)


def collate(
    samples: Sequence[Sequence[Segment]],
    *,
    packed: bool = False,
    padding_side: Literal["left", "right"] = "right",
    first_positions: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Tensors for `BagelForConditionalGeneration.forward`.

    A text sample of 4 ids beside an image of 1x2 vision patches, with markers 8 and 9:

        input_ids     [[5, 6, 7, 4], [8, 9, 0, 0]]     the markers come first: order inside an image says nothing
        vision_mask   [[F, F, F, F], [F, F, T, T]]
        position_ids  [[0, 1, 2, 3], [0, 0, 0, 0]]
        segment_ids   [[0, 0, 0, 0], [0, 0, 0, 0]]     -1 is padding
        roles         [[0, 0, 0, 0], [1, 1, 1, 1]]     0 text, 1 image, 2 target

    Args:
        samples: One list of segments per sample.
        packed: All samples in one row, each seeing only itself, instead of one padded row per sample.
        padding_side: Where shorter understanding streams are padded.
        first_positions: Rope position at which each sample begins; 0 by default.
    """
    starts = first_positions if first_positions is not None else [0] * len(samples)
    rows = [_Row() for _ in range(1 if packed else len(samples))]
    index = 0
    for number, (segments, position) in enumerate(zip(samples, starts, strict=True)):
        row = rows[0 if packed else number]
        index = index if packed else 0
        for segment in segments:
            row.add(segment, number if packed else 0, index, position)
            position += segment.rope_advance
            index += 1
    return _stack(rows, padding_side)


def _stack(rows: list[_Row], padding_side: Literal["left", "right"]) -> dict[str, Tensor]:
    def pad(values: list[Tensor], value: float = 0, side: str = "right") -> Tensor:
        return pad_sequence(values, batch_first=True, padding_value=value, padding_side=side)

    def structure(stream: int) -> Tensor:  # (batch, tokens, 4): position, segment, role, sample
        pieces = [torch.tensor(row.structure[stream], dtype=torch.long).reshape(-1, 4) for row in rows]
        return pad(pieces, PADDING, padding_side if stream == 0 else "right")

    tokens = torch.cat([structure(0), structure(1)], dim=1)
    batch = {
        "input_ids": pad([torch.tensor(row.input_ids, dtype=torch.long) for row in rows], 0, padding_side),
        # flex attention compiles only masks whose tensors are contiguous
        "position_ids": tokens[..., 0].clamp(min=0).contiguous(),
        "segment_ids": tokens[..., 1].contiguous(),
        "roles": tokens[..., 2].clamp(min=0).contiguous(),
        "sample_ids": tokens[..., 3].contiguous(),
    }
    labels = pad([torch.tensor(row.shift_labels, dtype=torch.long) for row in rows], IGNORE, padding_side)
    if (labels != IGNORE).any():
        batch["shift_labels"] = labels
    if any(row.patches for row in rows):
        patch_dim = next(row.patches[0].shape[-1] for row in rows if row.patches)
        batch["vision_mask"] = pad([torch.tensor(row.vision_mask, dtype=torch.bool) for row in rows], 0, padding_side)
        batch["pixel_values"] = pad([torch.cat([*row.patches, torch.zeros(0, patch_dim)]) for row in rows])
        batch["vision_grids"] = pad([torch.tensor(row.vision_grids, dtype=torch.long).reshape(-1, 2) for row in rows])
    if any(row.latents for row in rows):
        latent_dim = next(row.latents[0].shape[-1] for row in rows if row.latents)
        batch["latents"] = pad(
            [torch.cat([*(x.float().cpu() for x in row.latents), torch.zeros(0, latent_dim)]) for row in rows]
        )
        batch["latent_grids"] = pad([torch.tensor(row.latent_grids, dtype=torch.long).reshape(-1, 2) for row in rows])
    return batch


def visibility(
    past: Tensor, segment_ids: Tensor, roles: Tensor, sample_ids: Tensor
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask function, in transformers' form: does, in this row and any head, this query see this key?

    A token sees the cache, the earlier segments of its sample that are no target, and its own segment: all of an
    image, the past of a text (official `create_sparse_mask`).

    Args:
        past: (batch, cached tokens) bool, False on padding; keys count from there, queries follow it.
        segment_ids: (batch, tokens), as in `collate`.
        roles: likewise.
        sample_ids: likewise.
    """
    cached = past.shape[1]

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        q, k = query - cached, (key - cached).clamp(min=0)
        q_segment, k_segment = segment_ids[row, q], segment_ids[row, k]
        earlier = (k_segment < q_segment) & (roles[row, k] != TARGET) & (k_segment != PADDING)
        own = (k_segment == q_segment) & ((roles[row, q] != TEXT) | (k <= q))
        current = (sample_ids[row, k] == sample_ids[row, q]) & (earlier | own)
        in_past = past[row, key.clamp(max=cached - 1)] if cached else torch.zeros_like(current)
        return torch.where(key < cached, in_past, current)

    return visible
