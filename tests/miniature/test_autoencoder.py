from __future__ import annotations

import json
from importlib.resources import files
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from echo4o_hf.miniature import autoencoder
from echo4o_hf.miniature.autoencoder import (
    build_autoencoder,
    decoded_truths,
    normalise_latents,
    reconstruct,
    to_pixels,
    train,
    train_step,
    training_images,
)
from echo4o_hf.miniature.world import Scene, SceneObject, render

SHIPPED = Path(str(files("echo4o_hf.miniature"))) / "checkpoints" / "shared" / "vae"


@pytest.fixture(scope="module")
def shipped() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(SHIPPED, torch_dtype=torch.float32)


def test_decoded_truths_still_pass(shipped):
    rates = decoded_truths(shipped, 6, seed=11)
    assert np.mean(list(rates.values())) >= 0.80, rates  # the untrained decoder passes none


def test_latents_are_normalised(shipped):
    with torch.no_grad():
        posterior = shipped.encode(to_pixels(training_images(64, seed=5))).latent_dist
    scaled = (posterior.mean - shipped.config.shift_factor) * shipped.config.scaling_factor
    assert scaled.shape == (64, 16, 8, 8)
    assert abs(scaled.mean().item()) < 0.1
    assert scaled.std().item() == pytest.approx(1, abs=0.1)
    assert posterior.std.mean().item() * shipped.config.scaling_factor < 0.1


def test_shipped_weights_are_small_and_half():
    weights = SHIPPED / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 4e6
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float16}
    assert json.loads((SHIPPED / "config.json").read_text())["latent_channels"] == 16


def test_pictures_are_seeded():
    assert torch.equal(training_images(20, seed=1), training_images(20, seed=1))
    assert training_images(20, seed=1).shape == (20, 3, 64, 64)


def test_polishing_leaves_the_encoder_alone():
    torch.manual_seed(0)
    vae = build_autoencoder()
    optimizer = torch.optim.Adam(vae.parameters())
    batch, generator = training_images(2, seed=0), torch.Generator().manual_seed(0)
    for done, encoder_moves in ((0.1, True), (0.9, False)):
        before = {name: value.clone() for name, value in vae.state_dict().items()}
        train_step(vae, optimizer, batch, done, generator)
        moved = {
            name.split(".")[0] for name, value in vae.state_dict().items() if not torch.equal(value, before[name])
        }
        assert moved == ({"encoder", "decoder"} if encoder_moves else {"decoder"})


def test_loss_falls():
    torch.manual_seed(0)
    vae = build_autoencoder()
    optimizer = torch.optim.Adam(vae.parameters())
    batch, generator = training_images(2, seed=0), torch.Generator().manual_seed(0)
    losses = [train_step(vae, optimizer, batch, 0.0, generator) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]


def test_training_resumes_and_leaves_whole_files(tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder, "NUM_IMAGES", 8)
    monkeypatch.setattr(autoencoder, "BATCH_SIZE", 2)
    clock = count(0, 0.25)  # seconds; a slow machine must not decide how many steps fit
    monkeypatch.setattr(autoencoder, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    train(tmp_path, minutes=0.01, seed=0)
    names = {"config.json", "diffusion_pytorch_model.safetensors", "training_state.safetensors"}
    assert {file.name for file in tmp_path.iterdir()} == names
    before = (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()
    train(tmp_path, minutes=0.01, seed=0)  # the time is used up: nothing moves
    assert (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes() == before
    train(tmp_path, minutes=0.02, seed=0)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes() != before


def test_normalising_sets_the_config():
    torch.manual_seed(0)
    vae, images = build_autoencoder(), training_images(8, seed=0)
    normalise_latents(vae, images)
    with torch.no_grad():
        means = vae.encode(to_pixels(images)).latent_dist.mean
    scaled = (means - vae.config.shift_factor) * vae.config.scaling_factor
    assert scaled.mean().item() == pytest.approx(0, abs=1e-4)
    assert scaled.std().item() == pytest.approx(1, abs=1e-4)


def test_reconstructions_are_pictures_of_the_same_size():
    torch.manual_seed(0)
    pictures = [render(Scene((SceneObject("star", "red", 0, 0),)))] * 2
    out = reconstruct(build_autoencoder(), pictures, latent_noise=0.1)
    assert [picture.size for picture in out] == [(64, 64)] * 2
