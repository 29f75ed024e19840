import inspect
import re

import numpy as np
import pytest
import skimage.data
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from echo4o_hf.model.processing_bagel import BagelProcessor
from echo4o_hf.pipeline.denoiser import Denoiser
from echo4o_hf.pipeline.pipeline_echo4o import Echo4oPipeline, Echo4oPipelineOutput
from echo4o_hf.pipeline.prompts import THINKING_PROMPT

from .conftest import make_vae

CAT, ROCKET = (
    Image.fromarray(skimage.data.chelsea()),
    Image.fromarray(skimage.data.rocket()),
)  # both 64x48 after resizing
FAST = {"num_inference_steps": 3, "output_type": "latent"}


def seed(number):
    return torch.Generator().manual_seed(number)


@pytest.fixture
def batch_sizes(pipe):
    """Rows of each call that predicts velocities."""
    sizes = []
    pipe.model.llm2vae.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    return sizes


def test_the_signature_and_its_defaults():
    parameters = inspect.signature(Echo4oPipeline.__call__).parameters
    assert {name: parameter.default for name, parameter in parameters.items() if name not in ("self", "prompt")} == {
        "image": None,
        "height": None,
        "width": None,
        "num_inference_steps": 49,
        "guidance_scale": 4.0,
        "image_guidance_scale": None,
        "guidance_interval": None,
        "guidance_renorm": None,
        "guidance_renorm_min": 0.0,
        "thinking": False,
        "max_think_tokens": 1000,
        "num_images_per_prompt": 1,
        "generator": None,
        "latents": None,
        "output_type": "pil",
        "callback_on_step_end": None,
        "callback_on_step_end_tensor_inputs": ["latents"],
        "return_dict": True,
    }


def test_documented_settings_are_the_defaults(pipe):
    for image, settings in (
        (None, {"image_guidance_scale": 1.0, "guidance_interval": (0.4, 1.0), "guidance_renorm": "global"}),
        (CAT, {"image_guidance_scale": 2.0, "guidance_interval": (0.0, 1.0), "guidance_renorm": "text_channel"}),
    ):
        default = pipe("a red cat", image=image, generator=seed(0), **FAST).images
        assert torch.equal(default, pipe("a red cat", image=image, generator=seed(0), **FAST, **settings).images)
        other = pipe("a red cat", image=image, generator=seed(0), **FAST, **{**settings, "guidance_renorm": "channel"})
        assert not torch.equal(default, other.images)


def test_a_constant_velocity_integrates_exactly(pipe):
    velocity = torch.arange(16.0) / 8
    with torch.no_grad():
        pipe.model.llm2vae.weight.zero_()
        pipe.model.llm2vae.bias.copy_(velocity)
    noise = torch.randn(2, 16, 16, generator=seed(0))
    kept = noise.clone()
    for steps in (1, 7):
        latents = pipe(["a cat", "two hats"], latents=noise, num_inference_steps=steps, output_type="latent").images
        torch.testing.assert_close(latents, noise - velocity, atol=1e-5, rtol=0)
    assert torch.equal(noise, kept)


def test_noise_is_drawn_per_image_in_the_order_of_tokens(pipe):
    grids = [(4, 4), (2, 3)]
    one = pipe.prepare_latents(grids, seed(0), None)
    generator = seed(0)
    first, second = torch.randn(16, 16, generator=generator), torch.randn(6, 16, generator=generator)
    assert torch.equal(one[0], first) and torch.equal(one[1, :6], second) and not one[1, 6:].any()
    given = torch.ones(2, 16, 16)
    padded = pipe.prepare_latents(grids, None, given)
    assert padded[0].all() and padded[1, :6].all() and not padded[1, 6:].any() and given.all()
    each = pipe.prepare_latents(grids, [seed(0), seed(0)], None)
    assert torch.equal(each[0], first) and torch.equal(each[1, :6], torch.randn(6, 16, generator=seed(0)))


def test_an_image_is_the_same_in_a_batch_and_alone(pipe):
    prompts = ["a red cat", "two hats", "a blue cat"]
    references = [[CAT, ROCKET], [], [CAT.crop((0, 0, 100, 300))]]
    together = pipe(prompts, image=references, generator=[seed(0), seed(1), seed(2)], num_inference_steps=4).images
    assert [image.size for image in together] == [(64, 48), (64, 64), (16, 64)]
    for index, image in enumerate(together):
        alone = pipe(prompts[index], image=references[index], generator=seed(index), num_inference_steps=4).images[0]
        assert image.size == alone.size
        difference = np.array(image).astype(int) - np.array(alone)
        assert np.abs(difference).max() <= 1
    latents = pipe(prompts, image=references, **FAST).images
    assert latents.shape == (3, 16, 16) and not latents[2, 4:].any()  # padding


def test_images_per_prompt(pipe):
    generators = [seed(index) for index in range(4)]
    images = pipe(["a cat", "two hats"], num_images_per_prompt=2, generator=generators, **FAST).images
    for index, prompt in enumerate(["a cat", "a cat", "two hats", "two hats"]):
        alone = pipe(prompt, generator=seed(index), **FAST).images
        torch.testing.assert_close(images[index], alone[0], atol=1e-4, rtol=1e-4)


def test_a_photograph_as_reference_changes_the_image(pipe):
    arguments = {"generator": None, "latents": torch.randn(1, 12, 16, generator=seed(0)), "height": 48, "width": 64}
    without = pipe("a cat", **arguments, **FAST).images
    with_cat = pipe("a cat", image=CAT, **arguments, **FAST).images
    with_both = pipe("a cat", image=[CAT, ROCKET], **arguments, **FAST).images
    swapped = pipe("a cat", image=[ROCKET, CAT], **arguments, **FAST).images
    for one, other in ((without, with_cat), (with_cat, with_both), (with_both, swapped)):
        assert (one - other).abs().max() > 1e-2
    interleaved = pipe([CAT, ROCKET, "a cat"], **arguments, **FAST).images
    assert torch.equal(interleaved, with_both)
    # An array of the same pixels is the same reference.
    torch.testing.assert_close(pipe("a cat", image=skimage.data.chelsea(), **arguments, **FAST).images, with_cat)


def test_the_size_is_that_of_the_last_reference(pipe):
    assert pipe("a cat", image=[CAT, ROCKET], num_inference_steps=1).images[0].size == (64, 48)
    portrait = ROCKET.crop((200, 0, 400, 400))
    assert pipe("a cat", image=[ROCKET, portrait], num_inference_steps=1).images[0].size == (32, 64)
    assert pipe("a cat", num_inference_steps=1).images[0].size == (64, 64)
    assert pipe("a cat", image=ROCKET, height=32, width=32, num_inference_steps=1).images[0].size == (32, 32)


@pytest.mark.parametrize(
    ("prompt", "settings", "expected"),
    [
        ("a cat", {}, [2, 2, 2, 1]),  # shifted timesteps 1, 0.9, 0.75, 0.5 and guidance above 0.6
        ("a cat", {"image_guidance_scale": 1.5}, [2, 2, 2, 1]),  # without images is the whole context
        ("a cat", {"guidance_scale": 1.0}, [1, 1, 1, 1]),
        ([CAT, "a cat"], {}, [3, 3, 3, 1]),
        ([CAT, "a cat"], {"image_guidance_scale": 1.0}, [2, 2, 2, 1]),
        (["a cat", CAT], {}, [2, 2, 2, 1]),  # an image comes last: without text is the whole context
        ([["a cat"], [CAT, "a cat"]], {}, [5, 5, 5, 2]),
    ],
)
def test_equal_and_idle_branches_are_not_computed(pipe, batch_sizes, prompt, settings, expected):
    pipe(prompt, num_inference_steps=4, output_type="latent", guidance_interval=(0.6, 1.0), **settings)
    assert batch_sizes == expected


def test_contexts_of_all_prompts_are_not_copied(pipe):
    contexts = pipe.encode_contexts([["a cat"], ["two hats"]])
    both, first = contexts.select([0, 1], [0], [])
    assert both is contexts.conditional and len(first.next_position) == 1


def test_text_guidance_of_a_prompt_that_ends_with_an_image_does_nothing(pipe):
    prompt, arguments = ["a cat", CAT], {"image_guidance_scale": 1.0, "guidance_renorm_min": 1.0, **FAST}
    plain = pipe(prompt, guidance_scale=1.0, generator=seed(0), **arguments).images
    torch.testing.assert_close(pipe(prompt, guidance_scale=8.0, generator=seed(0), **arguments).images, plain)


def test_thinking_adds_the_plan_to_the_whole_context_only(pipe):
    plain = pipe.encode_contexts([[THINKING_PROMPT, CAT, "a red cat"]])
    thought = pipe.encode_contexts([[CAT, "a red cat"]], max_think_tokens=5)
    ids = pipe.model.generate_from(plain.conditional, 5, do_sample=False)[0].tolist()
    ids = ids[: ids.index(pipe.processor.eos_token_id)] if pipe.processor.eos_token_id in ids else ids
    assert thought.plans == [pipe.processor.decode(ids, skip_special_tokens=True)] and thought.plans[0]
    plan = len(pipe.processor.text_segment(thought.plans[0]).input_ids)
    assert thought.conditional.next_position.tolist() == [plain.conditional.next_position.item() + plan]
    assert torch.equal(thought.without_text.next_position, plain.without_text.next_position)
    assert torch.equal(thought.without_images.next_position, plain.without_images.next_position)

    output = pipe("a red cat", image=CAT, thinking=True, max_think_tokens=5, generator=seed(0), **FAST)
    assert output.texts == thought.plans
    unthought = pipe([THINKING_PROMPT, CAT, "a red cat"], generator=seed(0), **FAST)
    assert unthought.texts is None and not torch.equal(output.images, unthought.images)


def test_thinking_in_a_batch_and_per_image(pipe):
    arguments = {"thinking": True, "max_think_tokens": 4, **FAST}
    both = pipe(["a red cat", "two hats"], num_images_per_prompt=2, generator=[seed(0)] * 4, **arguments)
    alone = [pipe(prompt, **arguments).texts[0] for prompt in ("a red cat", "two hats")]
    assert both.texts == [alone[0], alone[0], alone[1], alone[1]]
    mixed = pipe.encode_contexts([[CAT, "a red cat"], ["two hats"]], max_think_tokens=4)
    single = pipe.encode_contexts([["two hats"]], max_think_tokens=4)
    for name in ("conditional", "without_text", "without_images"):
        assert getattr(mixed, name).next_position[1] == getattr(single, name).next_position[0]


def test_an_empty_plan_is_no_plan(pipe, batch_sizes):
    with torch.no_grad():
        pipe.model.language_model.model.norm.weight.zero_()  # all logits equal: the first id, which is padding
    output = pipe("a cat", thinking=True, max_think_tokens=3, image_guidance_scale=2.0, generator=seed(0), **FAST)
    assert output.texts == [""] and batch_sizes[0] == 2


def test_callbacks_see_and_change_the_latents(pipe):
    seen = []

    def zero(pipeline, step, timestep, tensors):
        seen.append((pipeline is pipe, step, float(timestep), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = pipe("a cat", callback_on_step_end=zero, **FAST).images
    assert not latents.any()
    shape = torch.Size((1, 16, 16))
    assert [entry[:2] for entry in seen] == [(True, 0), (True, 1), (True, 2)] and seen[0][2:] == (1000.0, shape)
    pipe("a cat", callback_on_step_end=lambda *_: {}, callback_on_step_end_tensor_inputs=[], **FAST)


def test_output_types(pipe):
    arguments = {"prompt": ["a cat", "two hats"], "num_inference_steps": 2, "height": 32}
    outputs = {kind: pipe(generator=seed(0), output_type=kind, **arguments) for kind in ("pil", "np", "pt", "latent")}
    assert all(isinstance(output, Echo4oPipelineOutput) and output.texts is None for output in outputs.values())
    array = outputs["np"].images
    assert array.shape == (2, 32, 64, 3) and array.dtype == np.float32 and 0 <= array.min() < array.max() <= 1
    assert torch.equal(outputs["pt"].images, torch.from_numpy(array).permute(0, 3, 1, 2))
    assert np.array_equal(np.array(outputs["pil"].images[1]), (array[1] * 255).astype(np.uint8))
    assert outputs["latent"].images.shape == (2, 8, 16)
    images, texts = pipe(generator=seed(0), return_dict=False, **arguments)
    assert images[0].tobytes() == outputs["pil"].images[0].tobytes() and texts is None
    decoded = pipe.decode_latents(outputs["latent"].images, 32, 64, "pt")
    assert torch.equal(decoded, outputs["pt"].images)
    again = [pipe("a cat", image=outputs[kind].images[0], generator=seed(0), **FAST).images for kind in ("np", "pt")]
    assert torch.equal(*again)


def test_latents_of_all_sizes_are_decoded(pipe):
    arguments = {"prompt": "a cat", "num_inference_steps": 1}
    latents = pipe(**arguments, generator=seed(0), output_type="latent").images
    (image,) = pipe(**arguments, generator=seed(0)).images
    assert [image.tobytes()] == [each.tobytes() for each in pipe.decode_latents(latents)]
    for sizes, message in [
        ((32, 64), r"expected .* \(1, 8, 16\)"),
        ((60,), "the nearest is 64"),
        ((None, 80), "is 64"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe.decode_latents(latents, *sizes)
    with pytest.raises(ValueError, match="choose one of pil, np, pt$"):
        pipe.decode_latents(latents, output_type="latent")


def test_images_of_unequal_size_come_as_a_list(pipe):
    arguments = {"prompt": ["a", "a"], "image": [[CAT], []], "num_inference_steps": 1}
    images = pipe(**arguments, generator=seed(0), output_type="np").images
    assert [image.shape for image in images] == [(48, 64, 3), (64, 64, 3)]
    latents = pipe(**arguments, generator=seed(0), output_type="latent").images
    for image, decoded in zip(images, pipe.decode_latents(latents, [48, 64], [64, 64], "np"), strict=True):
        assert np.array_equal(image, decoded)


def test_a_bfloat16_model_keeps_float32_latents(pipe):
    pipe.to(torch.bfloat16)
    output = pipe("a cat", image=CAT, generator=seed(0), **FAST).images
    assert output.dtype == torch.float32 and output.isfinite().all()
    assert pipe("a cat", image=CAT, num_inference_steps=1).images[0].size == (64, 48)


def test_a_vae_without_shift(pipe):
    pipe.vae = make_vae(shift_factor=None)
    assert pipe("a cat", image=CAT, num_inference_steps=1).images[0].size == (64, 48)


def test_save_and_load_give_equal_images(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    expected = pipe("a red cat", image=CAT, generator=seed(0), num_inference_steps=2).images[0]
    loaded = Echo4oPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    image = loaded("a red cat", image=CAT, generator=seed(0), num_inference_steps=2).images[0]
    assert image.tobytes() == expected.tobytes()
    half = Echo4oPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {half.model.dtype, half.vae.dtype} == {torch.bfloat16}


def test_diffusers_loads_what_we_save(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is Echo4oPipeline
    expected, actual = (each("a red cat", generator=seed(0), **FAST).images for each in (pipe, loaded))
    assert torch.equal(expected, actual)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "must hold text"),
        ({"prompt": []}, "no prompt given"),
        ({"prompt": 3}, "must be a string, got int"),
        ({"prompt": "a " * 200}, "prompt 0 needs 203 positions.*; the model has 128"),
        ({"prompt": ["a"] + ["a " * 130]}, "prompt 1 needs 133 positions"),
        ({"image": [CAT] * 70}, "needs 144 positions, of them 140 for references; the model has 128"),
        ({"prompt": "a " * 100, "thinking": True}, "0 for references, and a plan; the model has 128"),
        ({"thinking": True, "max_think_tokens": 0}, "max_think_tokens=0"),
        ({"prompt": ["a", "a"], "image": [CAT, CAT]}, "2 images for 2 texts: pass a list of lists"),
        ({"image": np.full((4, 4, 3), 9.0)}, "must be uint8"),
        ({"height": 50}, "height=50 .* nearest is 48"),
        ({"width": 1024}, "width=1024 .* nearest is 64"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"guidance_renorm": "local"}, "guidance_renorm='local' is unknown; choose one of global"),
        ({"guidance_interval": (1.0, 0.0)}, "guidance_interval"),
        ({"generator": [seed(0)]}, "1 generators for 2 images"),
        ({"latents": torch.zeros(1, 16, 16)}, r"shape \(1, 16, 16\), expected .* \(2, 16, 16\)"),
        ({"output_type": "jpg"}, "output_type='jpg' is unknown; choose one of pil, np, pt, latent"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callbacks get latents, not noise"),
    ],
)
def test_bad_input_says_what_to_do(pipe, batch_sizes, arguments, message):
    arguments = {"prompt": "a", **arguments}
    if "generator" in arguments or "latents" in arguments:
        arguments["num_images_per_prompt"] = 2
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)
    assert batch_sizes == []


@pytest.mark.parametrize("part", ["model", "vae"])
def test_weights_that_are_not_numbers_are_no_black_image(pipe, part):
    with torch.no_grad():
        (pipe.model.llm2vae.bias if part == "model" else pipe.vae.decoder.conv_out.bias).fill_(float("nan"))
    where = "the latents of image 0 are" if part == "model" else "image 0 out of the VAE holds"
    with pytest.raises(ValueError, match=f"{where} NaN or infinite"):
        pipe("a cat", num_inference_steps=1)


def test_the_update_is_named_that_broke_an_image(pipe):
    def breaks(pipeline, step, timestep, tensors):
        latents = tensors["latents"].clone()
        if step == 1:
            latents[1, 3, 0] = float("inf")
        return {"latents": latents}

    with pytest.raises(ValueError, match="image 1 are NaN or infinite from update 2 of 3 on"):
        pipe(["a cat", "a dog"], callback_on_step_end=breaks, **FAST)


def test_an_image_that_was_broken_once_is_named(pipe):
    def breaks_and_mends(pipeline, step, timestep, tensors):
        return {"latents": torch.full_like(tensors["latents"], float("nan") if step == 0 else 1.0)}

    with pytest.raises(ValueError, match="image 0 are NaN or infinite from update 1 of 3 on"):
        pipe("a cat", callback_on_step_end=breaks_and_mends, **FAST)


def test_a_callback_may_stop(pipe):
    steps = []

    def stop(pipeline, step, timestep, tensors):
        steps.append(step)
        pipeline._interrupt = step == 1
        return {}

    stopped = pipe("a cat", callback_on_step_end=stop, generator=seed(0), **FAST).images
    assert steps == [0, 1]
    assert not torch.equal(stopped, pipe("a cat", generator=seed(0), **FAST).images)


def test_broken_latents_stop_the_run(pipe):
    steps = []

    def breaks(pipeline, step, timestep, tensors):
        steps.append(step)
        return {"latents": tensors["latents"] * (float("nan") if step == 2 else 1)}

    with pytest.raises(ValueError, match="image 0 are NaN or infinite from update 3 of 8 on"):
        pipe("a cat", callback_on_step_end=breaks, **{**FAST, "num_inference_steps": 40})
    assert steps == list(range(8))


def test_a_plan_fills_the_positions_that_are_left(pipe, monkeypatch):
    settings = {"thinking": True, "max_think_tokens": 10**6, **FAST}
    pipe.model.generation_config.suppress_tokens = pipe.processor.tokenizer.all_special_ids  # it would end by itself
    prompts = ["a cat", "a " * 40]
    left = pipe.positions_left([[prompt] for prompt in prompts], thinking=True)
    assert left[1] == left[0] - 38
    lengths = []

    def decode(ids, **options):
        lengths.extend((ids != pipe.processor.eos_token_id).sum(1).tolist())
        return BagelProcessor.batch_decode(pipe.processor, ids, **options)

    monkeypatch.setattr(pipe.processor, "batch_decode", decode)
    plans = pipe(prompts, **settings).texts
    assert lengths == left
    assert plans == [pipe(prompt, **settings).texts[0] for prompt in prompts]


def longer_when_read_again(monkeypatch, pipe, text):
    """What the model writes, whatever it is, is read as this text."""
    monkeypatch.setattr(pipe.processor, "batch_decode", lambda ids, **options: [text] * len(ids))


def test_a_plan_that_is_longer_when_read_again_is_cut_to_the_positions_that_are_left(pipe, monkeypatch):
    """Half a letter of UTF-8 is one token, and decodes to a letter of three."""
    longer_when_read_again(monkeypatch, pipe, "a " * 500)
    contexts = pipe.encode_contexts([["a cat"], ["a " * 40]], max_think_tokens=3)
    limit = pipe.model.config.text_config.max_position_embeddings
    assert contexts.conditional.next_position.tolist() == [limit - 1] * 2  # one is left for the image
    pipe.processor.tokenizer.model_max_length = 60
    assert pipe("a cat", thinking=True, max_think_tokens=3, **FAST).texts == ["a " * 499 + "a"]


def test_a_plan_is_read_again_as_it_was_written(pipe, monkeypatch):
    longer_when_read_again(monkeypatch, pipe, "\na cat\n")
    read = []
    monkeypatch.setattr(
        pipe, "encode_written", lambda text, most: read.append(text) or Echo4oPipeline.encode_written(pipe, text, most)
    )
    assert pipe("a cat", thinking=True, max_think_tokens=3, **FAST).texts == ["a cat"]
    assert read == ["\na cat\n"]


def test_a_plan_does_not_hang_on_how_the_model_is_asked_elsewhere(pipe):
    expected = pipe("a cat", thinking=True, max_think_tokens=6, **FAST).texts
    for name, value in {"num_beams": 3, "return_dict_in_generate": True, "use_cache": False}.items():
        setattr(pipe.model.generation_config, name, value)
        assert pipe("a cat", thinking=True, max_think_tokens=6, **FAST).texts == expected


def test_an_interrupted_plan_ends_there(pipe):
    settings = {"thinking": True, "max_think_tokens": 30, "generator": seed(0), **FAST}
    whole = pipe("a cat", **settings)
    steps = []
    seen = []

    def interrupt(module, arguments, output):
        seen.append(output)
        pipe._interrupt = len(seen) >= 8

    handle = pipe.model.register_forward_hook(interrupt)
    cut = pipe("a cat", callback_on_step_end=lambda pipeline, step, *_: steps.append(step), **settings)
    handle.remove()
    assert steps == []
    assert 0 < len(cut.texts[0]) < len(whole.texts[0]) and whole.texts[0].startswith(cut.texts[0])


def test_a_vae_of_another_model_is_refused(pipe):
    with pytest.raises(ValueError, match="the VAE has 8 latent channels and 8 pixels a latent, .* expects 4 and 8"):
        Echo4oPipeline(pipe.model, make_vae(latent_channels=8), pipe.scheduler, pipe.processor)


def test_parts_that_are_there_already_are_taken(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    loaded = Echo4oPipeline.from_pretrained(tmp_path, scheduler=scheduler, vae=pipe.vae)
    assert loaded.scheduler is scheduler and loaded.vae is pipe.vae and loaded.model is not pipe.model
    again = Echo4oPipeline.from_pretrained(tmp_path, model=pipe.model, processor=pipe.processor)
    assert again.model is pipe.model and again.processor is pipe.processor
    with pytest.raises(TypeError, match="does not take safety_checker"):
        Echo4oPipeline.from_pretrained(tmp_path, safety_checker=None)
    with pytest.raises(ValueError, match="must be diffusers' FlowMatchEulerDiscreteScheduler, got UniPCMultistep"):
        Echo4oPipeline.from_pretrained(tmp_path, scheduler=UniPCMultistepScheduler())


def test_compiled_layers_serve_all_updates_and_prompts(pipe):
    prompts = ["a red circle", "a much longer prompt about two blue squares", "one"]
    settings = {"height": 32, "width": 32, "num_inference_steps": 8, "output_type": "latent"}
    expected = [pipe(prompt, generator=seed(0), **settings).images for prompt in prompts]
    torch._dynamo.reset()
    graphs = CompileCounter()
    pipe.compile(backend=graphs, fullgraph=True)
    actual = [pipe(prompts[0], generator=seed(0), **settings).images]
    assert graphs.frame_count == 2  # with guidance, and without
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual += [pipe(prompt, generator=seed(0), **settings).images for prompt in prompts[1:]]
    assert graphs.frame_count == 2
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_compiled_layers_serve_a_day_of_many_kinds(pipe):
    """One graph more for a new kind, none for the next of that kind, and never an end to them."""
    short, long, longer = "one", "a red circle", "a much longer prompt about two blue squares"
    settings = {"height": 32, "width": 32, "num_inference_steps": 3, "output_type": "latent"}
    settings["guidance_interval"] = (0.0, 1.0)
    kinds = {
        "one image": [{"prompt": short}, {"prompt": longer}],
        "several": [{"prompt": short, "num_images_per_prompt": n} for n in (2, 3, 5)],
        "other sizes": [{"prompt": short, "height": height} for height in (48, 64, 16)],
        "references": [{"prompt": long, "image": [CAT] * n} for n in (1, 3)],
        "several prompts": [{"prompt": [short, long]}, {"prompt": [long, longer]}],
        "without guidance": [{"prompt": text, "guidance_scale": 1.0} for text in (short, longer)],
    }
    expected = [pipe(generator=seed(0), **{**settings, **call}).images for kind in kinds.values() for call in kind]
    torch._dynamo.reset()
    graphs = CompileCounter()
    pipe.compile(backend=graphs, fullgraph=True)
    actual, counts = [], []
    for kind in kinds.values():
        for call in kind:
            actual.append(pipe(generator=seed(0), **{**settings, **call}).images)
            counts.append(graphs.frame_count)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert counts == [1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5, 5, 6, 6]

    inputs = pipe.processor(text="a", images=[CAT], return_tensors="pt")
    pipe.model.generate(**inputs, max_new_tokens=3)
    pipe(short, thinking=True, max_think_tokens=5, **settings)
    assert graphs.frame_count == 7  # texts are read and written uncompiled; the plan is a kind of its own


class Operations(TorchDispatchMode):
    """Names of the operations that run within."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation.name())
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("references", [0, 1])
def test_updates_gather_nothing_and_copy_keys_and_values_only_into_their_place(pipe, monkeypatch, references):
    updates = []

    def predict(*args):
        with Operations() as operations:
            velocity = Denoiser.__call__(*args)
        updates.append(operations.names)
        return velocity

    recorded = type("Recorded", (Denoiser,), {"__call__": predict})
    monkeypatch.setattr("echo4o_hf.pipeline.pipeline_echo4o.Denoiser", recorded)
    pipe("a", image=[CAT] * references or None, guidance_interval=(0.0, 1.0), num_inference_steps=3)
    layers = len(pipe.model.language_model.model.layers)
    for names in updates[1:]:  # the first one prepares
        assert not [name for name in names if re.search("index|gather|scatter|lift_fresh", name)]
        # Into the room of each branch that has a context, keys and values of a layer.
        assert names.count("aten::copy_") == 2 * layers * (1 + 2 * references)
        assert names.count("aten::_local_scalar_dense") <= 3  # of the timestep, which is on the CPU


def test_setting_the_attention_backend(pipe):
    pipe.set_attention_backend("eager")
    assert pipe.model.config.text_config._attn_implementation == "eager"
