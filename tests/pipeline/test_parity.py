"""The pipeline against numbers of the official code (Bagel 056b5fd, Echo-4o ae5bc3f), in float32 on a CPU."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from echo4o_hf.model.image_processing_bagel import BagelImageProcessor
from echo4o_hf.model.packing import patchify
from echo4o_hf.pipeline.denoiser import Denoiser
from echo4o_hf.pipeline.guidance import TEXT_TO_IMAGE
from echo4o_hf.pipeline.pipeline_echo4o import Echo4oPipeline

GOLDEN = Path(__file__).parents[2] / "../shared/reference/golden_a"
pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason=f"reference numbers are not at {GOLDEN}")

STEPS = 7  # the official num_timesteps=8
TEXT_VARIANTS = {
    "global": {},
    "channel": {"guidance_renorm": "channel"},
    "text_channel": {"guidance_renorm": "text_channel"},
    "global_renorm_min_0.85": {"guidance_renorm_min": 0.85},
    "interval_0.5_0.95": {"guidance_interval": (0.5, 0.95)},
    "cfg_img_1.5": {"image_guidance_scale": 1.5},
    "nocfg": {"guidance_scale": 1.0},
}
REFERENCE_VARIANTS = ["bagel", "channel", "text_channel", "echo4o", "nocfg", "img_only"]


@pytest.fixture(scope="module")
def numbers():
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="module")
def facts():
    return json.loads((GOLDEN / "golden.json").read_text())


@pytest.fixture(scope="module")
def pipe(facts):
    pipe = Echo4oPipeline.from_pretrained(GOLDEN)
    pipe.set_progress_bar_config(disable=True)
    # Case e was recorded with smaller sizes than the checkpoint could take.
    pipe.processor.image_processor = BagelImageProcessor(
        latent_size=facts["e"]["vae_transform"], vision_size=facts["e"]["vit_transform"]
    )
    return pipe


@pytest.fixture(scope="module")
def prompts(facts):
    return facts["meta"]["prompts"]


@pytest.fixture(scope="module")
def references(numbers):
    return [Image.fromarray(numbers[f"e.img{index}.uint8"].numpy()) for index in range(2)]


def variant_settings(facts, name):
    variant = facts["e"]["variants"][name]
    return {
        "guidance_scale": variant["cfg_text_scale"],
        "image_guidance_scale": variant["cfg_img_scale"],
        "guidance_interval": tuple(variant["cfg_interval"]),
        "guidance_renorm": variant["cfg_renorm_type"],
    }


def assert_close(actual, expected, atol=1e-4):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def assert_pixels(images, expected):
    assert (images.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("size", ["sq", "ns"])
@pytest.mark.parametrize("variant", TEXT_VARIANTS)
def test_text_to_image(pipe, facts, numbers, prompts, size, variant):
    height, width = facts["d"]["sizes"][size]["H_W"]
    latents = pipe(
        prompts["t2i"],
        height=height,
        width=width,
        num_inference_steps=STEPS,
        latents=numbers[f"d.{size}.noise"][None],
        output_type="latent",
        **TEXT_VARIANTS[variant],
    ).images
    assert_close(latents[0], numbers[f"d.{size}.latent.{variant}"])


@pytest.mark.parametrize("size", ["sq", "ns"])
def test_pixels(pipe, facts, numbers, prompts, size):
    height, width = facts["d"]["sizes"][size]["H_W"]
    noise = numbers[f"d.{size}.noise"][None]
    arguments = {"height": height, "width": width, "num_inference_steps": STEPS, "latents": noise}
    expected = numbers[f"d.{size}.image_uint8.global"]
    array = pipe(prompts["t2i"], output_type="np", **arguments).images[0]
    assert_pixels(torch.from_numpy(array * 255).to(torch.uint8), expected)
    image = pipe(prompts["t2i"], **arguments).images[0]
    assert_pixels(torch.from_numpy(np.array(image)), expected)
    if size == "sq":
        official = (numbers["d.sq.image_float.global"][0] * 0.5 + 0.5).clamp(0, 1)
        assert_close(pipe(prompts["t2i"], output_type="pt", **arguments).images[0], official)


def test_every_step(pipe, numbers, prompts):
    trajectory, timesteps = [numbers["d.sq.noise"]], []

    def record(pipe, step, timestep, tensors):
        trajectory.append(tensors["latents"][0])
        timesteps.append(timestep / 1000)
        return tensors

    arguments = {"height": 64, "width": 64, "num_inference_steps": STEPS, "output_type": "latent"}
    pipe(prompts["t2i"], latents=numbers["d.sq.noise"][None], callback_on_step_end=record, **arguments)
    trajectory, timesteps = torch.stack(trajectory), torch.stack([*timesteps, torch.tensor(0.0)])
    torch.testing.assert_close(timesteps, numbers["d.timesteps_with_final_zero"], atol=1e-7, rtol=1e-6)
    assert_close(trajectory, numbers["d.sq.trajectory.global"])
    velocities = (trajectory[:-1] - trajectory[1:]) / (timesteps[:-1] - timesteps[1:])[:, None, None]
    assert_close(velocities, numbers["d.sq.velocities.global"])


@torch.no_grad()
def velocity_of(pipe, noise, timestep, context, grid):
    return pipe.model.predict_velocity(noise, timestep, pipe.model.prepare_noisy_block([context], [grid]))


@pytest.mark.parametrize("size", ["sq", "ns"])
def test_velocities_of_text_to_image(pipe, facts, numbers, prompts, size):
    contexts = pipe.encode_contexts([[prompts["t2i"]]])
    height, width = facts["d"]["sizes"][size]["H_W"]
    grid, noise, timestep = (height // 16, width // 16), numbers[f"d.{size}.noise"][None], torch.tensor([0.75])
    conditional = velocity_of(pipe, noise, timestep, contexts.conditional, grid)
    assert_close(conditional[0], numbers[f"d.{size}.v_cond"], 2e-5)
    without_text = velocity_of(pipe, noise, timestep, contexts.without_text, grid)
    assert_close(without_text[0], numbers[f"d.{size}.v_uncond"], 2e-5)
    for renorm in ("global", "channel", "text_channel"):
        guidance = replace(TEXT_TO_IMAGE, renorm=renorm)
        guided = Denoiser(pipe.model, contexts, [0], [grid], [guidance])(noise, timestep[0])
        assert_close(guided[0], numbers[f"d.{size}.v_cfg.{renorm}"], 2e-5)


@pytest.mark.parametrize("renorm", ["channel", "global"])
def test_a_batch_of_two_sizes(pipe, facts, numbers, prompts, renorm):
    """With "global" the official batch takes one norm over both images; ours equals the official single images."""
    sizes = [(height // 16, width // 16) for height, width in facts["d"]["batch"]["sizes"]]
    noise = [numbers[key] for key in facts["d"]["batch"]["noise_keys"]]
    guidances = [replace(TEXT_TO_IMAGE, renorm=renorm)] * 2
    contexts = pipe.encode_contexts([[prompts["t2i"]], [prompts["t2i_b"]]])
    latents = pipe.prepare_latents(sizes, None, torch.nn.utils.rnn.pad_sequence(noise, batch_first=True))
    denoiser = Denoiser(pipe.model, contexts, [0, 1], sizes, guidances)
    for step, timestep in enumerate(pipe.prepare_timesteps(STEPS)):
        velocity = denoiser(latents, pipe.scheduler.sigmas[step])
        latents = pipe.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    assert not latents[0, 16:].any()
    if renorm == "channel":
        assert_close(latents[0, :16], numbers["d.batch.latent0.channel"])
        assert_close(latents[1], numbers["d.batch.latent1.channel"])
    else:
        assert_close(latents[0, :16], numbers["d.sq.latent.global"])
        arguments = {"height": 96, "width": 64, "num_inference_steps": STEPS, "output_type": "latent"}
        alone = pipe(prompts["t2i_b"], latents=noise[1][None], **arguments).images
        assert_close(latents[1], alone[0], 1e-5)
        assert (latents[1] - numbers["d.batch.latent1.global"]).abs().max() > 1e-3


@pytest.mark.parametrize("variant", REFERENCE_VARIANTS)
def test_references(pipe, facts, numbers, prompts, references, variant):
    latents = pipe(
        prompts["edit"],
        image=references,
        num_inference_steps=STEPS,
        latents=numbers["e.noise"][None],
        output_type="latent",
        **variant_settings(facts, variant),
    ).images
    assert_close(latents[0], numbers[f"e.latent.{variant}"])


@pytest.mark.parametrize("variant", ["bagel", "echo4o"])
def test_pixels_with_references(pipe, facts, numbers, prompts, references, variant):
    settings = {} if variant == "echo4o" else variant_settings(facts, variant)  # the defaults are Echo-4o's
    image = pipe(
        prompts["edit"],
        image=references,
        num_inference_steps=STEPS,
        latents=numbers["e.noise"][None],
        **settings,
    ).images[0]
    assert_pixels(torch.from_numpy(np.array(image)), numbers[f"e.image_uint8.{variant}"])


def test_references_with_another_size(pipe, facts, numbers, prompts, references):
    height, width = facts["e"]["other_size"]["H_W"]
    latents = pipe(
        prompts["edit"],
        image=references,
        height=height,
        width=width,
        num_inference_steps=STEPS,
        latents=numbers["d.ns.noise"][None],
        output_type="latent",
        **variant_settings(facts, "bagel"),
    ).images
    assert_close(latents[0], numbers["e.latent.other_size"])


def test_sampled_reference_latents(facts, numbers, prompts, references):
    """The official code samples the posterior, ours takes its mean; with the recorded noise the rest is equal."""

    class Sampled(Echo4oPipeline):
        def encode_image(self, image):
            segment = super().encode_image(image)
            index = 0 if segment.grid == (4, 6) else 1
            pixels = self.processor.image_processor.latent_pixels(image)[None]
            deviation = self.vae.encode(pixels).latent_dist.std * numbers[f"e.img{index}.eps"]
            latents = numbers[f"e.img{index}.latent_mode"] + self.vae.config.scaling_factor * deviation
            return replace(segment, latents=patchify(latents[0], 2))

    pipe = Sampled.from_pretrained(GOLDEN)
    pipe.processor.image_processor = BagelImageProcessor(
        latent_size=facts["e"]["vae_transform"], vision_size=facts["e"]["vit_transform"]
    )
    arguments = {"num_inference_steps": STEPS, "latents": numbers["e.noise"][None], "output_type": "latent"}
    latents = pipe(prompts["edit"], image=references, **arguments, **variant_settings(facts, "bagel")).images
    assert_close(latents[0], numbers["e.latent.bagel_sampled_vae"])


def test_reference_latents(pipe, numbers, references):
    for index, image in enumerate(references):
        resized = pipe.processor.image_processor.resize_for_latents(image)
        segment = pipe.encode_image(resized)
        expected = numbers[f"e.img{index}.latent_mode"][0]
        z, h, w = expected.shape
        tokens = expected.reshape(z, h // 2, 2, w // 2, 2).permute(1, 3, 2, 4, 0).reshape(h * w // 4, 4 * z)
        assert_close(segment.latents, tokens, 2e-5)


def test_contexts_and_velocities_with_references(pipe, facts, numbers, prompts, references):
    resized = [pipe.processor.image_processor.resize_for_latents(image) for image in references]
    contexts = pipe.encode_contexts([[*resized, prompts["edit"]]])
    grid, noise, timestep = (6, 3), numbers["e.noise"][None], torch.tensor([0.75])
    for name, context, velocity in (
        ("gen", contexts.conditional, "v_cond"),
        ("cfg_text", contexts.without_text, "v_cfg_text"),
        ("cfg_img", contexts.without_images, "v_cfg_img"),
    ):
        expected = facts["e"]["contexts"][name]
        assert (len(context), context.next_position.tolist()) == (expected["kv_len"], [expected["next_rope"]])
        actual = velocity_of(pipe, noise, timestep, context, grid)
        assert_close(actual[0], numbers[f"e.{velocity}"], 2e-5)


def test_interleaved_prompt(pipe, facts, numbers, prompts, references):
    latents = pipe(
        [prompts["pre"], references[0], prompts["edit"]],
        num_inference_steps=STEPS,
        latents=numbers["e.interleaved.noise"][None],
        output_type="latent",
        **variant_settings(facts, "bagel"),
    ).images
    assert_close(latents[0], numbers["e.interleaved.latent"])


def test_prompts_of_all_kinds_in_one_batch_equal_the_single_ones(pipe, facts, numbers, prompts, references):
    """Text-to-image and references have other default settings, sizes and contexts."""
    batch = [[prompts["t2i"]], [*references, prompts["edit"]], [prompts["pre"], references[0], prompts["edit"]]]
    noise = [numbers["d.ns.noise"], numbers["e.noise"], numbers["e.interleaved.noise"]]
    common = {"num_inference_steps": STEPS, "output_type": "latent"}
    # The text-to-image prompt would be drawn at 256x256 by default, so all are drawn at 96x64.
    sizes = {"height": 96, "width": 64}
    start = torch.stack([numbers["d.ns.noise"]] * 3)
    together = pipe(batch, latents=start, **sizes, **common).images
    for index, items in enumerate(batch):
        alone = pipe([items], latents=start[index : index + 1], **sizes, **common).images
        assert_close(together[index], alone[0], 2e-5)
    # Own sizes: 96x48 and 64x96.
    padded = torch.nn.utils.rnn.pad_sequence(noise[1:], batch_first=True)
    together = pipe(batch[1:], latents=padded, **common, **variant_settings(facts, "bagel")).images
    assert_close(together[0, :18], numbers["e.latent.bagel"])
    assert_close(together[1], numbers["e.interleaved.latent"])
