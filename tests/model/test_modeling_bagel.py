import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

import echo4o_hf  # noqa: F401  (registers with the Auto classes)
from echo4o_hf.model.configuration_bagel import BagelConfig
from echo4o_hf.model.context import Context
from echo4o_hf.model.image_processing_bagel import BagelImageProcessor
from echo4o_hf.model.modeling_bagel import BagelForConditionalGeneration
from echo4o_hf.model.packing import IGNORE, Segment, collate


@pytest.fixture
def model(components):
    model = components["model"]
    for parameter in model.parameters():  # weights large enough for everything to matter
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def segments(model):
    """One of each role, with two targets."""
    torch.manual_seed(1)
    config = model.config
    markers = [config.start_of_image_token_id, config.end_of_image_token_id]
    return {
        "text": Segment("text", [config.bos_token_id, 5, 6, 7, config.eos_token_id]),
        "vision": Segment("vision", markers, patches=torch.randn(6, config.patch_dim), grid=(2, 3)),
        "latents": Segment("latents", markers, latents=torch.randn(4, config.latent_dim), grid=(2, 2)),
        "target": Segment("target", markers, latents=torch.randn(6, config.latent_dim), grid=(3, 2)),
        "other": Segment("target", markers, latents=torch.randn(2, config.latent_dim), grid=(1, 2)),
        "answer": Segment(
            "text", [config.bos_token_id, 9, 8, config.eos_token_id], labels=[9, 8, config.eos_token_id, IGNORE]
        ),
    }


def run(model, rows, **kwargs):
    torch.manual_seed(2)
    return model(**collate(rows), **kwargs)


def test_a_generation_weight_moves_no_understanding_output(model, segments):
    rows = [[segments["vision"], segments["text"], segments["target"]]]
    with torch.no_grad():
        before = run(model, rows)
        for name, parameter in model.named_parameters():
            if "_moe_gen" in name or name.startswith(("vae2llm", "llm2vae", "time_embedder")):
                parameter.add_(torch.randn_like(parameter))
        after = run(model, rows)
    torch.testing.assert_close(after.logits[:, :-2], before.logits[:, :-2], atol=0, rtol=0)  # but the target's markers
    assert (after.velocity - before.velocity).abs().max() > 0.1


def test_targets_are_hidden_from_each_other_and_from_what_follows(model, segments):
    with torch.no_grad():
        batch = collate([[segments["text"], segments["target"], segments["other"]]])
        torch.manual_seed(2)
        alone_noise = torch.randn(1, 2, model.config.latent_dim)
        timestep = torch.full((1, 8), 0.5)
        noise = torch.cat([torch.randn(1, 6, model.config.latent_dim), alone_noise], dim=1)
        both = model(**batch, noise=noise, timestep=timestep).velocity[:, 6:]
        rows = collate([[segments["text"], segments["other"]]])
        alone = model(**rows, noise=alone_noise, timestep=timestep[:, :2]).velocity
    torch.testing.assert_close(both, alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_cached_context_equals_one_pass(model, segments, backend):
    model.set_attn_implementation(backend)
    order = [segments["latents"], segments["vision"], segments["text"]]
    target = segments["target"]
    with torch.no_grad():
        context = Context.empty(1)
        for segment in order:
            context = model.prefill(context, [segment])
        before = [layer.keys.clone() for layer in context.cache.layers]
        cached = model.predict_velocity(
            target.latents[None], torch.tensor([0.3]), model.prepare_noisy_block([context], [target.grid])
        )
        batch = collate([[*order, target]])
        # a target at timestep t is lerp(clean, noise, t): with equal ends it is what it is
        whole = model(**batch, noise=batch["latents"], timestep=torch.full((1, 10), 0.3)).velocity[:, 4:]
    torch.testing.assert_close(cached, whole, atol=2e-5, rtol=0)
    for layer, keys in zip(context.cache.layers, before, strict=True):
        torch.testing.assert_close(layer.keys, keys, atol=0, rtol=0)


def test_a_batch_of_different_contexts_and_sizes_equals_single_calls(model, segments):
    rows = [[segments["text"]], [segments["latents"], segments["vision"], segments["text"]], []]
    targets = [segments["target"], segments["other"], segments["target"]]
    with torch.no_grad():
        contexts, singles = [], []
        for row, target in zip(rows, targets, strict=True):
            context = Context.empty(1)
            for segment in row:
                context = model.prefill(context, [segment])
            contexts.append(context)
            block = model.prepare_noisy_block([context], [target.grid])
            singles.append(model.predict_velocity(target.latents[None], torch.tensor([0.7]), block)[0])
        noise = torch.nn.utils.rnn.pad_sequence([target.latents for target in targets], batch_first=True)
        grids = [target.grid for target in targets]
        block = model.prepare_noisy_block(contexts, grids)
        joined = model.predict_velocity(noise, torch.full((3,), 0.7), block)
        assert torch.equal(model.predict_velocity(noise, torch.full((3,), 0.7), block), joined)
    for single, row in zip(singles, joined, strict=True):
        torch.testing.assert_close(row[: len(single)], single, atol=2e-5, rtol=0)


def test_prefilling_rows_of_different_segments_equals_single_rows(model, segments):
    with torch.no_grad():
        together = model.prefill(Context.empty(3), [segments["latents"], segments["text"], None])
        together = model.prefill(together, [segments["text"], segments["vision"], segments["text"]])
        assert together.next_position.tolist() == [6, 6, 5]
        for index, order in enumerate([("latents", "text"), ("text", "vision"), ("text",)]):
            alone = Context.empty(1)
            for name in order:
                alone = model.prefill(alone, [segments[name]])
            real = together.attention_mask[index]
            for layer, expected in zip(together.cache.layers, alone.cache.layers, strict=True):
                torch.testing.assert_close(layer.values[index][:, real], expected.values[0], atol=2e-5, rtol=0)


def test_padded_rows_equal_a_pack(model, segments):
    rows = [[segments["vision"], segments["answer"]], [segments["text"], segments["target"], segments["latents"]]]
    padded = collate(rows)
    packed = collate(rows, packed=True)
    noise = torch.randn(1, 10, model.config.latent_dim)
    timestep = torch.full((1, 10), 0.4)
    with torch.no_grad():
        one = model(**packed, noise=noise, timestep=timestep)
        two = model(**padded, noise=noise.expand(2, -1, -1), timestep=timestep.expand(2, -1))
    assert one.text_loss.item() == pytest.approx(two.text_loss.item(), abs=1e-5)
    assert one.flow_loss.item() == pytest.approx(two.flow_loss.item(), abs=1e-5)


def test_interpolated_positions_reach_both_tables(model, segments):
    rows = [[segments["vision"], segments["latents"]]]
    with torch.no_grad():
        before = run(model, rows).last_hidden_state
        model.config.interpolate_pos = True
        after = run(model, rows).last_hidden_state
    moved = (after - before).abs().amax(-1)[0] > 1e-4
    assert moved[2:8].any() and moved[8:].any()


def test_gradient_checkpointing_changes_no_gradient(model, segments):
    rows = [[segments["vision"], segments["answer"], segments["target"]]]

    def gradients():
        model.zero_grad()
        run(model, rows).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.train()
    plain = gradients()
    model.activation_checkpointing_enable()
    assert gradients().keys() == plain.keys()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-5)


def test_bfloat16_is_close_to_float32(model, segments):
    rows = [[segments["vision"], segments["text"], segments["target"]]]
    with torch.no_grad():
        exact = run(model, rows).velocity
        rounded = run(model.to(torch.bfloat16), rows).velocity
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() / exact.norm() < 0.05


def test_casting_leaves_the_frequencies_of_rope_exact(model):
    rotary = model.language_model.model.rotary_emb
    exact = {name: buffer.clone() for name, buffer in rotary.named_buffers()}
    for cast in (lambda: model.to(torch.bfloat16), model.half, lambda: model.to("cpu", torch.float64), model.float):
        cast()
        assert all(torch.equal(buffer, exact[name]) for name, buffer in rotary.named_buffers())
        assert rotary.inv_freq.dtype == torch.float32


def test_generate_in_a_left_padded_batch_equals_single_rows(components, model):
    processor = components["processor"]
    processor.image_processor = BagelImageProcessor.from_bagel_config(model.config)
    pictures = [[torch.randint(0, 255, (3, 40, 30), dtype=torch.uint8)], []]
    questions = ["what?", "a longer question"]
    single = []
    for question, images in zip(questions, pictures, strict=True):
        inputs = processor(text=question, images=images, return_tensors="pt")
        single.append(model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :])
    inputs = processor(text=questions, images=pictures, return_tensors="pt")
    together = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for row, alone in zip(together, single, strict=True):
        assert row[: len(alone)].tolist() == alone.tolist()
    several = model.generate(**inputs, max_new_tokens=6, do_sample=True, num_return_sequences=2)
    assert several.shape[0] == 4


def test_plain_text_needs_nothing_but_ids(model):
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        labelled = model(input_ids=ids, labels=ids)
        padded = model(input_ids=torch.tensor([[0, 0, 1, 2, 3, 4]]), attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]]))
    torch.testing.assert_close(padded.logits[:, 2:], plain, atol=1e-5, rtol=0)
    expected = torch.nn.functional.cross_entropy(plain[0, :-1], ids[0, 1:])
    assert labelled.loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_auto_classes_load_what_was_saved(components, tmp_path, model):
    model.save_pretrained(tmp_path)
    components["processor"].save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), BagelConfig)
    assert type(AutoProcessor.from_pretrained(tmp_path)).__name__ == "BagelProcessor"
    for auto_class in (AutoModel, AutoModelForImageTextToText):
        loaded = auto_class.from_pretrained(tmp_path)
        assert isinstance(loaded, BagelForConditionalGeneration)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": torch.tensor([[1]]), "pixel_values": torch.zeros(1, 1, 588)}, "vision_grids"),
        ({"input_ids": torch.tensor([[1]]), "latents": torch.zeros(1, 1, 36)}, "roles, segment_ids"),
        (
            {
                "input_ids": torch.tensor([[1]]),
                "pixel_values": torch.zeros(1, 1, 588),
                "vision_grids": torch.tensor([[[1, 1]]]),
                "vision_mask": torch.tensor([[False]]),
            },
            "marks 0 tokens, but the images have 1 patches",
        ),
        (
            {
                "input_ids": torch.tensor([[1]]),
                "pixel_values": torch.zeros(1, 1, 588),
                "vision_grids": torch.tensor([[[2, 2]]]),
            },
            "more patches than",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": {"hidden_size": 30, "num_attention_heads": 4, "num_key_value_heads": 2}}, "hidden_size=30"),
        ({"text_config": {"hidden_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2}}, "heads of 5"),
        ({"vit_max_num_patch_per_side": 12}, "70 patches a side, but vit_max_num_patch_per_side=12"),
        ({"latent_patch_size": 0}, "latent_patch_size=0"),
        ({"start_of_image_token_id": 999_999}, "start_of_image_token_id=999999"),
    ],
)
def test_configurations_that_cannot_work_are_refused_with_their_numbers(change, message):
    if "text_config" in change:
        change = {"text_config": {**change["text_config"], "vocab_size": 152064, "intermediate_size": 8}}
    with pytest.raises(ValueError, match=message):
        BagelConfig(**change)


def test_the_default_configuration_is_the_real_one():
    config = BagelConfig()
    with torch.device("meta"):
        model = BagelForConditionalGeneration(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(14.578e9, rel=2e-3)
    assert (config.latent_stride, config.latent_dim, config.patch_dim) == (16, 64, 588)


def test_setting_the_attention_reaches_both_parts(model, caplog):
    model.set_attn_implementation("eager")
    config = model.config
    assert {config.text_config._attn_implementation, config.vision_config._attn_implementation} == {"eager"}
    model.set_attn_implementation({"text_config": "sdpa"})
    assert model.config.text_config._attn_implementation == "sdpa"
    assert model.config.vision_config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="nonsense"):
        model.set_attn_implementation("nonsense")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_eager(model, segments):
    rows = [[segments["vision"], segments["text"], segments["target"]], [segments["latents"], segments["text"]]]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = run(model, rows).last_hidden_state
        model.set_attn_implementation("flex_attention")
        flex = run(model, rows).last_hidden_state
    real = collate(rows)["segment_ids"] != -1
    torch.testing.assert_close(flex[real], expected[real], atol=2e-5, rtol=0)
