from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from echo4o_hf.pipeline.guidance import REFERENCES, RENORMS, TEXT_TO_IMAGE, Guidance, guide

GOLDEN = Path(__file__).parents[2] / "../shared/reference/golden_a"
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason=f"reference numbers are not at {GOLDEN}")


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "golden.safetensors")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@needs_golden
@pytest.mark.parametrize("size", ["sq", "ns"])
@pytest.mark.parametrize("renorm", RENORMS)
def test_text_guidance_equals_the_official_one(golden, size, renorm):
    velocity, without_text = golden[f"d.{size}.v_cond"][None], golden[f"d.{size}.v_uncond"][None]
    guided = guide(velocity, without_text, velocity, Guidance(4.0, 1.0, (0.0, 1.0), renorm))
    torch.testing.assert_close(guided[0], golden[f"d.{size}.v_cfg.{renorm}"], atol=2e-5, rtol=0)


@needs_golden
@pytest.mark.parametrize("renorm", RENORMS)
def test_two_guidances_token_by_token(golden, renorm):
    velocity, without_text, without_images = (golden[f"e.v_{name}"] for name in ("cond", "cfg_text", "cfg_img"))
    guidance = Guidance(4.0, 1.5, (0.0, 1.0), renorm)
    guided = guide(velocity[None], without_text[None], without_images[None], guidance)[0]
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

    def guided(renorm, renorm_min):
        return guide(v, u, i, Guidance(3.0, 2.0, (0.0, 1.0), renorm, renorm_min))

    # 0.5 + 3 * 0.5 = 2, then 0.75 + 2 * 1.25 = 3.25; a minimum of 1 does not shrink
    for renorm in RENORMS:
        torch.testing.assert_close(guided(renorm, 1.0), torch.full((1, 2, 4), 3.25))
    torch.testing.assert_close(guided("global", 0.0), v)
    torch.testing.assert_close(guided("channel", 0.0), v)
    # Shrunk to 1 before the images act: 0.75 + 2 * 0.25
    torch.testing.assert_close(guided("text_channel", 0.0), torch.full((1, 2, 4), 1.25))
    torch.testing.assert_close(guided("global", 0.5), torch.full((1, 2, 4), 3.25 / 2))


@pytest.mark.parametrize("renorm", RENORMS)
def test_text_scale_of_one_is_no_guidance_at_all(renorm):
    v = randn(2, 5, 4)
    guidance = Guidance(1.0, 2.0, (0.0, 1.0), renorm)
    assert guide(v, randn(2, 5, 4) + 1, v - 1, guidance) is v
    assert not guidance.is_active(torch.tensor(0.5))


@pytest.mark.parametrize("renorm", RENORMS)
def test_norms_are_of_one_image_and_ignore_padding(renorm):
    v, u, i = randn(2, 6, 4), randn(2, 6, 4, seed=1) * 3, randn(2, 6, 4, seed=2) * 2
    v[1] *= 5
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    guidance = Guidance(4.0, 2.0, (0.0, 1.0), renorm)
    both = guide(v, u, i, guidance, mask)
    first = guide(v[:1, :4], u[:1, :4], i[:1, :4], guidance)
    second = guide(v[1:], u[1:], i[1:], guidance)
    torch.testing.assert_close(both[:1, :4], first)
    torch.testing.assert_close(both[1:], second)


def test_the_norm_never_grows():
    v = randn(1, 6, 4)
    guided = guide(v, -v, v, Guidance(4.0, 1.0, (0.0, 1.0), "channel"))
    torch.testing.assert_close(guided.norm(dim=-1), v.norm(dim=-1))
    weaker = guide(v, 1.2 * v, v, Guidance(4.0, 1.0, (0.0, 1.0), "global"))  # 1.2 - 4 * 0.2 = 0.4
    torch.testing.assert_close(weaker, 0.4 * v)


@pytest.mark.parametrize(
    ("interval", "timestep", "active"),
    [
        ((0.4, 1.0), 1.0, True),
        ((0.4, 1.0), 0.41, True),
        ((0.4, 1.0), 0.4, False),
        ((0.4, 0.9), 0.95, False),
        ((0.4, 0.9), 0.9, True),
        ((0.0, 1.0), 1e-3, True),
    ],
)
def test_the_interval_is_open_below_and_closed_above(interval, timestep, active):
    assert replace(TEXT_TO_IMAGE, interval=interval).is_active(torch.tensor(timestep)) == active


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"renorm": "local"}, "guidance_renorm='local' is unknown; choose one of global, channel, text_channel"),
        ({"interval": (0.9, 0.1)}, r"guidance_interval=\(0.9, 0.1\) must be"),
        ({"interval": (0.9,)}, r"guidance_interval=\(0.9,\) must be"),
        ({"renorm_min": 1.5}, "guidance_renorm_min=1.5"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(REFERENCES, **change)
