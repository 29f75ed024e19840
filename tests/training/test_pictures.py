"""Encoded pictures: sizes without decoding, orientation, transparency, damage."""

import hashlib
import io
import pickle

import numpy as np
import pytest
from PIL import Image

from echo4o_hf.training.pictures import EncodedPicture, SampleError

ORIENTATION = 0x0112


def noise_image(width=6, height=4, mode="RGB"):
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    array = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(array.squeeze(), mode=None)


def encode(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return {"bytes": file.getvalue(), "path": None}


def picture(value):
    return EncodedPicture("p7", "output_image", value)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_orientation(format, orientation):
    exif = Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    encoded = picture(encode(noise_image(6, 4), format, exif=exif))
    stands = orientation in (6, 8)
    assert encoded.size == ((6, 4) if stands else (4, 6))
    assert sorted(encoded.header_size) == [4, 6]
    assert (encoded.image.height, encoded.image.width) == encoded.size


def test_orientation_turns_the_pixels():
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned by 90 degrees clockwise
    image = noise_image(6, 4)
    turned = picture(encode(image, exif=exif)).image
    np.testing.assert_array_equal(np.array(turned), np.rot90(np.array(image), -1))


def test_the_size_of_a_picture_with_a_header_is_read_without_decoding():
    for format in ("JPEG", "PNG"):
        value = encode(noise_image(60, 40), format)
        cut = picture({"bytes": value["bytes"][:-200], "path": None})
        assert cut.size == cut.header_size == (40, 60)
        with pytest.raises(SampleError, match="p7: output_image does not decode"):
            _ = cut.image


def test_transparent_pixels_are_white():
    image = noise_image(mode="RGBA")
    image.putalpha(0)
    decoded = picture(encode(image)).image
    assert decoded.mode == "RGB" and np.array(decoded).min() == 255


def test_a_path_instead_of_bytes(tmp_path):
    value = encode(noise_image())
    (tmp_path / "a.png").write_bytes(value["bytes"])
    encoded = picture({"bytes": None, "path": str(tmp_path / "a.png")})
    assert encoded.header_size == encoded.size == (4, 6)
    assert encoded.sha256 == hashlib.sha256(value["bytes"]).hexdigest() == picture(value).sha256
    missing = picture({"bytes": None, "path": str(tmp_path / "b.png")})
    for name in ("data", "sha256", "header_size", "size", "image"):
        with pytest.raises(SampleError, match=r"p7: output_image (cannot be read|does not decode) .*b\.png"):
            getattr(missing, name)


@pytest.mark.parametrize("value", [None, "a.png", {"bytes": None, "path": None}, {}, Image.new("RGB", (1, 1))])
def test_what_is_no_encoded_image(value):
    with pytest.raises(SampleError, match="p7: output_image must be an undecoded image with bytes or a path"):
        picture(value)


@pytest.mark.parametrize("data", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_what_is_no_picture(data):
    for name in ("header_size", "size", "image"):
        with pytest.raises(SampleError, match="p7: output_image does not decode"):
            getattr(picture({"bytes": data, "path": "x.png"}), name)


def test_an_error_comes_whole_out_of_another_process():
    error = pickle.loads(pickle.dumps(SampleError("p7", "is empty")))
    assert (error.id, error.reason, str(error)) == ("p7", "is empty", "p7: is empty")
    assert str(SampleError("Caught SampleError in DataLoader worker")) == "Caught SampleError in DataLoader worker"
