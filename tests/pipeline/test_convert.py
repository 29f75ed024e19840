import logging
import logging.handlers
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

import echo4o_hf
from echo4o_hf.model.checkpoint import write_official
from echo4o_hf.pipeline.convert import convert
from echo4o_hf.pipeline.pipeline_echo4o import Echo4oPipeline

GOLDEN = Path(__file__).parents[2] / "../shared/reference/golden_a"


@pytest.fixture
def official(pipe, tmp_path):
    vae = AutoencoderKL.from_config(pipe.vae.config, use_quant_conv=False, use_post_quant_conv=False)
    write_official({**pipe.components, "vae": vae}, tmp_path / "official")
    return tmp_path / "official"


def assert_same_tensors(first, second):
    first, second = load_file(first), load_file(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_there_and_back(official, tmp_path):
    convert(official, tmp_path / "ours")
    assert {entry.name for entry in (tmp_path / "ours").iterdir()} == {
        "model_index.json",
        "model",
        "vae",
        "scheduler",
        "processor",
    }
    convert(tmp_path / "ours", tmp_path / "back", to="official")
    for file in ("ema.safetensors", "ae.safetensors"):
        assert_same_tensors(official / file, tmp_path / "back" / file)
    for file in ("config.json", "llm_config.json", "vit_config.json", "tokenizer.json"):
        assert (official / file).read_text() == (tmp_path / "back" / file).read_text()


def test_converted_pipeline_draws_the_same_picture(official, tmp_path):
    convert(official, tmp_path / "ours")
    images = [
        Echo4oPipeline.from_pretrained(folder)(
            "a red cat",
            height=64,
            width=64,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        for folder in (official, tmp_path / "ours")
    ]
    assert torch.equal(*images)


def test_dtype(official, tmp_path):
    convert(official, tmp_path / "ours", dtype=torch.bfloat16)
    pipe = Echo4oPipeline.from_pretrained(tmp_path / "ours")
    assert {pipe.model.dtype, pipe.vae.dtype} == {torch.bfloat16}


def test_casting_warns_of_nothing(pipe):
    handler = logging.handlers.BufferingHandler(1000)
    logging.getLogger("diffusers").addHandler(handler)
    try:
        pipe.to(torch.bfloat16).to("cpu", torch.float32)
        pipe.vae._keep_in_fp32_modules = ["decoder"]
        pipe.to(torch.bfloat16)
    finally:
        logging.getLogger("diffusers").removeHandler(handler)
    (message,) = (record.getMessage() for record in handler.buffer)
    assert "kept in float32: ['decoder']" in message


def test_nothing_is_left_of_a_conversion_that_fails(official, tmp_path):
    (official / "ae.safetensors").write_bytes((official / "ae.safetensors").read_bytes()[:-1])
    with pytest.raises(OSError, match=r"ae.safetensors .* is truncated"):
        convert(official, tmp_path / "ours")
    assert [entry.name for entry in tmp_path.iterdir()] == ["official"]


def test_full_folders_and_unknown_layouts_are_refused(official, tmp_path):
    with pytest.raises(ValueError, match="not an empty folder"):
        convert("not/even looked at", official)
    with pytest.raises(ValueError, match="to='theirs' is no layout; choose one of ours, official"):
        convert(official, tmp_path / "ours", to="theirs")


@pytest.mark.parametrize("file", ["model/model.safetensors", "vae/diffusion_pytorch_model.safetensors"])
def test_damaged_files_of_a_saved_pipeline(official, tmp_path, file):
    convert(official, tmp_path / "ours")
    damaged = tmp_path / "ours" / file
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(OSError, match=rf"{file} .* is truncated"):
        Echo4oPipeline.from_pretrained(tmp_path / "ours")
    damaged.unlink()
    with pytest.raises(FileNotFoundError, match=damaged.name):
        Echo4oPipeline.from_pretrained(tmp_path / "ours")


def test_saved_parts_that_do_not_fit(official, tmp_path):
    convert(official, tmp_path / "ours")
    file = tmp_path / "ours" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    bias = tensors.pop("decoder.conv_out.bias")
    for wrong, message in (
        ({}, r"1 missing \(decoder.conv_out.bias\)"),
        ({"decoder.conv_out.bias": bias, "extra": bias.clone()}, r"1 unexpected \(extra\)"),
        ({"decoder.conv_out.bias": torch.zeros(5)}, r"decoder.conv_out.bias \(5,\) instead of \(3,\)"),
    ):
        save_file({**tensors, **wrong}, file)
        with pytest.raises(ValueError, match=rf"the tensors of .*ours/vae do not fit .*{message}"):
            Echo4oPipeline.from_pretrained(tmp_path / "ours")
    save_file({"decoder.conv_out.bias": bias}, file)
    with pytest.raises(ValueError, match=r"has no tensor 'decoder.conv_in.weight'"):
        Echo4oPipeline.from_pretrained(tmp_path / "ours")


def test_parts_of_different_checkpoints(pipe):
    pipe.processor.start_of_image_token_id = 9
    with pytest.raises(ValueError, match=r"the processor has .*'start_of_image_token_id': 9, .* do not go together"):
        Echo4oPipeline(**pipe.components)
    pipe.processor.start_of_image_token_id = pipe.model.config.start_of_image_token_id
    pipe.vae.register_to_config(scaling_factor=0.0)
    with pytest.raises(ValueError, match=r"scaling_factor must be positive, got 0.0"):
        Echo4oPipeline(**pipe.components)


def test_what_is_saved_in_shards_is_read_and_what_would_not_be_read_is_not_written(pipe, tmp_path):
    pipe.to(torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards" / "vae").glob("*.safetensors"))) > 1
    loaded = Echo4oPipeline.from_pretrained(tmp_path / "shards", use_safetensors=True)
    for name in ("model", "vae"):
        expected, tensors = getattr(pipe, name).state_dict(), getattr(loaded, name).state_dict()
        assert all(torch.equal(expected[key], tensors[key]) for key in expected)
    assert loaded.vae.dtype == torch.bfloat16

    for options in ({"variant": "fp16"}, {"safe_serialization": False}):
        with pytest.raises(ValueError, match="files that from_pretrained does not read"):
            pipe.save_pretrained(tmp_path / "other", **options)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="weights are read from safetensors files only"):
        Echo4oPipeline.from_pretrained(tmp_path / "shards", use_safetensors=False)


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"reference numbers are not at {GOLDEN}")
def test_reference_there_and_back(tmp_path):
    convert(GOLDEN, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="official")
    for file in ("ema.safetensors", "ae.safetensors"):
        assert_same_tensors(GOLDEN / file, tmp_path / "back" / file)


PEAK = """
import re, sys
from echo4o_hf.pipeline.convert import convert

def peak():  # ru_maxrss would count the parent process too
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

convert(sys.argv[1], sys.argv[2] + "/small")
before = peak()
convert(sys.argv[3], sys.argv[2] + "/large", to=sys.argv[4])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("to", ["ours", "official"])
def test_conversion_holds_one_copy(pipe, official, tmp_path, to):
    pipe.model.resize_token_embeddings(1_200_000)  # 2 x 154 MB
    large = tmp_path / "large_official"
    vae = AutoencoderKL.from_config(pipe.vae.config, use_quant_conv=False, use_post_quant_conv=False)
    write_official({**pipe.components, "vae": vae}, large)
    size = (large / "ema.safetensors").stat().st_size
    environment = {**os.environ, "PYTHONPATH": str(Path(echo4o_hf.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PEAK, official, tmp_path, large, to]
    peak = int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert 300e6 < size and 0.5 * size < peak < 1.15 * size, f"{peak / size:.2f} x the file"
