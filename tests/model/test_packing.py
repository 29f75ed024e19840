from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from echo4o_hf.model.packing import Segment, collate, grid_position_ids, patchify, unpatchify

GOLDEN = Path(__file__).parents[2] / "../shared/reference/golden_a"


def image(role, grid, **tokens):
    return Segment(role, [8, 9], grid=grid, **tokens)


def test_the_batch_of_the_docstring():
    batch = collate([[Segment("text", [5, 6, 7, 4])], [image("vision", (1, 2), patches=torch.ones(2, 12))]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 4], [8, 9, 0, 0]]
    assert batch["vision_mask"].int().tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert batch["segment_ids"].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0]]
    assert batch["roles"].tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert batch["pixel_values"].shape == (2, 2, 12)
    assert batch["vision_grids"].tolist() == [[[0, 0]], [[1, 2]]]


def test_rope_positions_follow_the_official_rule():
    latents = {"latents": torch.zeros(2, 4)}
    dropped = Segment("text", [], advance=1)
    sample = [
        dropped,
        image("vision", (1, 1), patches=torch.zeros(1, 12)),
        Segment("text", [1, 2]),
        image("target", (1, 2), **latents),
        image("latents", (1, 2), **latents),
        Segment("text", [3]),
    ]
    batch = collate([sample])
    # understanding: vision markers and patch, text, markers of the target, of its copy, text; generation: 2 + 2
    assert batch["position_ids"].tolist() == [[1, 1, 1, 2, 3, 4, 4, 4, 4, 5, 4, 4, 4, 4]]
    assert batch["latent_grids"].tolist() == [[[1, 2], [1, 2]]]


def test_left_padding_keeps_the_last_token_at_the_end():
    batch = collate([[Segment("text", [5])], [Segment("text", [6, 7])]], padding_side="left")
    assert batch["input_ids"].tolist() == [[0, 5], [6, 7]]
    assert batch["segment_ids"].tolist() == [[-1, 0], [0, 0]]


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4))
def test_unpatchify_inverts_patchify(rows, columns, patch_size, channels):
    images = torch.randn(2, channels, rows * patch_size, columns * patch_size)
    tokens = patchify(images, patch_size)
    assert tokens.shape == (2, rows * columns, patch_size**2 * channels)
    assert torch.equal(unpatchify(tokens, (rows, columns), patch_size, channels), images)
    assert tokens[0, 0, :channels].tolist() == images[0, :, 0, 0].tolist()  # channels fastest


@pytest.mark.parametrize("interpolate", [False, True])
def test_positions_stay_in_the_table(interpolate):
    ids = grid_position_ids((3, 5), 7, interpolate)
    assert len(set(ids.tolist())) == 15 and int(ids.max()) < 49
    with pytest.raises(ValueError, match="8x5 tokens does not fit the table of 7x7"):
        grid_position_ids((8, 5), 7, interpolate)


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"reference numbers are not at {GOLDEN}")
def test_interpolated_positions_equal_the_official_ones():
    numbers = load_file(GOLDEN / "golden.safetensors")
    for name, grid, side in (("vae_small", (4, 6), 64), ("vit_small", (2, 4), 70)):
        assert torch.equal(grid_position_ids(grid, side, interpolate=True), numbers[f"g.pos_interpolate.{name}"])


def test_sizes_off_the_grid_are_refused():
    with pytest.raises(ValueError, match="height=5 and width=4 must be multiples of patch_size=2"):
        patchify(torch.zeros(3, 5, 4), 2)
