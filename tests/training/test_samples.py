"""Rows -> samples: order, sizes, counts of tokens, drops, randomness, labels, errors."""

import hashlib
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import echo4o_hf.miniature
from echo4o_hf.model.configuration_bagel import BagelConfig
from echo4o_hf.model.image_processing_bagel import BagelImageProcessor, resized_size, to_rgb
from echo4o_hf.model.packing import IGNORE, collate, unpatchify
from echo4o_hf.model.processing_bagel import BagelProcessor
from echo4o_hf.training.latents import LatentStore, latents_from_moments
from echo4o_hf.training.samples import OversizeError, SampleBuilder, SampleError, training_sizes

SHARED = Path(echo4o_hf.miniature.__file__).parent / "checkpoints" / "shared"
VAE_CONFIG = {"scaling_factor": 0.5, "shift_factor": 0.1}
KEEP = {"text_dropout": 0.0, "vae_dropout": 0.0, "vit_dropout": 0.0}
TOKENIZER = BagelProcessor.from_pretrained(SHARED / "processor").tokenizer

# No weights anywhere here: latents up to 12x12 tokens (192 pixels), vision up to 10x10 patches (140 pixels).
SMALL = BagelConfig(
    text_config={"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(TOKENIZER)},
    vision_config={"hidden_size": 32, "num_attention_heads": 2, "patch_size": 14, "image_size": 140},
    bos_token_id=1,
    eos_token_id=2,
    start_of_image_token_id=3,
    end_of_image_token_id=4,
    max_latent_size=12,
    vit_max_num_patch_per_side=10,
    timestep_shift=3.0,
)
PROCESSOR = BagelProcessor(BagelImageProcessor.from_bagel_config(SMALL), TOKENIZER)


def encode(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return {"bytes": file.getvalue(), "path": None}


def picture(height=150, width=150, seed=0):
    array = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(array)


def encoded(height=150, width=150, seed=0):
    return encode(picture(height, width, seed))


def drawing(references=(), target=None, text="draw a red circle", id="p7"):
    target = encoded(150, 120, 9) if target is None else target
    return {"id": id, "instruction": text, "input_images": list(references), "output_image": target, "answer": None}


def question(pictures=(), text="what is it?", answer="a red circle", id="q7"):
    return {"id": id, "instruction": text, "input_images": list(pictures), "output_image": None, "answer": answer}


def make_builder(config=SMALL, processor=PROCESSOR, max_tokens=4096, sizes=None, **options):
    sizes = sizes or training_sizes(processor, config)
    return SampleBuilder(processor, config, VAE_CONFIG, sizes=sizes, max_tokens=max_tokens, **{**KEEP, **options})


def roles(sample):
    return [segment.role for segment in sample.segments]


def count(sample):
    return collate([sample.segments], packed=True)["segment_ids"].shape[1]


def pixels(segment):
    return unpatchify(segment.patches, segment.grid, 14, 3)


# ------------------------------------------------------------------------------------------------- what is in a sample


def test_order_and_sizes_of_a_drawing_with_references():
    references = [encoded(300, 200, 1), encoded(100, 70, 2)]
    builder = make_builder(sizes=training_sizes(PROCESSOR, SMALL, reference_size=128, vision_size=70))
    sample = builder.build(drawing(references), epoch=0)
    assert roles(sample) == ["latents", "vision", "latents", "vision", "text", "target"]
    for segment, size, rule, original in [
        (sample.segments[0], 16, builder.sizes.reference, (300, 200)),
        (sample.segments[1], 14, builder.sizes.vision, (300, 200)),
        (sample.segments[2], 16, builder.sizes.reference, (100, 70)),
        (sample.segments[3], 14, builder.sizes.vision, (100, 70)),
        (sample.segments[5], 16, builder.sizes.target, (150, 120)),
    ]:
        assert tuple(side * size for side in segment.grid) == resized_size(*original, **rule)
        tokens = segment.patches if segment.role == "vision" else segment.latents
        assert len(tokens) == math.prod(segment.grid)
        assert segment.input_ids == [PROCESSOR.start_of_image_token_id, PROCESSOR.end_of_image_token_id]
    assert sample.segments[4].input_ids == PROCESSOR.text_segment("draw a red circle").input_ids
    assert all(segment.labels is None for segment in sample.segments)
    assert [picture.grid for picture in sample.pictures] == [sample.segments[index].grid for index in (0, 2, 5)]
    assert [len(noise) for noise in sample.noise] == [math.prod(picture.grid) for picture in sample.pictures]
    assert sample.timesteps[:2] == [0, 0] and 0 < sample.timesteps[2] < 1
    assert not sample.noise[0].any() and not sample.noise[1].any() and sample.noise[2].std() > 0.9


def test_pixels_are_those_of_the_model_s_rules():
    original = picture(300, 200)
    sample = make_builder().build(drawing([encode(original)], encode(original)), epoch=0)
    latent_pixels = PROCESSOR.image_processor.latent_pixels(original)
    for item in sample.pictures:
        torch.testing.assert_close(item.pixels, latent_pixels, atol=0, rtol=0)
    # training sees the original, not the picture resized for the VAE
    torch.testing.assert_close(
        sample.segments[1].patches, PROCESSOR.vision_segment(original, from_original=True).patches, atol=0, rtol=0
    )


def test_keys_name_the_file_and_the_size():
    file = encoded(150, 120)
    sample = make_builder().build(drawing([file], file), epoch=0)
    sha256 = hashlib.sha256(file["bytes"]).hexdigest()
    assert [item.key for item in sample.pictures] == [f"{sha256}-144x128"] * 2
    smaller = make_builder(sizes=training_sizes(PROCESSOR, SMALL, reference_size=64)).build(drawing([file], file), 0)
    assert [item.key for item in smaller.pictures] == [f"{sha256}-64x48", f"{sha256}-144x128"]


def test_labels_of_an_answer():
    sample = make_builder(text_dropout=1.0, vit_dropout=1.0).build(question([encoded(300, 200)]), epoch=0)
    assert roles(sample) == ["vision", "text", "text"]
    asked, answered = sample.segments[1:]
    assert asked.input_ids == PROCESSOR.text_segment("what is it?").input_ids and asked.labels is None
    ids = PROCESSOR.text_segment("a red circle").input_ids
    assert answered.input_ids == ids and answered.labels == [*ids[1:], IGNORE]
    assert answered.labels[-2] == PROCESSOR.eos_token_id
    assert sample.pictures == sample.noise == sample.timesteps == []


def test_questions_share_the_official_pixels_between_their_pictures():
    config = BagelConfig()
    processor = BagelProcessor(BagelImageProcessor(), TOKENIZER)
    builder = make_builder(config, processor, max_tokens=28672)
    large = encoded(980, 980)
    assert builder.build(question([large]), 0).segments[0].grid == (70, 70)
    expected = resized_size(980, 980, max=980, min=378, stride=14, max_pixels=2007040, num_images=3)
    for segment in builder.build(question([large] * 3), 0).segments[:3]:
        assert tuple(side * 14 for side in segment.grid) == expected
    assert expected < (980, 980)


def test_a_question_without_pictures():
    assert roles(make_builder().build(question(), epoch=0)) == ["text", "text"]


def test_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = picture(100, 180)
    upright = Image.fromarray(np.rot90(np.array(image), -1).copy())
    lying = drawing([encode(image, exif=exif)], encode(image, exif=exif))
    expected = make_builder().build(drawing([encode(upright)], encode(upright)), 0)
    sample = make_builder().build(lying, 0)
    assert sample.pictures[0].grid == (11, 6)
    for one, other in zip(sample.pictures, expected.pictures, strict=True):
        torch.testing.assert_close(one.pixels, other.pixels, atol=0, rtol=0)
    torch.testing.assert_close(sample.segments[1].patches, expected.segments[1].patches, atol=0, rtol=0)
    assert make_builder().num_tokens(lying) == count(sample)


def test_transparent_pictures_lie_on_white():
    image = picture().convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.arange(150, dtype=np.uint8), (150, 1))))
    sample = make_builder().build(drawing([encode(image)]), 0)
    white = PROCESSOR.image_processor.latent_pixels(to_rgb(image))
    torch.testing.assert_close(sample.pictures[0].pixels, white, atol=0, rtol=0)
    assert white.shape[1:] == (144, 144) and white[..., 0].min() > 0.8


def test_aspect_ratio_buckets_crop_the_target():
    array = np.zeros((400, 100, 3), dtype=np.uint8)
    array[100:300, :, 0] = 255  # the middle square and a half is red
    tall = encode(Image.fromarray(array))
    builder = make_builder(aspect_ratio_buckets=True, sizes=training_sizes(PROCESSOR, SMALL, image_size=128))
    sample = builder.build(drawing([tall], tall), 0)
    assert sample.pictures[0].grid == (8, 2), "references are not cropped"
    target = sample.pictures[1]
    assert target.grid == (11, 6) and target.pixels.shape[1:] == (176, 96)
    assert target.key.endswith("-176x96c")
    assert (target.pixels[0, 5:-5] > 0.9).all() and (target.pixels[0, [0, -1]] < 0.9).sum() == 0
    assert builder.num_tokens(drawing([tall], tall)) == count(sample)


# ---------------------------------------------------------------------------------------------------- the token budget

heights = st.integers(5, 400)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(heights, heights), max_size=4),
    st.one_of(st.none(), st.tuples(heights, heights)),
    st.integers(60, 700),
    st.booleans(),
    st.sampled_from([None, 6, 8]),
)
def test_num_tokens_is_what_is_built(references, target, max_tokens, buckets, orientation):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation

    def plain(size):
        return encode(Image.new("RGB", size[::-1]), exif=exif)

    row = question(map(plain, references)) if target is None else drawing(map(plain, references), plain(target))
    builder = make_builder(max_tokens=max_tokens, aspect_ratio_buckets=buckets)
    sample = builder.build(row, 0)
    assert builder.num_tokens(row) == count(sample) <= max_tokens
    strict = make_builder(max_tokens=max_tokens, aspect_ratio_buckets=buckets, oversize="error")
    unlimited = make_builder(max_tokens=100_000, aspect_ratio_buckets=buckets)
    if unlimited.num_tokens(row) <= max_tokens:
        assert strict.num_tokens(row) == count(sample) == unlimited.num_tokens(row)
    else:
        with pytest.raises(OversizeError):
            strict.num_tokens(row)


def test_four_full_size_references_fit_the_default_budget():
    config = BagelConfig()
    processor = BagelProcessor(BagelImageProcessor(), TOKENIZER)
    large = encode(Image.new("RGB", (1024, 1024)))
    builder = make_builder(config, processor, max_tokens=28672, oversize="error")
    text = len(PROCESSOR.text_segment("draw a red circle").input_ids)
    needed = [builder.num_tokens(drawing([large] * number, large)) - text for number in range(5)]
    assert needed == [4098, 9567, 15036, 20505, 25974]
    assert 28672 - needed[4] > 2600, "room for the text"
    assert builder.num_tokens(drawing([encode(Image.new("RGB", (4000, 3000)))] * 4, large)) < needed[4]


def test_headers_suffice_to_count():
    cut = [{"bytes": encoded(150, 120)["bytes"][:-500], "path": None}]
    assert make_builder().num_tokens(drawing(cut)) == make_builder().num_tokens(drawing([encoded(150, 120)]))
    with pytest.raises(SampleError, match=r"^p7: input_images\[0\] does not decode"):
        make_builder().build(drawing(cut), 0)


def test_downscaling_shrinks_references_first_and_then_the_target():
    row = drawing([encoded(192, 192), encoded(192, 96)], encoded(192, 192))
    full = make_builder().build(row, 0)
    assert count(full) > 500
    text = len(full.segments[4].input_ids)
    sample = make_builder(max_tokens=300).build(row, 0)
    assert roles(sample) == roles(full) and count(sample) <= 300
    assert sample.segments[-1].grid == (12, 12)
    assert [segment.grid for segment in sample.segments[:4]] == [(7, 7), (6, 6), (7, 4), (6, 3)]
    assert sample.pictures[0].pixels.shape == (3, 112, 112) and pixels(sample.segments[1]).shape == (3, 84, 84)
    smallest = make_builder(max_tokens=text + 5 * 2 + 5).build(row, 0)
    assert [segment.grid for segment in smallest.segments if segment.grid] == [(1, 1)] * 5
    with pytest.raises(OversizeError, match=rf"^p7: texts .* take {text + 10} of max_tokens={text + 14} .* 5 images"):
        make_builder(max_tokens=text + 14).num_tokens(row)


@pytest.mark.parametrize("oversize", ["skip", "error"])
def test_oversize_rows_can_be_refused(oversize):
    builder = make_builder(max_tokens=60, oversize=oversize)
    for method in (builder.num_tokens, lambda row: builder.build(row, 0), builder.pictures):
        with pytest.raises(OversizeError, match=r"^p7: \d+ tokens are more than max_tokens=60: raise it, lower"):
            method(drawing())


def test_a_question_s_pictures_shrink_by_one_factor():
    sample = make_builder(max_tokens=90).build(question([encoded(140, 140), encoded(140, 70)]), 0)
    assert count(sample) <= 90
    assert [segment.grid for segment in sample.segments[:2]] == [(7, 7), (7, 3)]


def test_a_text_that_is_too_long():
    with pytest.raises(OversizeError, match=r"^q7: texts and image markers alone take \d+ of max_tokens=8 tokens"):
        make_builder(max_tokens=8).num_tokens(question())


# ---------------------------------------------------------------------------------------------------------- randomness


def positions(sample):
    """First rope position of each segment that has tokens."""
    data = collate([sample.segments], packed=True)
    firsts = {}
    for segment, position in zip(data["segment_ids"][0].tolist(), data["position_ids"][0].tolist(), strict=True):
        firsts.setdefault(segment, position)
    return [firsts[segment] for segment in sorted(firsts)]


def test_rope_positions_of_what_is_dropped():
    row = drawing([encoded(seed=1), encoded(seed=2)])
    text = len(PROCESSOR.text_segment("draw a red circle").input_ids)
    assert positions(make_builder().build(row, 0)) == [0, 1, 2, 3, 4, 4 + text]
    no_latents = make_builder(vae_dropout=1.0).build(row, 0)
    assert roles(no_latents) == ["text", "vision", "text", "vision", "text", "target"]
    assert positions(no_latents) == [1, 3, 4, 4 + text]
    assert len(no_latents.pictures) == len(no_latents.noise) == len(no_latents.timesteps) == 1
    no_vision = make_builder(vit_dropout=1.0).build(row, 0)
    assert roles(no_vision) == ["latents", "text", "latents", "text", "text", "target"]
    assert positions(no_vision) == [0, 2, 4, 4 + text]
    no_text = make_builder(text_dropout=1.0).build(row, 0)
    assert roles(no_text) == ["latents", "vision", "latents", "vision", "target"]
    assert positions(no_text) == [0, 1, 2, 3, 4]
    nothing = make_builder(text_dropout=1.0, vae_dropout=1.0, vit_dropout=1.0).build(row, 0)
    assert positions(nothing) == [4] and count(nothing) == 2 + len(nothing.noise[0])


def test_rates_of_drops_are_those_asked_for_and_independent():
    small = encoded(16, 16)
    row = drawing([small, small], small)
    sizes = training_sizes(PROCESSOR, SMALL, image_size=16, vision_size=14)
    builder = make_builder(sizes=sizes, text_dropout=0.1, vae_dropout=0.3, vit_dropout=0.5)
    epochs = 600
    drops = []  # (latents, vision) of both references, then the text
    for epoch in range(epochs):
        segments = builder.build(row, epoch).segments
        drops.append([*(not segment.input_ids for segment in segments[:4]), len(segments) == 5])
    drops = np.array(drops, dtype=float)
    rates = np.array([0.3, 0.5, 0.3, 0.5, 0.1])
    assert (abs(drops.mean(0) - rates) < 4 * np.sqrt(rates * (1 - rates) / epochs)).all()
    correlations = np.corrcoef(drops.T) - np.eye(5)
    assert abs(correlations).max() < 4 / math.sqrt(epochs)


def equal(one, other):
    assert roles(one) == roles(other) and one.timesteps == other.timesteps
    for name in ("latents", "patches"):
        for a, b in zip(one.segments, other.segments, strict=True):
            assert (getattr(a, name) is None) == (getattr(b, name) is None)
            if getattr(a, name) is not None:
                torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=0, rtol=0)
    drawn, others = ([*sample.noise, *(item.eps for item in sample.pictures)] for sample in (one, other))
    for a, b in zip(drawn, others, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    return True


def test_a_sample_depends_on_seed_epoch_and_id_alone():
    row = drawing([encoded()])
    options = {"text_dropout": 0.1, "vae_dropout": 0.3, "vit_dropout": 0.3}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    sample = make_builder(**options).build(row, 3)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    torch.manual_seed(2)
    other_builder = make_builder(**options)
    other_builder.build(drawing(id="p8"), 3)
    assert equal(other_builder.build(row, 3), sample)
    noises = {
        make_builder(seed=seed).build(drawing(id=id), epoch).noise[0].sum().item()
        for seed, epoch, id in [(0, 0, "p7"), (1, 0, "p7"), (0, 1, "p7"), (0, 0, "p8"), (1, 11, "p7"), (11, 1, "p7")]
    }
    assert len(noises) == 6


def test_dropping_does_not_change_what_is_left():
    row = drawing([encoded(), encoded(40, 70)])
    full = make_builder().build(row, 0)
    target_only = make_builder(text_dropout=1.0, vae_dropout=1.0, vit_dropout=1.0).build(row, 0)
    torch.testing.assert_close(target_only.noise[0], full.noise[-1], atol=0, rtol=0)
    torch.testing.assert_close(target_only.pictures[0].eps, full.pictures[-1].eps, atol=0, rtol=0)
    assert target_only.timesteps == full.timesteps[-1:]
    mean = make_builder(sample_posterior=False).build(row, 0)
    assert [item.eps for item in mean.pictures] == [None] * 3 and mean.timesteps == full.timesteps
    torch.testing.assert_close(mean.noise[-1], full.noise[-1], atol=0, rtol=0)


def test_timesteps_are_logit_normal_and_shifted():
    small = encoded(16, 16)
    builder = {
        shift: make_builder(sizes=training_sizes(PROCESSOR, SMALL, image_size=16), timestep_shift=shift)
        for shift in (None, 1.0)
    }
    drawn = {
        shift: torch.tensor([builder[shift].build(drawing((), small), epoch).timesteps[0] for epoch in range(400)])
        for shift in builder
    }
    logits = drawn[1.0].logit()
    assert abs(logits.mean()) < 4 / 20 and abs(logits.std() - 1) < 0.15
    shifted = 3.0 * drawn[1.0] / (1 + 2.0 * drawn[1.0])  # the config's shift is 3
    torch.testing.assert_close(drawn[None], shifted)
    assert not torch.equal(drawn[None], drawn[1.0])


def test_eps_has_the_shape_of_the_latents_and_unit_variance():
    eps = make_builder().build(drawing(), 0).pictures[0].eps
    assert eps.shape == (16, 18, 16) and abs(eps.std() - 1) < 0.05 and abs(eps.mean()) < 0.05


# -------------------------------------------------------------------------------------------------- the latents' store


def test_what_the_store_has_is_not_decoded(tmp_path):
    row = drawing([encoded(150, 120, 1)], encoded(150, 120, 2))
    plain = make_builder().build(row, 5)
    assert not any(segment.latents.any() for segment in plain.segments if segment.latents is not None)
    store = LatentStore(tmp_path, "vae")
    moments = [torch.randn(32, 18, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    for item, values in zip(plain.pictures, moments, strict=True):
        store.put(item.key, values)
    cached = make_builder(store=store, vit_dropout=1.0).build(row, 5)
    assert [item.pixels for item in cached.pictures] == [None, None]
    for item, before, segment, values in zip(
        cached.pictures, plain.pictures, (cached.segments[0], cached.segments[-1]), moments, strict=True
    ):
        torch.testing.assert_close(item.moments, values, atol=0, rtol=0)
        torch.testing.assert_close(item.eps, before.eps, atol=0, rtol=0)
        expected = latents_from_moments(values, before.eps, VAE_CONFIG, 2)
        torch.testing.assert_close(segment.latents, expected, atol=0, rtol=0)
    torch.testing.assert_close(cached.noise[-1], plain.noise[-1], atol=0, rtol=0)


def test_all_pictures_to_encode_ahead(tmp_path):
    row = drawing([encoded(150, 120, 1), encoded(40, 70, 2)])
    store = LatentStore(tmp_path, "vae")
    dropping = make_builder(vae_dropout=1.0, store=store, aspect_ratio_buckets=True)
    expected = make_builder(aspect_ratio_buckets=True).build(row, 0).pictures
    assert [item.key for item in dropping.pictures(row)] == [item.key for item in expected]
    for item, other in zip(dropping.pictures(row), expected, strict=True):
        torch.testing.assert_close(item.pixels, other.pixels, atol=0, rtol=0)
        assert item.eps is None
    store.put(expected[1].key, torch.zeros(32, 8, 12))
    assert [item.pixels is None for item in dropping.pictures(row)] == [False, True, False]
    assert dropping.pictures(question([encoded()])) == []


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (drawing(text=""), "instruction: a prompt must hold text, got ''"),
        (drawing(text=None), "instruction: a prompt must be a string"),
        (question(answer="  "), "answer: a prompt must hold text"),
        (question(answer=None), "must have an output_image or an answer$"),
        ({**drawing(), "answer": "a circle"}, "must have an output_image or an answer, not both"),
        (drawing([encoded(), None]), r"input_images\[1\] must be an undecoded image"),
        (drawing([{"bytes": b"GIF89a", "path": None}]), r"input_images\[0\] does not decode"),
        (drawing((), {"bytes": None, "path": "/no/such/file.png"}), "output_image .*/no/such/file.png"),
    ],
)
def test_errors_name_the_row_and_what_is_wrong(row, reason):
    for method in (make_builder().num_tokens, lambda row: make_builder().build(row, 0), make_builder().pictures):
        with pytest.raises(SampleError, match=f"^{row['id']}: {reason}") as caught:
            method(row)
        assert caught.value.id == row["id"] and caught.value.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"oversize": "drop"}, "oversize='drop' must be one of downscale, skip, error"),
        ({"vae_dropout": 1.5}, "between 0 and 1, got {'vae_dropout': 1.5}"),
        ({"max_tokens": 0}, "max_tokens=0 and timestep_shift=3.0 must be positive"),
        ({"timestep_shift": 0.0}, "timestep_shift=0.0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_builder(**options)
