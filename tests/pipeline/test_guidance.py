from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from echo4o_hf.pipeline.guidance import RENORMS, guide, is_active

GOLDEN = Path(__file__).parents[2] / "../shared/reference/golden_a"
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason=f"reference numbers are not at {GOLDEN}")


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "golden.safetensors")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@needs_golden
@pytest.mark.parametrize("size", ["sq", "ns"])
@pytest.mark.parametrize("renorm", RENORMS)
def test_text_guidance_equals_the_official_one(golden, size, renorm):
    velocity, without_text = golden[f"d.{size}.v_cond"][None], golden[f"d.{size}.v_uncond"][None]
    guided = guide(velocity, without_text, velocity, text_scale=4.0, image_scale=1.0, renorm=renorm)
    torch.testing.assert_close(guided[0], golden[f"d.{size}.v_cfg.{renorm}"], atol=2e-5, rtol=0)


@needs_golden
@pytest.mark.parametrize("renorm", RENORMS)
def test_two_guidances_token_by_token(golden, renorm):
    velocity, without_text, without_images = (golden[f"e.v_{name}"] for name in ("cond", "cfg_text", "cfg_img"))
    guided = guide(
        velocity[None], without_text[None], without_images[None], text_scale=4.0, image_scale=1.5, renorm=renorm
    )[0]
    for token in range(len(velocity)):
        v, u, i = velocity[token], without_text[token], without_images[token]
        expected = u + 4.0 * (v - u)
        if renorm == "text_channel":
            expected = expected * min(v.norm() / expected.norm(), 1)
        expected = i + 1.5 * (expected - i)
        if renorm == "channel":
            expected = expected * min(v.norm() / expected.norm(), 1)
        if renorm == "global":
            whole = without_images + 1.5 * (without_text + 4.0 * (velocity - without_text) - without_images)
            expected = expected * min(velocity.norm() / whole.norm(), 1)
        torch.testing.assert_close(guided[token], expected, atol=1e-5, rtol=1e-5)


def test_constant_velocities():
    v, u, i = (torch.full((1, 2, 4), value) for value in (1.0, 0.5, 0.75))
    settings = {"text_scale": 3.0, "image_scale": 2.0, "renorm_min": 1.0}  # no shrinking
    # 0.5 + 3 * 0.5 = 2, then 0.75 + 2 * 1.25 = 3.25
    for renorm in RENORMS:
        torch.testing.assert_close(guide(v, u, i, renorm=renorm, **settings), torch.full((1, 2, 4), 3.25))
    settings["renorm_min"] = 0.0
    torch.testing.assert_close(guide(v, u, i, renorm="global", **settings), v)
    torch.testing.assert_close(guide(v, u, i, renorm="channel", **settings), v)
    # Shrunk to 1 before the images act: 0.75 + 2 * 0.25
    torch.testing.assert_close(guide(v, u, i, renorm="text_channel", **settings), torch.full((1, 2, 4), 1.25))
    settings["renorm_min"] = 0.5
    torch.testing.assert_close(guide(v, u, i, renorm="global", **settings), torch.full((1, 2, 4), 3.25 / 2))


@pytest.mark.parametrize("renorm", RENORMS)
def test_text_scale_of_one_is_no_guidance_at_all(renorm):
    v = randn(2, 5, 4)
    assert guide(v, randn(2, 5, 4) + 1, v - 1, text_scale=1.0, image_scale=2.0, renorm=renorm) is v


@pytest.mark.parametrize("renorm", RENORMS)
def test_norms_are_of_one_image_and_ignore_padding(renorm):
    v, u, i = randn(2, 6, 4), randn(2, 6, 4) * 3, randn(2, 6, 4) * 2
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    settings = {"text_scale": 4.0, "image_scale": 2.0, "renorm": renorm}
    both = guide(v, u, i, mask=mask, **settings)
    first = guide(v[:1, :4], u[:1, :4], i[:1, :4], **settings)
    second = guide(v[1:], u[1:], i[1:], **settings)
    torch.testing.assert_close(both[:1, :4], first)
    torch.testing.assert_close(both[1:], second)


def test_the_norm_never_grows():
    v = randn(1, 6, 4)
    guided = guide(v, -v, v, text_scale=4.0, image_scale=1.0, renorm="channel")
    torch.testing.assert_close(guided.norm(dim=-1), v.norm(dim=-1))
    weaker = guide(v, 1.2 * v, v, text_scale=4.0, image_scale=1.0, renorm="global")  # 1.2 - 4 * 0.2 = 0.4
    torch.testing.assert_close(weaker, 0.4 * v)


def test_the_interval_is_open_below_and_closed_above():
    assert is_active(torch.tensor(1.0), (0.4, 1.0))
    assert is_active(torch.tensor(0.41), (0.4, 1.0))
    assert not is_active(torch.tensor(0.4), (0.4, 1.0))
    assert not is_active(torch.tensor(0.95), (0.4, 0.9))
    assert is_active(torch.tensor(0.9), (0.4, 0.9))
    assert is_active(torch.tensor(1e-3), (0.0, 1.0))
