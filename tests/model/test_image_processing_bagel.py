import io
import json
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from echo4o_hf.model.image_processing_bagel import BagelImageProcessor, resized_size, to_rgb
from echo4o_hf.model.packing import grid_position_ids

GOLDEN = Path(__file__).parents[2] / "../shared/reference/golden_a"
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason=f"reference numbers are not at {GOLDEN}")

LATENT = {"max": 1024, "min": 512, "stride": 16, "max_pixels": 14 * 14 * 9 * 1024}
TINY = {
    "latent_size": {"max": 96, "min": 48, "stride": 16},
    "vision_size": {"max": 84, "min": 42, "stride": 14},
}


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "golden.json").read_text()), load_file(GOLDEN / "golden.safetensors")


@needs_golden
def test_sizes_equal_the_official_ones(golden):
    for name, rule in golden[0]["g"]["sizes"].items():
        size = {key: rule[key] for key in ("max", "min", "stride", "max_pixels")}
        for row in rule["rows"]:
            assert list(resized_size(*row["H_W"], **size)) == row["out"], (name, row)
            if "out_img_num_4" in row:
                assert list(resized_size(*row["H_W"], **size, num_images=4)) == row["out_img_num_4"], (name, row)


@needs_golden
def test_pixels_equal_the_official_ones(golden):
    processor = BagelImageProcessor(**TINY)
    for name in ("img", "big"):
        image = golden[1][f"g.{name}.uint8"].numpy()
        torch.testing.assert_close(processor.latent_pixels(image), golden[1][f"g.{name}.tiny_vae"], atol=1e-6, rtol=0)
        torch.testing.assert_close(processor.vision_pixels(image), golden[1][f"g.{name}.tiny_vit"], atol=1e-6, rtol=0)


@needs_golden
def test_references_are_resized_for_vision_after_the_latent_resize(golden):
    processor = BagelImageProcessor(**TINY)
    for name in ("img0", "img1"):
        resized = processor.resize_for_latents(golden[1][f"e.{name}.uint8"].numpy())
        np.testing.assert_array_equal(np.array(resized), golden[1][f"e.{name}.resized_uint8"].numpy())
        torch.testing.assert_close(
            processor.latent_pixels(resized), golden[1][f"e.{name}.vae_pixels"], atol=1e-6, rtol=0
        )
        torch.testing.assert_close(
            processor.vision_pixels(resized), golden[1][f"e.{name}.vit_pixels"], atol=1e-6, rtol=0
        )


@needs_golden
def test_transparency_becomes_white_as_in_the_official_code(golden):
    rgb = to_rgb(Image.fromarray(golden[1]["g.rgba.uint8"].numpy()))
    np.testing.assert_array_equal(np.array(rgb), golden[1]["g.rgba.pil_img2rgb"].numpy())


@needs_golden
def test_position_ids_equal_the_official_ones(golden):
    for name, case in golden[0]["g"]["position_ids"].items():
        ids = grid_position_ids((case["H"] // case["patch"], case["W"] // case["patch"]), case["max_per_side"])
        assert (len(ids), ids[:6].tolist(), int(ids[-1])) == (case["n"], case["first"], case["last"])
        if f"g.pos.{name}" in golden[1]:
            assert torch.equal(ids, golden[1][f"g.pos.{name}"])


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 6000), st.integers(1, 6000))
def test_resized_sides_are_multiples_within_the_limits(height, width):
    new_height, new_width = resized_size(height, width, **LATENT)
    assert new_height % 16 == new_width % 16 == 0
    assert 16 <= min(new_height, new_width) and max(new_height, new_width) <= 1024
    assert new_height * new_width <= LATENT["max_pixels"]
    assert resized_size(width, height, **LATENT) == (new_width, new_height)


@settings(deadline=None, max_examples=300)
@given(st.integers(20, 5000), st.integers(20, 5000))
def test_latent_resize_is_idempotent(height, width):
    once = resized_size(height, width, **LATENT)
    assert resized_size(*once, **LATENT) == once


@settings(deadline=None, max_examples=100)
@given(st.integers(512, 1024), st.integers(512, 1024))
def test_sizes_within_the_limits_move_by_half_a_stride_at_most(height, width):
    new_height, new_width = resized_size(height, width, **LATENT)
    assert abs(new_height - height) <= 8 and abs(new_width - width) <= 8


def test_area_cap_shrinks_the_sides_by_the_ratio_of_areas():
    size = {"max": 980, "min": 224, "stride": 14, "max_pixels": 100_000}
    assert resized_size(1024, 1024, **size) == (98, 98)  # 316 x 316 would have fitted
    assert resized_size(512, 512, **size) == (196, 196)


@pytest.mark.parametrize("name", ["astronaut", "camera", "chelsea", "rocket"])
def test_photographs_of_every_input_form_give_the_same_pixels(name, tmp_path):
    photo = getattr(skimage.data, name)()  # camera is grey
    path = tmp_path / "photo.png"
    Image.fromarray(photo).save(path)
    chw = torch.from_numpy(photo if photo.ndim == 3 else photo[:, :, None]).permute(2, 0, 1)
    processor = BagelImageProcessor(**TINY)
    expected = processor.latent_pixels(Image.fromarray(photo))
    assert expected.shape[0] == 3 and expected.dtype == torch.float32 and expected.abs().max() <= 1
    floats = photo.astype(np.float32) / 255
    for form in (photo, chw, path, str(path), floats, floats.astype(np.float64), chw.double() / 255):
        assert torch.equal(processor.latent_pixels(form), expected)


def test_16_bits_are_read_as_the_error_says():
    deep = Image.new("I;16", (64, 64), 30000)
    with pytest.raises(ValueError) as raised:
        to_rgb(deep)
    advice = str(raised.value).rpartition("image=")[2]
    assert np.array(to_rgb(eval(advice, {"np": np, "image": deep}))).flatten().tolist() == [117] * 64 * 64 * 3


def test_photographs_stored_sideways_are_turned(tmp_path):
    upright = Image.fromarray(skimage.data.rocket())
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=exif)
    for photo in (tmp_path / "photo.png", Image.open(tmp_path / "photo.png")):
        np.testing.assert_array_equal(np.array(to_rgb(photo)), np.array(upright))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pixels_are_white(mode):
    image = Image.new("RGBA", (4, 3), (10, 20, 30, 0))
    assert np.array(to_rgb(image.convert(mode))).min() == 255


def test_save_and_load(tmp_path):
    processor = BagelImageProcessor(**TINY)
    processor.save_pretrained(tmp_path)
    assert BagelImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()


def test_from_config_gives_the_official_sizes_for_the_official_model():
    from echo4o_hf.model.configuration_bagel import BagelConfig

    assert BagelImageProcessor.from_bagel_config(BagelConfig()).to_dict() == BagelImageProcessor().to_dict()


def test_from_config_scales_with_the_position_tables():
    from echo4o_hf.model.configuration_bagel import BagelConfig

    config = BagelConfig(
        max_latent_size=4,
        vit_max_num_patch_per_side=4,
        vision_config={"image_size": 56, "patch_size": 14, "hidden_size": 16, "num_attention_heads": 2},
    )
    processor = BagelImageProcessor.from_bagel_config(config)
    assert (processor.latent_size["max"], processor.latent_size["min"]) == (64, 32)
    assert (processor.vision_size["max"], processor.vision_size["min"]) == (56, 14)
    assert processor.resize_for_latents(skimage.data.astronaut()).size == (64, 64)


def _truncated_png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(skimage.data.chelsea()).save(buffer, "PNG")
    return buffer.getvalue()[:5000]


def test_files_that_do_not_decode_are_named(tmp_path):
    for name, content in {"text.png": b"no image", "short.png": _truncated_png(), "empty.jpg": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*does not decode"):
            to_rgb(tmp_path / name)
    with Image.open(tmp_path / "short.png") as late, pytest.raises(ValueError, match="does not decode"):
        to_rgb(late)
    with pytest.raises(ValueError, match="there is no image at .*nowhere.png"):
        to_rgb(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="does not decode"):
        to_rgb(tmp_path)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((4, 4, 3), 255, np.float32), r"must be uint8.*or floats in \[0, 1\], got float32"),
        (torch.full((3, 4, 4), -1.0), "must be uint8.*float32"),
        (torch.full((3, 4, 4), float("nan")), "must be uint8.*float32"),
        (np.zeros((4, 4, 3), np.int64), "must be uint8.*int64"),
        (np.zeros((4, 4, 2), np.uint8), r"with 1, 3 or 4 channels, got \(4, 4, 2\)"),
        (torch.zeros(8, 4, 3, dtype=torch.uint8), r"\(channels, height, width\).*got \(8, 4, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), r"got \(0, 4, 3\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"got \(1, 4, 4, 3\)"),
        (3, "got int"),
        (None, "got NoneType"),
        (Image.new("I;16", (4, 4)), "mode 'I;16'.*scale it"),
        (Image.new("F", (4, 4)), "mode 'F'"),
    ],
)
def test_what_is_no_image_is_said(image, message):
    with pytest.raises(ValueError, match=message):
        to_rgb(image)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent_size": {"maximum": 3}}, "unknown keys .'maximum'"),
        ({"latent_size": {"max": 100, "min": 200}}, "min <= max"),
        ({"vision_size": {"stride": 16}}, "not a multiple of patch_size=14"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BagelImageProcessor(**settings)


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ValueError, match="0x5"):
        resized_size(0, 5, **LATENT)
