"""Train the miniature's autoencoder on rendered scenes: 64x64 pixels to 16 channels of 8x8 latents.

    python -m echo4o_hf.miniature.autoencoder --output DIR --minutes 60 --seed 0

First both halves learn together (L1 + MSE + a small KL term), then the decoder alone is polished on noisy latents,
since the latents that it will decode come from a generator that errs. Run again, the command resumes.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.models import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from echo4o_hf.miniature.captions import sample_item, scene_for
from echo4o_hf.miniature.items import TAGS
from echo4o_hf.miniature.judge import verdict
from echo4o_hf.miniature.world import (
    BACKGROUND,
    COLORS,
    GRID,
    IMAGE_SIZE,
    PATTERNS,
    SHAPES,
    Scene,
    SceneObject,
    render,
)

POLISH_SHARE = 0.7  # of the time, decoder only: it costs less per step and forgives what the generator gets wrong
LATENT_NOISE = {"joint": 0.1, "polish": 0.15}  # in units of the latents' standard deviation
LEARNING_RATE = {"joint": 2e-3, "polish": 1e-3}
KL_WEIGHT = 1e-7
OBJECT_WEIGHT = 6.0  # extra weight of pixels near objects: most pixels are background, and easy
CONTRAST = 128  # objects of less contrast weigh more, or white and pink shapes are learned last
BATCH_SIZE = 16
NUM_IMAGES = 20_000
CHECKPOINT_SECONDS = 60.0
STATE_FILE = "training_state.safetensors"


@dataclass
class Progress:
    """How far the training is; `seconds` counts over all runs."""

    steps: int = 0
    seconds: float = 0.0


def build_autoencoder() -> AutoencoderKL:
    """The untrained autoencoder: the official family (GroupNorm, SiLU, attention in the middle) at tiny size."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=2,  # with 8, one group per channel on the first level, background and objects tint each other
        sample_size=IMAGE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def training_images(count: int, seed: int) -> Tensor:
    """Random pictures as uint8 (count, 3, 64, 64): scenes of captions, crowded and surreal ones, plain ones, noise."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(["item", "crowd", "plain", "noise"], count, p=[0.65, 0.32, 0.015, 0.015])
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for index, kind in enumerate(tqdm(kinds, desc="rendering", unit="picture")):
        if kind == "item":
            images[index] = np.asarray(render(scene_for(sample_item(rng), rng), rng))
        elif kind == "crowd":
            images[index] = np.asarray(render(_crowd(rng), rng))
        elif kind == "plain":
            images[index] = rng.integers(0, 256, 3)
        else:
            coarse = rng.integers(0, 256, (int(rng.integers(4, 33)),) * 2 + (3,), np.uint8)
            smooth = Image.fromarray(coarse).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
            images[index] = np.asarray(smooth)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def train(output: Path, minutes: float, seed: int) -> AutoencoderKL:
    """Train for `minutes` in all, resuming what lies in `output`; the result is saved there in float16."""
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    vae = build_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE["joint"], betas=(0.9, 0.99))
    progress = _load_state(output / STATE_FILE, vae, optimizer)
    images = training_images(NUM_IMAGES, seed)
    generator = torch.Generator().manual_seed(seed + progress.steps)
    saved, before, clock = progress.seconds, progress.seconds, time.monotonic()
    initial = min(progress.seconds, minutes * 60)
    with tqdm(total=minutes * 60, initial=initial, mininterval=5, bar_format=_BAR) as bar:
        while progress.seconds < minutes * 60:
            batch = images[torch.randint(len(images), (BATCH_SIZE,), generator=generator)]
            loss = train_step(vae, optimizer, batch, progress.seconds / (minutes * 60), generator)
            progress.steps += 1
            progress.seconds = before + time.monotonic() - clock
            bar.set_postfix_str(f"step {progress.steps}, loss {loss:.4f}", refresh=False)
            bar.update(min(progress.seconds, bar.total) - bar.n)
            if progress.seconds - saved > CHECKPOINT_SECONDS:
                _save_state(output / STATE_FILE, vae, optimizer, progress)
                saved = progress.seconds
    _save_state(output / STATE_FILE, vae, optimizer, progress)
    normalise_latents(vae, images[:2000])
    save_autoencoder(vae, output)
    return vae


def train_step(
    vae: AutoencoderKL, optimizer: torch.optim.Optimizer, batch: Tensor, done: float, generator: torch.Generator
) -> float:
    """One update on uint8 (batch, 3, 64, 64), returning the loss; `done` in 0..1 sets phase and learning rate."""
    phase, phase_done = "joint", done / (1 - POLISH_SHARE)
    if done >= 1 - POLISH_SHARE:
        phase, phase_done = "polish", (done - 1 + POLISH_SHARE) / POLISH_SHARE
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE[phase] * (0.02 + 0.98 * (1 + math.cos(math.pi * min(phase_done, 1.0))) / 2)
    pixels = to_pixels(batch).contiguous(memory_format=torch.channels_last)
    with torch.set_grad_enabled(phase == "joint"):
        posterior = vae.encode(pixels).latent_dist
    latents = posterior.sample(generator) if phase == "joint" else posterior.mean
    spread = LATENT_NOISE[phase] * posterior.mean.detach().std()
    latents = latents + spread * torch.randn(latents.shape, generator=generator)
    error = vae.decode(latents).sample - pixels
    loss = (_pixel_weights(batch) * (error.abs() + error.square())).mean()
    if phase == "joint":
        loss = loss + KL_WEIGHT * posterior.kl().mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def to_pixels(images: Tensor) -> Tensor:
    """Uint8 pictures (batch, 3, height, width) as float in -1..1."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Set `shift_factor` and `scaling_factor` so that scaled posterior means have mean 0 and standard deviation 1."""
    means = torch.cat([vae.encode(to_pixels(part)).latent_dist.mean for part in images.split(100)])
    vae.register_to_config(shift_factor=means.mean().item(), scaling_factor=1 / means.std().item())


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: list[Image.Image], latent_noise: float = 0.0) -> list[Image.Image]:
    """Encode and decode; `latent_noise` is the standard deviation of noise added to the scaled latents."""
    images = torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]))
    generator = torch.Generator().manual_seed(0)
    decoded = []
    for part in images.permute(0, 3, 1, 2).split(64):
        latents = vae.encode(to_pixels(part)).latent_dist.mean
        noise = torch.randn(latents.shape, generator=generator)
        pixels = vae.decode(latents + latent_noise / vae.config.scaling_factor * noise).sample
        decoded.append(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1))
    return [Image.fromarray(array) for array in torch.cat(decoded).numpy()]


def decoded_truths(vae: AutoencoderKL, per_tag: int, seed: int, latent_noise: float = 0.0) -> dict[str, float]:
    """Per tag, the share of rendered truths that the judge still passes after encoding and decoding."""
    rng = np.random.default_rng(seed)
    rates = {}
    for tag in TAGS:
        items = [sample_item(rng, tag) for _ in range(per_tag)]
        pictures = reconstruct(vae, [render(scene_for(item, rng), rng) for item in items], latent_noise)
        rates[tag] = sum(verdict(*pair).correct for pair in zip(items, pictures, strict=True)) / per_tag
    return rates


def save_autoencoder(vae: AutoencoderKL, output: Path) -> None:
    """Save in float16; each file appears under its name only when it is whole."""
    partial = output / "partial"
    half = build_autoencoder()
    half.load_state_dict(vae.state_dict())
    half.register_to_config(shift_factor=vae.config.shift_factor, scaling_factor=vae.config.scaling_factor)
    half.half().save_pretrained(partial)
    for file in partial.iterdir():
        os.replace(file, output / file.name)
    partial.rmdir()


def _pixel_weights(images: Tensor) -> Tensor:
    """(batch, 1, height, width) weights, large on and around objects, so that holes and notches count as much."""
    contrast = (images - torch.tensor(BACKGROUND).view(1, 3, 1, 1)).abs().amax(1, keepdim=True).float()
    nearby = nn.functional.max_pool2d(contrast, 7, stride=1, padding=3)
    return 1 + OBJECT_WEIGHT * (nearby > 8) * (CONTRAST / nearby.clamp_min(CONTRAST / 2)).square()


def _crowd(rng: np.random.Generator) -> Scene:
    """Objects in most quarters and cells, of all patterns."""
    objects = []
    density = rng.uniform(0.3, 1.0)
    for row in range(0, GRID, 2):
        for col in range(0, GRID, 2):
            if rng.random() < 0.3:
                objects.append(_any_object(rng, row, col, "large"))
                continue
            places = [(row + i, col + j) for i in (0, 1) for j in (0, 1)]
            objects += [_any_object(rng, *place, "normal") for place in places if rng.random() < density]
    return Scene(tuple(objects))


def _any_object(rng: np.random.Generator, row: int, col: int, size: str) -> SceneObject:
    shape, inlay = (str(name) for name in rng.choice(SHAPES, 2, replace=False))
    color, second = (str(name) for name in rng.choice(COLORS, 2, replace=False))
    pattern = str(rng.choice(PATTERNS)) if size == "large" and rng.random() < 0.4 else "plain"
    return SceneObject(shape, color, row, col, size, pattern, second, inlay)


def _save_state(path: Path, vae: AutoencoderKL, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    tensors = {f"model.{name}": value.contiguous() for name, value in vae.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value.contiguous() for name, value in moments.items()}
    metadata = {"steps": str(progress.steps), "seconds": str(progress.seconds)}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata)
    os.replace(partial, path)


def _load_state(path: Path, vae: AutoencoderKL, optimizer: torch.optim.Optimizer) -> Progress:
    if not path.exists():
        return Progress()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    vae.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, moment = name.split(".")
            state.setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return Progress(int(metadata["steps"]), float(metadata["seconds"]))


_BAR = "{percentage:3.0f}% {bar} {n:.0f}/{total:.0f} s{postfix}"


def main() -> None:
    """Parse the command line, train, print what decoded truths score."""
    parser = argparse.ArgumentParser(description="Train the miniature's autoencoder.")
    parser.add_argument("--output", type=Path, required=True, help="folder of the result and of the training state")
    parser.add_argument("--minutes", type=float, default=60.0, help="training time, over all runs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    vae = train(arguments.output, arguments.minutes, arguments.seed)
    for noise in (0.0, 0.2):
        rates = decoded_truths(vae, 50, seed=arguments.seed + 1, latent_noise=noise)
        for tag, rate in rates.items():
            print(f"latent noise {noise}: {rate:6.1%} of decoded truths pass, {tag}")  # noqa: T201
        print(f"latent noise {noise}: {sum(rates.values()) / len(rates):6.1%} of decoded truths pass, all")  # noqa: T201


if __name__ == "__main__":
    main()
