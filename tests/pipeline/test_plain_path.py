"""What the pipeline draws in one packed batch, against a plain path written out here.

There, each image is drawn alone and each branch of guidance is one pass over its whole sequence, as in training:
without a cache, a batch, or anything of the pipeline's loop.
"""

import itertools

import pytest
import skimage.data
import torch
from PIL import Image

from echo4o_hf.model.packing import Segment, collate
from echo4o_hf.pipeline.guidance import REFERENCES, RENORMS, TEXT_TO_IMAGE, Guidance, guide
from echo4o_hf.pipeline.prompts import THINKING_PROMPT

CAT, ROCKET = Image.fromarray(skimage.data.chelsea()), Image.fromarray(skimage.data.rocket())
PORTRAIT, COLUMN = ROCKET.crop((200, 0, 400, 400)), CAT.crop((0, 0, 100, 300))
PROMPTS = {
    "text": ["a red cat"],
    "reference": [CAT, "two hats"],
    "two references": [CAT, PORTRAIT, "a blue cat"],
    "four references": [COLUMN, CAT, PORTRAIT, ROCKET, "a cat"],
    "interleaved": ["a red", COLUMN, "cat two hats"],
    "an image last": ["a red cat", CAT, "two", PORTRAIT],
}
SCALES = {"none": (1.0, 2.0), "text": (4.0, 1.0), "text and images": (4.0, 1.5)}
STEPS = 2  # at the timesteps 1 and 0.75
INTERVALS = {"inside": (0.0, 1.0), "first step only": (0.8, 1.0), "outside": (0.0, 0.5)}


def plain_contexts(pipe, items, thinking):
    """The segments that each branch sees, and the plan (official `InterleaveInferencer`)."""
    whole, without_text, without_images = [], [], []
    if thinking:
        lead = pipe.encode_item(THINKING_PROMPT)
        whole, without_images = whole + lead, without_images + lead
    for item in items:
        segments = pipe.encode_item(
            item if isinstance(item, str) else pipe.processor.image_processor.resize_for_latents(item)
        )
        if isinstance(item, str):
            without_text = whole
            whole, without_images = whole + segments, without_images + segments
        else:
            whole = without_text = whole + segments
    plan = plain_plan(pipe, whole, 3) if thinking else None
    if plan:
        whole = whole + pipe.encode_item(plan)
    return (whole, without_text, without_images), plan


def plain_plan(pipe, segments, num_tokens):
    """The likeliest tokens, one pass over everything for each."""
    ids = [pipe.processor.bos_token_id]
    for _ in range(num_tokens):
        logits = pipe.model(**collate([[*segments, Segment("text", ids)]])).logits[0, -1]
        ids = [*ids, int(logits.argmax())]
        if ids[-1] == pipe.processor.eos_token_id:
            break
    return pipe.processor.decode(ids[1:], skip_special_tokens=True).strip()


def plain_velocity(pipe, segments, latents, timestep, grid):
    """One branch of one image: (N, D)."""
    markers = [pipe.processor.start_of_image_token_id, pipe.processor.end_of_image_token_id]
    batch = collate([[*segments, Segment("target", markers, latents=latents, grid=grid)]])
    timesteps = torch.full(batch["latents"].shape[:2], timestep)
    # Noise that equals the latents leaves them as they are at every timestep.
    return pipe.model(**batch, noise=batch["latents"], timestep=timesteps).velocity[0, -len(latents) :]


def plain_image(pipe, contexts, guidance, latents, grid, known=None):
    """The latents after all updates; velocities of the same latents are computed once, and kept in `known`."""
    known = {} if known is None else known

    def velocity_of(branch):
        key = (branch, timestep, latents.numpy().tobytes())
        if key not in known:
            known[key] = plain_velocity(pipe, contexts[branch], latents, timestep, grid)[None]
        return known[key]

    timesteps = torch.linspace(1, 0, STEPS + 1)
    timesteps = 3 * timesteps / (1 + 2 * timesteps)
    start, end = guidance.interval
    for timestep, following in itertools.pairwise(timesteps.tolist()):
        velocity = velocity_of(0)
        if guidance.text_scale > 1 and start < timestep <= end:
            velocity = guide(velocity, velocity_of(1), velocity_of(2), guidance)
        latents = latents - (timestep - following) * velocity[0]
    return latents


def assert_equal_paths(pipe, cases, thinking, guidances, settings):
    """`cases`: of each image, its grid, contexts, plan, noise and known velocities."""
    grids, contexts, plans, noise, known = zip(*cases, strict=True)
    output = pipe(
        list(PROMPTS.values()),
        latents=torch.nn.utils.rnn.pad_sequence(noise, batch_first=True),
        num_inference_steps=STEPS,
        thinking=thinking,
        max_think_tokens=3,
        output_type="latent",
        **settings,
    )
    assert output.texts == (list(plans) if thinking else None)
    for index, name in enumerate(PROMPTS):
        plain = plain_image(pipe, contexts[index], guidances[index], noise[index], grids[index], known[index])
        packed, padding = output.images[index].split([len(plain), len(output.images[index]) - len(plain)])
        assert (packed - plain).abs().max() < 5e-5, (name, settings)
        assert not padding.any()


@pytest.mark.parametrize("thinking", [False, True])
@torch.no_grad()
def test_packed_equals_plain(pipe, monkeypatch, thinking):
    encode, kept = pipe.encode_contexts, []

    def encode_once(*arguments):  # the prompts are the same in all calls
        kept[:] = kept or [encode(*arguments)]
        return kept[0]

    monkeypatch.setattr(pipe, "encode_contexts", encode_once)
    cases = []
    for seed, items in enumerate(PROMPTS.values()):
        images = [
            pipe.processor.image_processor.resize_for_latents(item) for item in items if not isinstance(item, str)
        ]
        grid = (images[-1].height // 16, images[-1].width // 16) if images else (4, 4)
        noise = torch.randn(grid[0] * grid[1], 16, generator=torch.Generator().manual_seed(seed))
        cases.append((grid, *plain_contexts(pipe, items, thinking), noise, {}))
    assert len({grid for grid, *_ in cases}) >= 4  # sizes
    assert not thinking or all(plan for _, _, plan, *_ in cases)

    assert_equal_paths(pipe, cases, thinking, [TEXT_TO_IMAGE] + [REFERENCES] * 5, {})
    for scales, interval, renorm in itertools.product(SCALES.values(), INTERVALS.values(), RENORMS):
        if scales == SCALES["none"] and renorm != "global":
            continue  # nothing to shrink
        settings = {
            "guidance_scale": scales[0],
            "image_guidance_scale": scales[1],
            "guidance_interval": interval,
            "guidance_renorm": renorm,
        }
        assert_equal_paths(pipe, cases, thinking, [Guidance(*scales, interval, renorm)] * len(cases), settings)


@torch.no_grad()
def test_several_images_of_each_prompt_equal_plain_ones(pipe):
    items = PROMPTS["interleaved"]
    contexts, _ = plain_contexts(pipe, items, thinking=False)
    noise = torch.randn(3, 3, 16, generator=torch.Generator().manual_seed(0))
    height, width = 16, 48
    images = pipe(
        [items], num_images_per_prompt=3, latents=noise, num_inference_steps=STEPS, output_type="latent",
        height=height, width=width,
    ).images  # fmt: skip
    for image, start in zip(images, noise, strict=True):
        plain = plain_image(pipe, contexts, REFERENCES, start, (1, 3))
        torch.testing.assert_close(image, plain, atol=5e-5, rtol=1e-5)
