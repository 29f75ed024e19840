"""The model against numbers of the official code (Bagel 056b5fd), in float32 on a CPU: cases a, c, f1 and f2."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from echo4o_hf.model.context import Context
from echo4o_hf.model.modeling_bagel import BagelForConditionalGeneration
from echo4o_hf.model.packing import IGNORE, Segment, collate, patchify

GOLDEN = Path(__file__).parents[2] / "../shared/reference/golden_a"
pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason=f"reference numbers are not at {GOLDEN}")


@pytest.fixture(scope="module")
def numbers():
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="module")
def facts():
    return json.loads((GOLDEN / "golden.json").read_text())


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request):
    return BagelForConditionalGeneration.from_pretrained(GOLDEN, attn_implementation=request.param)


def text(model, ids, **kwargs):
    return Segment("text", [model.config.bos_token_id, *ids, model.config.eos_token_id], **kwargs)


def image(model, role, values, patch_size):
    """`values`: pixels or latents (channels, height, width)."""
    markers = [model.config.start_of_image_token_id, model.config.end_of_image_token_id]
    grid = (values.shape[1] // patch_size, values.shape[2] // patch_size)
    tokens = {"patches" if role == "vision" else "latents": patchify(values, patch_size)}
    return Segment(role, markers, grid=grid, **tokens)


def vision(model, pixels):
    return image(model, "vision", pixels, model.config.vision_config.patch_size)


@torch.no_grad()
def test_vision_embeddings_of_each_image_and_of_both_packed(model, numbers):
    segments = [vision(model, numbers[f"a.pixels{index}"]) for index in (0, 1)]
    torch.testing.assert_close(segments[0].patches, numbers["a.patches0"], atol=0, rtol=0)
    grids = torch.tensor([[segment.grid for segment in segments]])
    packed = model.embed_images(torch.cat([segment.patches for segment in segments])[None], grids)
    torch.testing.assert_close(packed, numbers["a.embeds_packed01"], atol=2e-5, rtol=0)
    alone = model.embed_images(segments[0].patches[None], grids[:, :1])
    torch.testing.assert_close(alone, numbers["a.embeds0"], atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("case", ["c", "c_textonly"])
def test_understanding(model, numbers, facts, case):
    question = text(model, facts[case]["prompt_ids"])
    segments = [question] if case == "c_textonly" else [vision(model, numbers["c.pixels"]), question]
    context = Context.empty(1)
    for segment in segments:
        context = model.prefill(context, [segment])
    expected = facts[case]["context"]
    assert (len(context), context.next_position.tolist()) == (expected["kv_len"], [expected["next_rope"]])
    order = list(range(len(context)))
    if case == "c":  # the official order has the image's tokens between its markers
        order = [0, *range(2, 17), 1, *range(17, len(context))]
    for layer in (0, 2):
        cached = context.cache.layers[layer]
        torch.testing.assert_close(
            cached.keys[0].transpose(0, 1)[order], numbers[f"{case}.key_cache.{layer}"], atol=2e-5, rtol=0
        )
        torch.testing.assert_close(
            cached.values[0].transpose(0, 1)[order], numbers[f"{case}.value_cache.{layer}"], atol=2e-5, rtol=0
        )

    whole = model(**collate([segments]))
    length = len(question.input_ids)
    hidden = whole.last_hidden_state[0, -length:]
    torch.testing.assert_close(hidden, numbers[f"{case}.prefill_hidden"], atol=2e-5, rtol=0)
    torch.testing.assert_close(whole.logits[0, -1], numbers[f"{case}.prefill_last_logits"], atol=1e-4, rtol=0)

    written = model.generate_from(context, 9, do_sample=False, eos_token_id=None)
    assert written[0].tolist() == [*facts[case]["eight_greedy_ids"], facts[case]["ninth_prediction"]]
    end = facts[case]["with_end_token_id"]
    stopped = model.generate_from(context, 9, do_sample=False, eos_token_id=end, pad_token_id=end)[0].tolist()
    assert [model.config.bos_token_id, *stopped] == [*facts[case]["returned_with_end_token_id"], end]


@torch.no_grad()
def test_logits_of_each_written_token(model, numbers, facts):
    context = model.prefill(Context.empty(1), [text(model, facts["c_textonly"]["prompt_ids"])])
    ids = [model.config.bos_token_id, *facts["c_textonly"]["eight_greedy_ids"]]
    cache = context.cache
    for step, token in enumerate(ids):
        output = model(
            input_ids=torch.tensor([[token]]),
            position_ids=context.next_position[:, None] + step,
            past_key_values=cache,
            use_cache=True,
        )
        torch.testing.assert_close(output.logits[0, 0], numbers["c_textonly.step_logits"][step], atol=1e-4, rtol=0)


def training_pack(model, numbers, facts, case):
    """The recorded samples as segments, with the noise and the timestep of each latent token."""
    shift, patch_size = facts[case]["timestep_shift"], model.config.latent_patch_size
    samples, noise, timesteps = [], [], []
    for items in facts[case]["samples"]:
        segments = []
        for item in items:
            if item["dropped"]:
                segments += [] if item["type"] == "text" else [Segment("text", [], advance=1)]
            elif item["type"] == "text":
                labels = None
                if item["loss"]:
                    last = item["special_token_label"] if item["special_token_loss"] else IGNORE
                    labels = [*item["ids"], model.config.eos_token_id, last]
                segments.append(text(model, item["ids"], labels=labels))
            elif item["type"] == "vit_image":
                segments.append(vision(model, numbers[item["pixels"]]))
            else:
                role = "target" if item["loss"] else "latents"
                segments.append(image(model, role, numbers[item["latent"]], patch_size))
                noise.append(numbers[item["noise"]])
                t = torch.tensor(item["raw_timestep"]).sigmoid() if item["loss"] else torch.tensor(0.0)
                timesteps.append((shift * t / (1 + (shift - 1) * t)).expand(len(noise[-1])))
        samples.append(segments)
    batch = collate(samples, packed=True)
    return samples, {**batch, "noise": torch.cat(noise)[None], "timestep": torch.cat(timesteps)[None]}


@pytest.mark.parametrize("case", ["f1", "f2"])
def test_training_losses_and_gradients(model, numbers, facts, case):
    expected = facts[case]
    _, batch = training_pack(model, numbers, facts, case)
    model.zero_grad()
    output = model(**batch)
    assert output.text_loss.item() == pytest.approx(expected["ce"], abs=2e-5)
    assert output.flow_loss.item() == pytest.approx(expected["mse"], abs=2e-5)
    assert output.loss.item() == pytest.approx(expected["loss"], abs=4e-5)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == set(expected["grad_norms"])
    for name, gradient in gradients.items():
        if "vit_model" in name and name.endswith("k_proj.bias"):
            continue  # mathematically zero
        assert gradient.norm().item() == pytest.approx(expected["grad_norms"][name], rel=1e-4), name
        if f"{case}.grad.{name}" in numbers:
            torch.testing.assert_close(gradient, numbers[f"{case}.grad.{name}"], atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("case", ["f1", "f2"])
def test_losses_per_token(model, numbers, facts, case):
    _, batch = training_pack(model, numbers, facts, case)
    output = model(**batch, loss_reduction="none")
    assert output.loss is None
    text_loss = output.text_loss[batch["shift_labels"] != IGNORE]
    torch.testing.assert_close(text_loss, numbers[f"{case}.ce_per_token"], atol=1e-4, rtol=0)
    targets = batch["roles"][:, -batch["latents"].shape[1] :] == 2
    torch.testing.assert_close(output.flow_loss[targets], numbers[f"{case}.mse_per_token"], atol=1e-4, rtol=0)
    weights = numbers[f"{case}.packed.ce_loss_weights"]
    reweighted = (text_loss * weights).sum() / weights.sum()
    assert reweighted.item() == pytest.approx(facts[case]["ce_reweighted"], abs=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("case", ["f1", "f2"])
def test_a_pack_equals_its_samples(model, numbers, facts, case):
    samples, batch = training_pack(model, numbers, facts, case)
    packed = model(**batch, loss_reduction="none")
    text_loss, flow_loss, used = [], [], 0
    for segments in samples:
        alone = collate([segments])
        if "latents" in alone:
            length = alone["latents"].shape[1]
            alone |= {name: batch[name][:, used : used + length] for name in ("noise", "timestep")}
            used += length
        output = model(**alone, loss_reduction="none")
        text_loss += [] if output.text_loss is None else [output.text_loss[output.text_loss != 0]]
        flow_loss += [] if output.flow_loss is None else [output.flow_loss[output.flow_loss != 0]]
    torch.testing.assert_close(torch.cat(text_loss), packed.text_loss[packed.text_loss != 0], atol=2e-5, rtol=0)
    torch.testing.assert_close(torch.cat(flow_loss), packed.flow_loss[packed.flow_loss != 0], atol=2e-5, rtol=0)
