"""Packs: what is in the batch, that a pack equals its samples, the reference's packs, errors, gradients everywhere."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

import echo4o_hf.miniature
from echo4o_hf.model.configuration_bagel import BagelConfig
from echo4o_hf.model.image_processing_bagel import BagelImageProcessor
from echo4o_hf.model.modeling_bagel import BagelForConditionalGeneration
from echo4o_hf.model.packing import IGNORE, TARGET, Segment, collate, patchify
from echo4o_hf.model.processing_bagel import BagelProcessor
from echo4o_hf.training.collator import PackCollator, collate_samples
from echo4o_hf.training.latents import LatentEncoder, LatentStore, vae_id
from echo4o_hf.training.samples import Picture, Sample, SampleBuilder, SampleError, training_sizes

GOLDEN = Path(__file__).parents[2] / "../shared/reference/golden_a"
SHARED = Path(echo4o_hf.miniature.__file__).parent / "checkpoints" / "shared"
TOKENIZER = BagelProcessor.from_pretrained(SHARED / "processor").tokenizer

SMALL = BagelConfig(
    text_config={
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(TOKENIZER),
    },
    vision_config={
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 14,
        "image_size": 84,
    },
    bos_token_id=1,
    eos_token_id=2,
    start_of_image_token_id=3,
    end_of_image_token_id=4,
    max_latent_size=6,
    vit_max_num_patch_per_side=6,
)
PROCESSOR = BagelProcessor(BagelImageProcessor.from_bagel_config(SMALL), TOKENIZER)


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL.from_pretrained(SHARED / "vae", torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return BagelForConditionalGeneration._from_config(SMALL, attn_implementation="sdpa")


def encoded(height=90, width=90, seed=0):
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def drawing(id, *references, text="draw a red circle"):
    target = encoded(96, 64, len(id))
    return {"id": id, "instruction": text, "input_images": references, "output_image": target, "answer": None}


def question(id, *pictures):
    texts = {"instruction": "what is it?", "answer": "two blue squares"}
    return {"id": id, **texts, "input_images": pictures, "output_image": None}


MIXED = [
    drawing("draw"),
    question("see", encoded(50, 80, 1)),
    drawing("combine", encoded(96, 60, 2), encoded(40, 90, 3), text="the first and the second"),
    question("chat"),
    drawing("edit", encoded(96, 96, 4)),
]


def make_collator(vae=None, store=None, on_error="raise", always_all_parts=False, **options):
    builder = SampleBuilder(
        PROCESSOR,
        SMALL,
        vae.config if vae is not None else {"scaling_factor": 1.0, "shift_factor": 0.0},
        sizes=training_sizes(PROCESSOR, SMALL),
        store=store,
        **{"max_tokens": 2048, **options},
    )
    return PackCollator(builder, on_error, always_all_parts)


def for_model(batch):
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def assert_equal_batches(one, other):
    assert one.keys() == other.keys() and one["ids"] == other["ids"] and one["left_out"] == other["left_out"]
    for name, value in for_model(one).items():
        torch.testing.assert_close(value, other[name], atol=0, rtol=0)
    for a, b in zip(one["pictures"], other["pictures"], strict=True):
        assert (a.key, a.start, a.grid) == (b.key, b.start, b.grid)
        torch.testing.assert_close(a.pixels, b.pixels, atol=0, rtol=0)
        torch.testing.assert_close(a.eps, b.eps, atol=0, rtol=0)


def test_the_batch_of_the_docstring():
    wide, damaged = encoded(48, 96), {"bytes": b"damaged", "path": None}
    rows = [question("p7"), {**drawing("p8"), "output_image": wide}, drawing("p9", damaged)]
    collator = make_collator(on_error="skip", text_dropout=0.0)
    batch = collator([(0, rows)])
    asked, answered = (PROCESSOR.text_segment(text).input_ids for text in ("what is it?", "two blue squares"))
    text = PROCESSOR.text_segment("draw a red circle").input_ids
    markers = [PROCESSOR.start_of_image_token_id, PROCESSOR.end_of_image_token_id]
    assert batch["input_ids"].tolist() == [[*asked, *answered, *text, *markers]]
    labels = [IGNORE] * len(asked) + answered[1:] + [IGNORE] * (1 + len(text) + 2)
    assert batch["shift_labels"].tolist() == [labels]
    assert batch["latents"].shape == batch["noise"].shape == (1, 18, SMALL.latent_dim)
    assert batch["latent_grids"].tolist() == [[[3, 6]]]
    assert not batch["latents"].any() and batch["noise"].std() > 0.9
    assert batch["timestep"].shape == (1, 18) and len(batch["timestep"].unique()) == 1
    assert [(item.start, item.grid) for item in batch["pictures"]] == [(0, (3, 6))]
    assert batch["ids"] == ["p7", "p8"]
    ((id, reason),) = batch["left_out"]
    assert id == "p9" and reason.startswith("input_images[0] does not decode")


def test_pictures_start_where_their_latents_are(vae):
    collator = make_collator(vae, always_all_parts=True)
    batch = collator([(0, MIXED)])
    starts = {}  # first generation token of each segment
    segments = batch["segment_ids"][0, batch["input_ids"].shape[1] :].tolist()
    for token, segment in enumerate(segments):
        starts.setdefault(segment, token)
    assert [item.start for item in batch["pictures"]] == list(starts.values())[:-1]
    assert [list(item.grid) for item in batch["pictures"]] == batch["latent_grids"][0, :-1].tolist()


def test_a_cache_changes_nothing(vae, tmp_path):
    store = LatentStore(tmp_path, vae_id(vae))
    plain, cached = make_collator(vae)([(2, MIXED)]), make_collator(vae, store)([(2, MIXED)])
    LatentEncoder(vae, SMALL.latent_patch_size).fill(plain)
    assert plain["latents"].abs().sum(-1).bool().all(), "all tokens are filled in"
    assert len(cached["pictures"]) == len(plain["pictures"]), "nothing is in the store yet"
    LatentEncoder(vae, SMALL.latent_patch_size, store).fill(cached)
    again = make_collator(vae, store)([(2, MIXED)])
    assert again["pictures"] == []
    for name, value in for_model(plain).items():
        torch.testing.assert_close(cached[name], value, atol=0, rtol=0)
        torch.testing.assert_close(again[name], value, atol=0, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_pack_equals_its_samples(model, vae, epoch):
    collator, encoder = make_collator(vae, always_all_parts=True), LatentEncoder(vae, SMALL.latent_patch_size)
    packed = collator([(epoch, MIXED)])
    encoder.fill(packed)
    output = model(**for_model(packed), loss_reduction="none")
    text_loss, flow_loss = [], []
    for row in MIXED:
        alone = collate_samples([collator.builder.build(row, epoch)])
        encoder.fill(alone)
        one = model(**for_model(alone), loss_reduction="none")
        text_loss.append(one.text_loss[alone["shift_labels"] != IGNORE])
        if one.flow_loss is not None:
            flow_loss.append(one.flow_loss[alone["roles"][:, -one.flow_loss.shape[1] :] == TARGET])
    labelled = packed["shift_labels"] != IGNORE
    targets = packed["roles"][:, labelled.shape[1] :] == TARGET
    assert labelled.sum() == 8 and targets.sum() == 3 * 24
    torch.testing.assert_close(output.text_loss[labelled], torch.cat(text_loss), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.flow_loss[targets], torch.cat(flow_loss), atol=1e-5, rtol=0)


def test_the_same_on_any_number_of_workers_and_in_any_pack():
    packs = [(0, MIXED[:2]), (0, MIXED[2:]), (1, MIXED)]
    batches = {
        workers: list(torch.utils.data.DataLoader(packs, collate_fn=make_collator(), num_workers=workers))
        for workers in (0, 2)
    }
    for one, other in zip(*batches.values(), strict=True):
        assert_equal_batches(one, other)
    first, second, _ = batches[0]
    whole = make_collator()([(0, MIXED)])
    for name in ("noise", "timestep", "latents"):
        torch.testing.assert_close(torch.cat([first[name], second[name]], dim=1), whole[name], atol=0, rtol=0)
    torch.testing.assert_close(
        torch.cat([first["input_ids"], second["input_ids"]], 1), whole["input_ids"], atol=0, rtol=0
    )
    backwards = make_collator()([(0, MIXED[::-1])])
    assert {(a.key, a.eps.sum().item()) for a in backwards["pictures"]} == {
        (a.key, a.eps.sum().item()) for a in whole["pictures"]
    }


# ---------------------------------------------------------------------------------------------- all parts of the model


def all_losses(model, batch):
    """What a trainer adds up: the heads take part in packs without their losses."""
    output = model(**for_model(batch), loss_reduction="none")
    ends = output.last_hidden_state[:, [0, -1]]
    loss = output.text_loss.sum() + 0 * ends.sum()
    loss = loss + (0 * model.llm2vae(ends).sum() if output.flow_loss is None else output.flow_loss.sum())
    return loss, output


PACKS = {"answers": [MIXED[1]], "chat": [MIXED[3]], "text to image": [MIXED[0]], "mixed": MIXED}


@pytest.mark.parametrize("pack", PACKS)
def test_all_parts_take_part(model, vae, pack):
    """Gradients for every parameter; losses and gradients that are there anyway stay what they were."""
    gradients, losses = [], []
    for always_all_parts in (False, True):
        collator = make_collator(vae, always_all_parts=always_all_parts, text_dropout=0.0)
        batch = collator([(0, PACKS[pack])])
        LatentEncoder(vae, SMALL.latent_patch_size).fill(batch)
        assert batch["ids"] == [row["id"] for row in PACKS[pack]]
        model.zero_grad()
        if always_all_parts:
            loss, output = all_losses(model, batch)
        else:
            output = model(**for_model(batch), loss_reduction="none")
            loss = output.text_loss.sum() + (0 if output.flow_loss is None else output.flow_loss.sum())
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        losses.append((output.text_loss, output.flow_loss, loss, batch))
    (text_loss, flow_loss, loss, batch), (all_text_loss, all_flow_loss, all_loss, all_batch) = losses
    assert all_batch["segment_ids"].shape[1] == batch["segment_ids"].shape[1] + 6
    assert (all_batch["shift_labels"] != IGNORE).sum() == (batch["shift_labels"] != IGNORE).sum()
    assert (all_batch["roles"] == TARGET).sum() == (batch["roles"] == TARGET).sum()
    torch.testing.assert_close(all_loss, loss, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(all_text_loss[:, : text_loss.shape[1]], text_loss, atol=1e-5, rtol=0)
    if flow_loss is not None:
        torch.testing.assert_close(all_flow_loss[:, :-1], flow_loss, atol=1e-5, rtol=0)
    before, after = gradients
    assert after.keys() == dict(model.named_parameters()).keys()
    assert pack == "mixed" or before.keys() < after.keys()
    for name, gradient in after.items():
        expected = before.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4, msg=name)


def test_packs_without_labels_compute_no_logits(model):
    batch = make_collator()([(0, [MIXED[0]])])
    assert (batch["shift_labels"] == IGNORE).all()
    output = model(**for_model(batch))
    assert output.logits is None and output.text_loss == 0 and output.flow_loss > 0


# ----------------------------------------------------------------------------------------------- the reference's packs


def golden_samples(numbers, facts, case, config):
    """The reference's samples, with its latents, noise and timesteps."""
    shift, patch_size = facts[case]["timestep_shift"], config.latent_patch_size
    markers = [config.start_of_image_token_id, config.end_of_image_token_id]
    samples = []
    for number, items in enumerate(facts[case]["samples"]):
        sample = Sample(f"{case}-{number}", [])
        for item in items:
            if item["dropped"]:
                sample.segments += [] if item["type"] == "text" else [Segment("text", [], advance=1)]
            elif item["type"] == "text":
                segment = Segment("text", [config.bos_token_id, *item["ids"], config.eos_token_id])
                if item["loss"]:
                    last = item["special_token_label"] if item["special_token_loss"] else IGNORE
                    segment.labels = [*segment.input_ids[1:], last]
                sample.segments.append(segment)
            elif item["type"] == "vit_image":
                patches = patchify(numbers[item["pixels"]], 14)
                grid = tuple(side // 14 for side in numbers[item["pixels"]].shape[1:])
                sample.segments.append(Segment("vision", markers, patches=patches, grid=grid))
            else:
                latents = patchify(numbers[item["latent"]], patch_size)
                grid = tuple(side // patch_size for side in numbers[item["latent"]].shape[1:])
                t = torch.tensor(item["raw_timestep"]).sigmoid() if item["loss"] else torch.tensor(0.0)
                role = "target" if item["loss"] else "latents"
                sample.segments.append(Segment(role, markers, latents=latents, grid=grid))
                sample.pictures.append(Picture("", grid, moments=latents))
                sample.noise.append(numbers[item["noise"]])
                sample.timesteps.append((shift * t / (1 + (shift - 1) * t)).item())
        samples.append(sample)
    return samples


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"reference numbers are not at {GOLDEN}")
@torch.no_grad()
@pytest.mark.parametrize("case", ["f1", "f2"])
def test_losses_of_the_reference_s_packs(case):
    numbers, facts = load_file(GOLDEN / "golden.safetensors"), json.loads((GOLDEN / "golden.json").read_text())
    golden = BagelForConditionalGeneration.from_pretrained(GOLDEN, attn_implementation="sdpa")
    samples = golden_samples(numbers, facts, case, golden.config)
    batch = collate_samples(samples)
    output = golden(**for_model(batch))
    assert output.text_loss.item() == pytest.approx(facts[case]["ce"], abs=2e-5)
    assert output.flow_loss.item() == pytest.approx(facts[case]["mse"], abs=2e-5)
    output = golden(**for_model(batch), loss_reduction="none")
    labelled, targets = batch["shift_labels"] != IGNORE, batch["roles"][:, -batch["latents"].shape[1] :] == TARGET
    torch.testing.assert_close(output.text_loss[labelled], numbers[f"{case}.ce_per_token"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.flow_loss[targets], numbers[f"{case}.mse_per_token"], atol=1e-4, rtol=0)


# -------------------------------------------------------------------------------------------------------------- errors


DAMAGED = {**drawing("bad"), "output_image": {"bytes": encoded()["bytes"][:-300], "path": None}}


def test_a_corrupt_picture_names_its_id():
    with pytest.raises(SampleError, match="^bad: output_image does not decode"):
        make_collator()([(0, [MIXED[0], DAMAGED])])


def test_a_worker_s_error_stays_one_of_the_data():
    loader = torch.utils.data.DataLoader([(0, [DAMAGED])], collate_fn=make_collator(), num_workers=1)
    with pytest.raises(SampleError, match="bad: output_image does not decode"):
        next(iter(loader))


def test_corrupt_pictures_can_be_left_out():
    batch = make_collator(on_error="skip")([(0, [MIXED[0], DAMAGED, MIXED[3]])])
    assert batch["ids"] == ["draw", "chat"]
    assert [id for id, _ in batch["left_out"]] == ["bad"]
    without = make_collator()([(0, [MIXED[0], MIXED[3]])])
    assert_equal_batches({**batch, "left_out": []}, without)
    with pytest.raises(ValueError, match="no row of a pack can be used: bad: output_image .*; chat: instruction"):
        make_collator(on_error="skip")([(0, [DAMAGED, {**MIXED[3], "instruction": ""}])])


def test_oversize_rows_are_left_out_by_their_own_rule():
    long = drawing("long", *[encoded(96, 96, seed) for seed in range(4)])
    need = make_collator().builder.num_tokens(long)
    collator = make_collator(max_tokens=need - 1, oversize="skip")
    batch = collator([(0, [MIXED[0], long])])
    assert batch["ids"] == ["draw"] and [id for id, _ in batch["left_out"]] == ["long"]
    with pytest.raises(SampleError, match="long: "):
        make_collator(max_tokens=need - 1, oversize="error", on_error="skip")([(0, [MIXED[0], long])])


def test_wrong_arguments():
    with pytest.raises(ValueError, match="a batch must be one pack, got 2: set per_device_train_batch_size to 1"):
        make_collator()([(0, MIXED), (0, MIXED)])
    with pytest.raises(ValueError, match="on_error='ignore' must be 'raise' or 'skip'"):
        make_collator(on_error="ignore")


def test_tensors_are_those_of_collate():
    collator = make_collator()
    batch = collator([(4, MIXED)])
    expected = collate([collator.builder.build(row, 4).segments for row in MIXED], packed=True)
    assert for_model(batch).keys() == {*expected, "noise", "timestep"}
    for name, value in expected.items():
        torch.testing.assert_close(batch[name], value, atol=0, rtol=0)
