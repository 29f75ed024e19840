"""What saves memory gives the same pictures and answers; the error of too little memory says what to do."""

import os
import subprocess
import sys

import accelerate
import pytest
import skimage.data
import torch
from diffusers.quantizers import PipelineQuantizationConfig
from peft import LoraConfig
from PIL import Image
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available, is_kernels_available

from echo4o_hf.model.packages import NOT_QUANTIZED
from echo4o_hf.pipeline.memory import advice, is_out_of_memory
from echo4o_hf.pipeline.pipeline_echo4o import Echo4oPipeline
from echo4o_hf.pipeline.source import Source

CAT, ROCKET = Image.fromarray(skimage.data.chelsea()), Image.fromarray(skimage.data.rocket())
MODES = {
    "text to image": {},
    "references": {"image": [CAT, ROCKET]},
    "thinking": {"image": CAT, "thinking": True, "max_think_tokens": 3},
}


@pytest.fixture
def folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


def load(folder, **options):
    pipe = Echo4oPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def answers(pipe, device="cpu"):
    """Pixels of guided pictures in all modes, and logits of an answer to a question about a picture."""
    found = {}
    for mode, settings in MODES.items():
        noise = torch.Generator().manual_seed(0)
        images = pipe("a red cat", num_inference_steps=3, output_type="pt", generator=noise, **settings).images
        found[mode] = images[0]
    inputs = pipe.processor(text="a blue cat", images=[CAT], return_tensors="pt").to(device)
    with torch.no_grad():
        found["understanding"] = pipe.model(**inputs).logits
    return {mode: values.float().cpu() for mode, values in found.items()}


def assert_same(pipe, reference, atol=1e-4, device="cpu"):
    torch.testing.assert_close(answers(pipe, device), answers(reference), atol=atol, rtol=0)


def error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


# -------------------------------------------------------------------------------------------------------- attention


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_attentions_agree_in_all_modes(pipe, folder, attention):
    other = load(folder, attn_implementation=attention)
    config = other.model.config
    assert {config.text_config._attn_implementation, config.vision_config._attn_implementation} == {attention}
    assert pipe.model.config.text_config._attn_implementation == "sdpa"
    assert_same(other, pipe)


def flash_attention(module, query, key, value, mask, scaling, is_causal, **_):
    """Means what flash attention means: a mask names the real tokens; causal, the last query sees all keys."""
    (rows, _, length, _), keys = query.shape, key.shape[2]
    assert mask is None or mask.shape == (rows, keys)
    real = torch.ones(rows, keys, dtype=torch.bool) if mask is None else mask.bool()
    seen = real[:, None, None].expand(rows, 1, length, keys)
    if is_causal:
        seen = seen & torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, seen, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).nan_to_num(), None  # rows of padding see nothing


@pytest.mark.slow  # compiles
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_in_compiled_layers(pipe, folder):
    other = load(folder, attn_implementation="flex_attention")
    other.compile()
    assert_same(other, pipe)


def test_flash_attention_draws_and_answers(pipe, folder, monkeypatch):
    """What it has no mask for, prompts that mix segments, goes through sdpa; packs for training are refused."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash_attention)
    other = load(folder)
    other.model.config.text_config._attn_implementation = "flash_attention_2"
    questions = [pipe.processor(text="a", images=[CAT]), pipe.processor(text=["a", "a red cat"])]
    for settings in [*MODES.values(), {"prompt": ["a", "a longer red cat"]}, {"prompt": ["a", CAT, "cat"]}]:
        drawn = [
            each(
                **{"prompt": "a red cat", **settings},
                num_inference_steps=3,
                output_type="latent",
                generator=torch.Generator().manual_seed(0),
            ).images
            for each in (other, pipe)
        ]
        torch.testing.assert_close(*drawn, atol=1e-4, rtol=0)
    for inputs in questions:
        written = [each.model.generate(**inputs, max_new_tokens=6, do_sample=False) for each in (other, pipe)]
        assert torch.equal(*written)
    with pytest.raises(ValueError, match="cannot mix segments in one call; use flex_attention or sdpa"):
        other.model(**questions[0])


@pytest.mark.skipif(is_flash_attn_2_available() or is_kernels_available(), reason="there is a flash attention")
@pytest.mark.parametrize(
    ("attention", "package"), [("flash_attention_2", "flash-attn"), ("flash_attention_3", "flash-attn-3")]
)
def test_an_attention_that_is_not_installed(pipe, folder, attention, package):
    with pytest.raises(ImportError, match=f"Install {package}, or kernels"):
        load(folder, attn_implementation=attention)
    with pytest.raises(ImportError, match=f"Install {package}, or kernels"):
        pipe.set_attention_backend(attention)
    assert pipe.model.config.text_config._attn_implementation == "sdpa"


def test_an_attention_that_does_not_exist(folder):
    with pytest.raises(ValueError, match='"nonsense".*eager'):
        load(folder, attn_implementation="nonsense")


# ------------------------------------------------------------------------------------------- smaller numbers, offload


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_dtype(pipe, folder, dtype, tolerance):
    small = load(folder, dtype=dtype)
    assert {weight.dtype for part in (small.model, small.vae) for weight in part.parameters()} == {dtype}
    actual, expected = answers(small), answers(pipe)
    for mode in ("text to image", "understanding"):  # thinking may choose other words
        assert error(actual[mode], expected[mode]) < tolerance


def test_model_offload(pipe, folder):
    offloaded = load(folder)
    offloaded.enable_model_cpu_offload(device="cpu")
    assert_same(offloaded, pipe, atol=0)


def test_sequential_offload(pipe, folder):
    """As `enable_sequential_cpu_offload`, which knows no CPU: there, parts on the meta device fail if not brought."""
    offloaded = load(folder)
    for part in (offloaded.model, offloaded.vae):
        accelerate.cpu_offload(part, torch.device("cpu"))
    assert {weight.device.type for weight in offloaded.model.parameters()} == {"meta"}
    assert_same(offloaded, pipe, atol=0)


@pytest.mark.parametrize(
    "settings", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offload(pipe, folder, tmp_path, settings):
    """To disk, so that a part that is not brought has other values."""
    offloaded = load(folder)
    offloaded.enable_group_offload(torch.device("cpu"), offload_to_disk_path=str(tmp_path), **settings)
    assert len(list(tmp_path.glob("group_*.safetensors"))) > 10
    assert_same(offloaded, pipe, atol=0)


def save_adapter(folder, to):
    """An adapter of random weights."""
    other = load(folder)
    config = LoraConfig(r=2, target_modules=["o_proj_moe_gen", "q_proj"], init_lora_weights=False)
    other.model.add_adapter(config, "it")
    other.save_lora_weights(to, "it")
    return to


def layers_with_group_offload(pipe):
    return {
        name
        for name, module in pipe.model.named_modules()
        if (registry := getattr(module, "_diffusers_hook", None)) is not None and "group_offloading" in registry.hooks
    }


def test_adapters_after_group_offload(pipe, folder, tmp_path):
    offloaded = Source(str(folder), offload=True).load(Echo4oPipeline)
    before = layers_with_group_offload(offloaded)
    lora = save_adapter(folder, tmp_path / "lora")
    pipe.load_lora_weights(lora)
    offloaded.load_lora_weights(lora)
    offloaded.load_lora_weights(lora, adapter_name="twice")
    offloaded.delete_adapters("twice")
    parts = {name for name, module in offloaded.model.named_modules() if type(module) is torch.nn.Linear}
    assert {name for name in parts if "lora_" in name} and parts <= layers_with_group_offload(offloaded)
    offloaded.set_adapters("default_0")
    assert_same(offloaded, pipe, atol=0)
    first = Source(str(folder), offload=True, loras=((str(lora), 1.0),)).load(Echo4oPipeline)
    assert len(layers_with_group_offload(first)) == len(layers_with_group_offload(offloaded)) > len(before)
    assert_same(first, pipe, atol=0)
    offloaded.unload_lora_weights()
    pipe.unload_lora_weights()
    assert layers_with_group_offload(offloaded) == before
    assert_same(offloaded, pipe, atol=0)


def test_adapters_after_group_offload_to_disk(pipe, folder, tmp_path):
    offloaded = load(folder)
    offloaded.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "disk")
    )
    lora = save_adapter(folder, tmp_path / "lora")
    pipe.load_lora_weights(lora)
    offloaded.load_lora_weights(lora)
    assert_same(offloaded, pipe, atol=0)


@pytest.mark.parametrize("excluded", ["model", "vae"])
def test_what_is_on_disk_is_not_saved(folder, tmp_path, excluded):
    offloaded = load(folder)
    lora = save_adapter(folder, tmp_path / "lora")
    offloaded.enable_group_offload(
        torch.device("cpu"),
        offload_type="leaf_level",
        offload_to_disk_path=str(tmp_path / "disk"),
        exclude_modules=[excluded],
    )
    with pytest.raises(ValueError, match=r"are on disk.*without offload_to_disk_path"):
        offloaded.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    if excluded == "vae":
        offloaded.load_lora_weights(lora)
        with pytest.raises(ValueError, match="BagelForConditionalGeneration are on disk"):
            offloaded.fuse_lora()


def test_device_map(pipe, folder, tmp_path):
    assert_same(load(folder, device_map="auto"), pipe, atol=0)
    half = sum(weight.nbytes for weight in pipe.model.parameters()) // 2
    offloaded = load(folder, device_map="auto", max_memory={"cpu": half}, offload_folder=tmp_path / "offload")
    places = set(offloaded.model.hf_device_map.values())
    assert places == {"cpu", "disk"} and offloaded.vae.device.type == "cpu"
    assert_same(offloaded, pipe, atol=0)


def test_all_on_disk(pipe, folder, tmp_path):
    offloaded = load(folder, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    assert offloaded.model.device.type == "meta" and offloaded.vae.device.type == "cpu"
    assert_same(offloaded, pipe, atol=0)


def test_vae_in_slices_and_tiles(pipe, folder):
    sliced = load(folder)
    sliced.vae.enable_slicing()
    assert_same(sliced, pipe, atol=0)

    tiled = load(folder)
    tiled.vae.enable_tiling()
    tiled.vae.tile_sample_min_size, tiled.vae.tile_latent_min_size = 32, 4
    sizes = []
    tiled.vae.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    actual, expected = answers(tiled), answers(pipe)
    assert max(sizes) == (4, 4)
    for mode in MODES:
        assert actual[mode].shape == expected[mode].shape
        assert 0 < error(actual[mode], expected[mode]) < 0.5  # each tile has norms of its own


# ----------------------------------------------------------------------------------------------------- quantization


def quantization(kind, **options):
    if kind == "torchao 8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), **options)
    if kind == "diffusers 4":
        settings = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
        return PipelineQuantizationConfig("bitsandbytes_4bit", settings, ["model"])
    if kind == "4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **options)
    return BitsAndBytesConfig(load_in_8bit=True, **options)


def quantized_layers(model):
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and (type(module) is not torch.nn.Linear or type(module.weight) is not torch.nn.Parameter)
    }


@pytest.mark.parametrize(("kind", "tolerance"), [("4", 0.6), ("diffusers 4", 0.6), ("8", 0.05), ("torchao 8", 0.05)])
def test_quantized(pipe, folder, kind, tolerance):
    pytest.importorskip("torchao" if "torchao" in kind else "bitsandbytes")
    small = load(folder, dtype=torch.float32, quantization_config=quantization(kind))
    layers = quantized_layers(small.model)
    assert len(layers) == 2 * 2 * 7 and not any(name.startswith(NOT_QUANTIZED) for name in layers)
    actual, expected = answers(small), answers(pipe)
    for mode in ("text to image", "understanding"):
        assert 0 < error(actual[mode], expected[mode]) < tolerance


def test_layers_that_are_not_to_be_quantized_are_added_to_ours(folder):
    pytest.importorskip("bitsandbytes")
    mine = quantization("8", llm_int8_skip_modules=["language_model.model.layers.0"])
    small = load(folder, quantization_config=mine)
    assert len(quantized_layers(small.model)) == 2 * 7
    assert mine.llm_int8_skip_modules == ["language_model.model.layers.0"]  # not changed
    as_json = load(folder, quantization_config=mine.to_dict())
    assert quantized_layers(as_json.model) == quantized_layers(small.model)


# --------------------------------------------------------------------------------------------------- out of memory

LITTLE_MEMORY = """
import resource, sys, torch
torch.set_num_threads(1)
from echo4o_hf import Echo4oPipeline

def limit(megabytes):
    (size,) = [int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize")]
    resource.setrlimit(resource.RLIMIT_AS, (size + megabytes * 1_000_000, resource.RLIM_INFINITY))
"""


COMMAND = """
import echo4o_hf.pipeline.samples  # what it imports
from echo4o_hf.cli import main
limit(250)
sys.exit(main(sys.argv[1:]))
"""


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY + code, *map(str, arguments)],
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # or each thread reserves much that it does not use
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_out_of_memory_says_what_needs_less(folder):
    done = run(
        """
pipe = Echo4oPipeline.from_pretrained(sys.argv[1])
limit(40)
try:
    pipe("a red cat", num_images_per_prompt=4_000, num_inference_steps=2)
except RuntimeError as error:
    print(type(error).__name__, "allocate memory" in str(error), *error.__notes__)
pipe("a red cat", num_inference_steps=2)  # goes on
""",
        folder,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("RuntimeError True What needs less memory: fewer images in a call; smaller ones")
    assert "dtype=torch.bfloat16" in done.stdout and "quantization_config" in done.stdout
    assert "(--dtype bfloat16)" in done.stdout and "(--quantize 8bit, --quantize 4bit)" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_the_command_says_it_in_its_line(folder, tmp_path):
    arguments = ["generate", "a red cat", "--seeds", "0-19999", "--batch-size", "20000", "--dtype", "bfloat16"]
    done = run(COMMAND, *arguments, "--model", folder, "-o", tmp_path / "cats")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("echo4o: error: out of memory: ")]
    assert "What needs less memory: fewer images in a call" in line and "dtype=" not in line


def test_advice_names_what_is_not_in_use_yet(pipe):
    assert "dtype=torch.bfloat16" in advice(pipe, "__call__") and "offload" not in advice(pipe, "__call__")
    assert "pipe.vae.enable_tiling()" in advice(pipe, "decode_latents")
    assert "images" not in advice(pipe, "to")
    pipe.vae.enable_tiling()
    pipe.to(torch.bfloat16)
    text = advice(pipe, "decode_latents")
    assert "tiling" not in text and "bfloat16" not in text


def test_errors_that_are_not_about_memory_get_no_advice(pipe):
    with pytest.raises(ValueError) as raised:
        pipe("a cat", height=7)
    assert not hasattr(raised.value, "__notes__")
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(RuntimeError("std::bad_alloc"))
    assert not is_out_of_memory(RuntimeError("a shape is wrong"))


# --------------------------------------------------------------------------------------------------------- on a GPU

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
GROUPS = {"leaf_level": {}, "block_level": {"num_blocks_per_group": 1}}


class TestOnGpu:
    pytestmark = on_gpu

    def test_attentions_agree_with_flex_attention(self, pipe, folder):
        other = load(folder, attn_implementation="flex_attention").to("cuda")
        assert_same(other, pipe, atol=1e-2, device="cuda")

    def test_model_offload(self, pipe, folder):
        offloaded = load(folder)
        offloaded.enable_model_cpu_offload()
        assert_same(offloaded, pipe, atol=1e-2, device="cuda")
        assert offloaded.model.device.type == "cpu"

    def test_sequential_offload(self, pipe, folder):
        offloaded = load(folder)
        offloaded.enable_sequential_cpu_offload()
        assert_same(offloaded, pipe, atol=1e-2, device="cuda")

    @pytest.mark.parametrize("use_stream", [False, True])
    @pytest.mark.parametrize("offload_type", GROUPS)
    def test_group_offload(self, pipe, folder, offload_type, use_stream):
        offloaded = load(folder)
        offloaded.enable_group_offload(
            torch.device("cuda"), offload_type=offload_type, use_stream=use_stream, **GROUPS[offload_type]
        )
        assert "enable_group_offload" not in advice(offloaded, "__call__")
        assert_same(offloaded, pipe, atol=1e-2, device="cuda")

    def test_adapters_after_group_offload(self, pipe, folder, tmp_path):
        offloaded = Source(str(folder), device="cuda", offload=True).load(Echo4oPipeline)
        lora = save_adapter(folder, tmp_path / "lora")
        pipe.load_lora_weights(lora)
        offloaded.load_lora_weights(lora)
        assert_same(offloaded, pipe, atol=1e-2, device="cuda")
        offloaded.unload_lora_weights()
        pipe.unload_lora_weights()
        assert_same(offloaded, pipe, atol=1e-2, device="cuda")

    def test_device_map(self, pipe, folder):
        parts = load(folder, device_map="auto", max_memory={0: 60_000, "cpu": "1GiB"})
        assert {0, "cpu"} <= set(parts.model.hf_device_map.values()) and parts.vae.device.type == "cuda"
        assert_same(parts, pipe, atol=1e-2, device="cuda")

    @pytest.mark.parametrize(("kind", "tolerance"), [("4", 0.6), ("8", 0.05), ("torchao 8", 0.05)])
    def test_quantized(self, pipe, folder, kind, tolerance):
        pytest.importorskip("torchao" if "torchao" in kind else "bitsandbytes")
        small = load(folder, dtype=torch.bfloat16, quantization_config=quantization(kind), device_map="cuda")
        actual, expected = answers(small, "cuda"), answers(pipe)
        for mode in ("text to image", "understanding"):
            assert 0 < error(actual[mode], expected[mode]) < tolerance

    def test_out_of_memory(self, pipe):
        pipe.to("cuda")
        free = torch.cuda.mem_get_info()[0]
        with pytest.raises(torch.OutOfMemoryError) as raised:
            pipe("a red cat", num_images_per_prompt=free // 20_000)
        (note,) = raised.value.__notes__
        assert "enable_group_offload" in note
