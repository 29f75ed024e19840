import numpy as np
import pytest
import skimage.data
from PIL import Image

from echo4o_hf.pipeline.prompts import THINKING_PROMPT, count_positions, last_image, latent_grid, read_prompts

from .conftest import make_config, make_processor

CAT, ROCKET = Image.new("RGB", (8, 4)), Image.new("RGB", (4, 8))


def read(prompt, image=None):
    return read_prompts(prompt, image, lambda image: image)


def test_every_form_of_prompt_and_references():
    assert read("a") == [["a"]]
    assert read(["a", "b"]) == [["a"], ["b"]]
    assert read("a", CAT) == [[CAT, "a"]]
    assert read("a", [CAT, ROCKET]) == [[CAT, ROCKET, "a"]]
    assert read(["a"], [CAT, ROCKET]) == [[CAT, ROCKET, "a"]]
    assert read(["a", "b"], [[CAT], []]) == [[CAT, "a"], ["b"]]
    assert read(["a", CAT, "b"]) == [["a", CAT, "b"]]
    assert read([["a", CAT], ["b"], "c"]) == [["a", CAT], ["b"], ["c"]]
    assert read([CAT]) == [[CAT]]
    assert read(["a", CAT], ROCKET) == [[ROCKET, "a", CAT]]


def test_references_are_resized():
    resize = make_processor(make_config()).image_processor.resize_for_latents
    (items,) = read_prompts([skimage.data.rocket(), "a"], skimage.data.astronaut(), resize)
    assert [items[0].size, items[1].size, items[2]] == [(64, 64), (64, 48), "a"]
    assert last_image(items) is items[1]
    assert last_image(["a"]) is None


@pytest.mark.parametrize(
    ("prompt", "image", "message"),
    [
        (None, None, "must be a string, got NoneType"),
        (3, None, "must be a string, got int: 3"),
        ([], None, "no prompt given"),
        ([[], ["a"]], None, "no prompt given"),
        (["a", 3], None, "got int: 3"),
        (["a", None], None, "got NoneType"),
        (["a", "b"], [CAT, ROCKET], "2 images for 2 texts: pass a list of lists"),
        (["a", "b"], [[CAT]], "1 lists of images for 2 texts"),
        ("a", 3, "got int"),
    ],
)
def test_prompts_that_cannot_be_read(prompt, image, message):
    with pytest.raises(ValueError, match=message):
        read(prompt, image)


def test_default_sizes():
    config = make_config()
    assert latent_grid(None, None, None, config) == (4, 4)
    assert latent_grid(Image.new("RGB", (64, 32)), None, None, config) == (2, 4)
    assert latent_grid(Image.new("RGB", (64, 32)), 48, None, config) == (3, 4)
    assert latent_grid(None, 16, np.int64(32), config) == (1, 2)


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (50, 64, "height=50 .* multiples of 16 up to 64; the nearest is 48"),
        (64, 80, "width=80 .* the nearest is 64"),
        (0, 64, "height=0 .* the nearest is 16"),
        (-16, 64, "height=-16 .* the nearest is 16"),
        (64.0, 64, "height=64.0 must be a whole number"),
        ("64", 64, "height='64' must be a whole number"),
    ],
)
def test_sizes_off_the_grid(height, width, message):
    with pytest.raises(ValueError, match=message):
        latent_grid(None, height, width, make_config())


def test_positions_are_counted_like_the_contexts_use_them():
    processor = make_processor(make_config())
    assert count_positions(["a red cat"], processor, thinking=False) == 5 + 1
    assert count_positions([CAT, "a", ROCKET, "cat"], processor, thinking=False) == 2 + 3 + 2 + 3 + 1
    assert count_positions(["a"], processor, thinking=True) == 3 + len(THINKING_PROMPT.split()) + 2 + 2 + 1
