"""Calls of the pipeline with random arguments: what can work works, what cannot says why before anything is drawn."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from echo4o_hf.pipeline.pipeline_echo4o import Echo4oPipelineOutput

NAN, INF, HUGE = float("nan"), float("inf"), 10**400
RUN = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

COLOURS = np.arange(20 * 30 * 4, dtype=np.uint8).reshape(20, 30, 4)
RGB = Image.fromarray(COLOURS[..., :3])
SIZES = {"dot": (1, 1), "column": (3, 900), "row": (900, 3), "large": (700, 500)}
PICTURES = {
    **{mode: RGB.convert(mode) for mode in ("1", "L", "LA", "P", "CMYK", "YCbCr", "RGBA")},
    **{name: Image.new("RGB", size, "teal") for name, size in SIZES.items()},
    "array": COLOURS[..., :3],
    "grey array": COLOURS[..., 0],
    "floats": COLOURS[..., :3] / 255,
    "tensor": torch.from_numpy(COLOURS).permute(2, 0, 1),
}
DEEP = Image.fromarray(COLOURS[..., 0].astype(np.uint16))
CLOSED = Image.new("RGB", (4, 4))
CLOSED.close()


def seed(number=0):
    return torch.Generator().manual_seed(number)


class Picture(str):
    """A name in `PICTURES`, shown as such by hypothesis."""


@st.composite
def prompts(draw):
    """Contents of one to three prompts: lists of texts and pictures, some of which go to `image`."""
    texts, names = st.sampled_from(["a red cat", "two hats", "\u2603 \0"]), st.sampled_from(sorted(PICTURES))
    pictures = st.builds(Picture, names)
    contents = draw(st.lists(st.lists(st.one_of(texts, pictures), min_size=1, max_size=2), min_size=1, max_size=2))
    references = draw(st.lists(st.lists(pictures, max_size=2), min_size=len(contents), max_size=len(contents)))
    return contents, references


WORKING = {
    "height": st.sampled_from([None, 16, 32, 48, 64, np.int64(32)]),
    "width": st.sampled_from([None, 16, 48, 64]),
    "num_inference_steps": st.sampled_from([1, 2, np.int64(2)]),
    "guidance_scale": st.sampled_from([0, 0.5, 1, 1.5, 4.0, np.float32(7), 1000]),
    "image_guidance_scale": st.sampled_from([None, 0, 1.0, 1.5, 2]),
    "guidance_interval": st.sampled_from([None, (0, 1), (0.0, 0.0), [0.4, 1.0], (0.6, np.float64(0.9)), (1, 1)]),
    "guidance_renorm": st.sampled_from([None, "global", "channel", "text_channel"]),
    "guidance_renorm_min": st.sampled_from([0, 0.5, 1.0]),
    "thinking": st.booleans(),
    "max_think_tokens": st.integers(1, 2),
    "num_images_per_prompt": st.integers(1, 2),
    "generator": st.sampled_from(["none", "one", "one each", "tuple"]),
    "latents": st.sampled_from([None, torch.float16, torch.float32, torch.float64]),
    "output_type": st.sampled_from(["pil", "np", "pt", "latent"]),
    "callback_on_step_end": st.sampled_from(["none", "nothing", "empty", "changes", "half", "stops"]),
    "callback_on_step_end_tensor_inputs": st.sampled_from([["latents"], ("latents",)]),
    "return_dict": st.booleans(),
}
CALLBACKS = {
    "none": None,
    "nothing": lambda pipeline, step, timestep, tensors: None,
    "empty": lambda pipeline, step, timestep, tensors: {},
    "changes": lambda pipeline, step, timestep, tensors: {"latents": tensors["latents"] * 0.5},
    "half": lambda pipeline, step, timestep, tensors: {"latents": tensors["latents"].clamp(-9, 9).half()},
    "stops": lambda pipeline, step, timestep, tensors: setattr(pipeline, "_interrupt", True),
}


def read(pipe, content, references, choices):
    """Arguments of the call, and the sizes (height, width) of the images that it must return."""

    def items(names):
        return [PICTURES[name] if isinstance(name, Picture) else name for name in names]

    sizes = []
    for names in zip(references, content, strict=True):
        pictures = [PICTURES[name] for name in sum(names, []) if isinstance(name, Picture)]
        resized = pipe.processor.image_processor.resize_for_latents(pictures[-1]) if pictures else None
        height, width = (resized.height, resized.width) if resized else (64, 64)
        sizes += [(choices["height"] or height, choices["width"] or width)] * choices["num_images_per_prompt"]
    count, tokens = len(sizes), max(height * width // 256 for height, width in sizes)
    arguments = {**choices, "callback_on_step_end": CALLBACKS[choices["callback_on_step_end"]]}
    arguments["prompt"] = [items(content_of_one) for content_of_one in content]
    arguments["image"] = [items(names) for names in references]
    each = [seed(index) for index in range(count)]
    arguments["generator"] = {"none": None, "one": seed(), "one each": each, "tuple": tuple(each)}[
        choices["generator"]
    ]
    if choices["latents"] is not None:
        arguments["latents"] = torch.randn(count, tokens, 16, generator=seed()).to(choices["latents"])
    return arguments, sizes


def assert_images(images, sizes, output_type):
    """The promised type, number and sizes, and numbers in their range."""
    assert len(images) == len(sizes)
    if output_type == "latent":
        assert images.dtype == torch.float32 and images.isfinite().all()
        assert images.shape[1:] == (max(height * width // 256 for height, width in sizes), 16)
        for latents, (height, width) in zip(images, sizes, strict=True):
            assert not latents[height * width // 256 :].any() and latents.any()
        return
    if output_type == "pil":
        assert isinstance(images, list) and {image.mode for image in images} == {"RGB"}
        assert [image.size[::-1] for image in images] == sizes
        return
    array = output_type == "np"
    assert isinstance(images, (np.ndarray if array else torch.Tensor) if len(set(sizes)) == 1 else list)
    for image, size in zip(images, sizes, strict=True):
        assert image.shape == ((*size, 3) if array else (3, *size))
        image = torch.as_tensor(image)
        assert image.dtype == torch.float32 and 0 <= image.min() and image.max() <= 1  # not so for NaN


@RUN
@given(call=prompts(), choices=st.fixed_dictionaries(WORKING))
def test_what_can_work_works(pipe, call, choices):
    arguments, sizes = read(pipe, *call, choices)
    given_latents = arguments["latents"] if arguments["latents"] is None else arguments["latents"].clone()
    output = pipe(**arguments)
    assert isinstance(output, Echo4oPipelineOutput if choices["return_dict"] else tuple)
    images, texts = output if isinstance(output, tuple) else (output.images, output.texts)
    assert_images(images, sizes, choices["output_type"])
    if choices["thinking"]:
        assert len(texts) == len(sizes) and all(isinstance(text, str) for text in texts)
    else:
        assert texts is None
    assert given_latents is None or torch.equal(arguments["latents"], given_latents)


def bad(message, **arguments):
    return arguments, message


def each(name, message, *values, **others):
    return [bad(message, **{name: value}, **others) for value in values]


NO_NUMBERS = (None, Fraction(7, 2), "1", NAN, INF, -INF, -1, -0.5, HUGE, True, [4.0], 1j, torch.tensor(4.0))
NO_COUNTS = (None, "3", 2.0, NAN, INF, True, [2], torch.tensor(2), 0, -1, -HUGE)
HOSTILE = [
    *each("prompt", "no prompt given", [], (), [[]], [[], "a"]),
    *each("prompt", "must hold text", "", " \n", ["a", ""], [RGB, ""]),
    *each(
        "prompt", "must be a string", None, 3, NAN, b"a", {"a": 1}, {"a"}, iter("a"), RGB, ["a", None], [["a", ["b"]]]
    ),
    *each("prompt", "surrogate", "\ud800", ["a", "b\udfff"]),
    *each("prompt", r"prompt \d needs \d+ positions", "a " * 200, ["a", "a " * 200]),
    *each("image", "needs 14. positions, of them 14. for references", [RGB] * 70, prompt="a"),
    *each("image", "image", 3, b"x", {"a": RGB}, {"a"}, iter([RGB]), NAN, 3.5, prompt="a"),
    *each("image", "expected a PIL image", [3], [[[RGB]]], [{}], prompt="a"),
    *each("image", "mixes lists and single images", [[RGB], RGB], prompt=["a", "b"]),
    *each("image", r"\d+ (lists of )?images for \d texts", [[RGB], [RGB]], prompt="a"),
    *each("image", r"\d+ (lists of )?images for \d texts", RGB, [], [RGB, RGB], [[RGB]], [[]] * 3, prompt=["a", "b"]),
    *each("image", "mode 'I;16'|mode 'I'|mode 'F'", DEEP, DEEP.convert("I"), DEEP.convert("F"), prompt="a"),
    *each("image", "does not decode", CLOSED, RGB.convert("RGBA").convert("La"), "\0", "\ud800", ".", prompt="a"),
    *each("image", "there is no image at 'nowhere.png'", "nowhere.png", ["nowhere.png"], prompt="a"),
    *each(
        "image", "must be uint8", COLOURS / 1, COLOURS > 9, COLOURS.astype(object), -torch.ones(3, 9, 9), prompt="a"
    ),
    *each("image", r"with 1, 3 or 4 channels, got \(", COLOURS[..., :2], COLOURS[None], COLOURS[:0], prompt="a"),
    *each("image", "has no content", Image.new("RGB", (0, 5)), Image.new("RGBA", (5, 0)), prompt="a"),
    *each("height", "height=.* must be a whole number", "64", 64.0, NAN, [64], torch.tensor(64)),
    *each(
        "height", "height=.* the nearest is (16|48|64)", 0, -16, 50, 80, 4096, HUGE, -HUGE, True, np.int64(2**63 - 1)
    ),
    *each("width", "width=.* must be a whole number", "64", 32.5, INF, (64,)),
    *each("width", "width=.* the nearest is (16|64)", 1, -1, 8, 10**9, False),
    *each("num_inference_steps", "num_inference_steps=.* must be", *NO_COUNTS, 1001, 10**12, HUGE),
    *each("num_images_per_prompt", "num_images_per_prompt=.* must be", *NO_COUNTS),
    *each("max_think_tokens", "max_think_tokens=.* must be", *NO_COUNTS, thinking=True),
    *each("guidance_scale", "guidance_scale=.* must be a number", *NO_NUMBERS, 1e30),
    *each("image_guidance_scale", "image_guidance_scale=.* must be a number", *NO_NUMBERS[1:], 1e30),
    *each("guidance_renorm_min", "guidance_renorm_min=.* must be a number", *NO_NUMBERS, 1.01),
    *each("guidance_interval", "guidance_interval=.* must be", (), (0,), (0, 1, 1), "01", 0.5, {0: 1, 1: 1}),
    *each("guidance_interval", "guidance_interval=.* must be", (1, 0), [0.9, 0.1], (NAN, 1), (0, INF), (-1, 1)),
    *each(
        "guidance_interval",
        "guidance_interval=.* must be",
        (0.4, 1000),
        (None, 1),
        ("0", "1"),
        (0, HUGE),
        (False, True),
    ),
    *each(
        "guidance_renorm", "guidance_renorm=.* is unknown", "local", "", 3, b"global", ["global"], np.array(["a", "b"])
    ),
    *each("thinking", "thinking=.* must be True or False", None, 1, "no", NAN),
    *each("return_dict", "return_dict=.* must be True or False", None, 0, "no"),
    *each("generator", "must be a torch.Generator", 3, "x", [3], np.random.default_rng(0), {0: seed()}),
    *each("generator", r"\d generators for \d images", [], (), [seed()] * 9),
    *each("latents", "latents must be a torch.Tensor", 3, "x", [[0.0]], np.zeros((1, 16, 16))),
    *each("latents", "latents have shape", torch.zeros(9, 16, 16), torch.zeros(16, 16), torch.zeros(()), prompt="a"),
    *each("latents", "latents have dtype", *(torch.ones(1, 16, 16).to(x) for x in (torch.int32, torch.bool))),
    *each("latents", "latents have dtype", torch.ones(1, 16, 16, dtype=torch.complex64)),
    *each("latents", "latents have dtype", torch.ones(1, 16, 16).to(torch.float8_e4m3fn)),
    *each("latents", "latents hold NaN", torch.full((1, 16, 16), NAN), torch.full((1, 16, 16), -INF)),
    *each("output_type", "output_type=.* is unknown", None, "PIL", "jpg", "", 3, ["pil"], np.array(["pil", "np"])),
    *each("callback_on_step_end", "callback_on_step_end=.* must be a function", 3, "x", {"latents": 1}),
    *each("callback_on_step_end_tensor_inputs", "must be a list of names", None, "latents", 3, {"latents": 1}),
    *each("callback_on_step_end_tensor_inputs", "callbacks get latents, not", ["noise"], [3], [None], [[]]),
]
FIXED = {"latents", "generator"}  # cases of these are for one image of 64x64


@pytest.fixture
def computed(pipe):
    """Parts of the models that ran."""
    parts = []
    for part in (pipe.model.get_input_embeddings(), pipe.model.llm2vae, pipe.vae.encoder, pipe.vae.decoder):
        part.register_forward_pre_hook(lambda module, inputs: parts.append(type(module).__name__))
    return parts


def test_each_hostile_value_is_refused(pipe, computed):
    for arguments, message in HOSTILE:
        with pytest.raises(ValueError, match=message):
            pipe(**{"prompt": "a cat", "num_inference_steps": 1, **arguments})
            pytest.fail(f"{arguments} was taken")
    assert not computed


@RUN
@given(choices=st.fixed_dictionaries(WORKING), cases=st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=3))
def test_hostile_values_among_others_are_refused(pipe, computed, choices, cases):
    arguments = {"prompt": "a cat", **choices, "generator": None, "latents": None, "callback_on_step_end": None}
    messages = [message for _, message in cases]
    if any({"latents", "generator"} & set(case) for case, _ in cases):  # whose cases are for one image of 64x64
        arguments |= {"height": 64, "width": 64, "num_images_per_prompt": 1}
        messages += ["latents have shape", "generators for"]  # if another case changes the number
    for case, _ in cases:
        arguments |= case
    with pytest.raises(ValueError, match="|".join(messages)):
        pipe(**arguments)
    assert not computed


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (3, "returned int, expected a dict of tensors or None"),
        ([], "returned list"),
        (torch.zeros(1, 16, 16), "returned Tensor"),
        ({"latent": torch.zeros(1, 16, 16)}, "returned latent; only latents can be changed"),
        ({"latents": None}, "latents that are None, expected floats"),
        ({"latents": np.zeros((1, 16, 16))}, "latents that are array"),
        ({"latents": torch.zeros(1)}, r"float32 of shape \(1,\), expected floats of shape \(1, 16, 16\)"),
        ({"latents": torch.zeros(1, 16, 16, dtype=torch.long)}, "latents that are torch.int64"),
        ({"latents": torch.full((1, 16, 16), NAN)}, "latents of image 0 are NaN or infinite from update 1 of 2 on"),
    ],
)
def test_wrong_things_from_callbacks(pipe, returned, message):
    with pytest.raises(ValueError, match=message):
        pipe("a cat", num_inference_steps=2, callback_on_step_end=lambda *arguments: returned)
