"""The scripts of benchmark/ run at tiny size, and count the arithmetic that the model does."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from echo4o_hf.model.configuration_bagel import BagelConfig
from echo4o_hf.model.context import Context

BENCHMARK = Path(__file__).parents[1] / "benchmark"


@pytest.fixture
def script(monkeypatch):
    """Function (name) -> the script as a module; torch's threads are put back afterwards."""
    monkeypatch.syspath_prepend(BENCHMARK)
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


def test_inference_prints_ratios_to_bare_products(script, capsys):
    script("inference").main(["--tiny", "--repeats", "2", "--threads", "1"])
    printed = capsys.readouterr().out
    for name in ("image", "training step"):
        (row,) = re.findall(rf"^\| {name} \| (.+) \|$", printed, re.MULTILINE)
        _, seconds, median, bare, bare_median, ratio, ratio_median = map(float, row.split(" | "))
        assert 0 < seconds <= median and 0 < bare <= bare_median
        assert ratio == pytest.approx(seconds / bare, rel=0.02)
        assert ratio_median == pytest.approx(median / bare_median, rel=0.02)


def test_the_image_is_41_evaluations(script):
    inference, random_model = script("inference"), script("random_model")
    size = inference.FULL
    config = random_model.small_config(32, 1, 2, 1, 16, max_latent_size=size.side)
    pipe = random_model.make_pipeline(config, vae_channels=(8, 8, 8, 8), vae_layers=1)
    shapes = []
    layer = pipe.model.language_model.model.layers[0]
    layer.register_forward_pre_hook(lambda _, streams: shapes.append([x.shape[:2] for x in streams]))
    inference.draw(pipe, size)()
    assert shapes == [[(1, 24), (1, 0)]] + [[(2, 2), (2, 256)]] * 20


def test_products_are_those_of_the_model(script):
    inference, random_model = script("inference"), script("random_model")
    size = inference.Size(model=(256, 2, 4, 2, 320), side=6, prompt=11, updates=1, images=2, answer=7)
    config = random_model.small_config(*size.model, max_latent_size=size.side)
    model = random_model.make_pipeline(config, vae_channels=(8, 8, 8, 8), vae_layers=1).model
    model.set_attn_implementation("eager")
    embedder = 2 * (256 * 256 + 256 * 256)
    latents = torch.randn(1, 36, config.latent_dim)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        block = model.prepare_noisy_block([Context.empty(1)], [(6, 6)])
        model.predict_velocity(latents, torch.ones(1), block)
    needed = random_model.forward_products(config, 2, 36, [(38, 38)])
    assert counter.get_total_flops() == random_model.flops(needed) + embedder

    batch = random_model.training_pack(config, size.images, size.prompt, size.side, size.answer)
    tokens = 2 * (11 + 2 + 36) + 11 + 7
    assert batch["segment_ids"].shape == (1, tokens)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**batch)
    dense = random_model.forward_products(config, tokens - 72, 72, [(tokens, tokens)], logits=6)
    assert counter.get_total_flops() == random_model.flops(dense) + 72 * embedder

    forward = random_model.forward_products(config, tokens - 72, 72, [(38, 49), (11, 6)] * 2 + [(11, 6), (7, 15)], 6)
    assert random_model.flops(inference.training_products(config, size)) == 3 * random_model.flops(forward)


def test_products_of_the_published_sizes(script):
    random_model = script("random_model")
    products = random_model.forward_products(BagelConfig(), 2, 4096, [(4098, 4098 + 64)])
    assert random_model.flops(products) == pytest.approx(60.4e12, rel=0.005)


def test_data_loading_prints_ratios_and_memory(script, capsys):
    data_loading = script("data_loading")
    data_loading.main(["--tiny", "--repeats", "1"])
    rows = [row.split(" | ") for row in re.findall(r"^\| (.+) \|$", capsys.readouterr().out, re.MULTILINE)]
    speed = {name: figures for name, *figures in rows if len(figures) == 6}
    bare = {"built Parquet, loaded": "PIL", "built Parquet, streamed": "PIL", "tar.gz, streamed": "tarfile + PIL"}
    for name, reference in bare.items():
        best, median, megabytes, named, ratio, _ = speed[name]
        assert named == reference and best == median  # of one repetition
        assert float(ratio) == pytest.approx(float(best) / float(speed[reference][0]), rel=0.02)
        assert float(megabytes) > 0
    memory = {name: figures for name, *figures in rows if name in data_loading.MEMORY and len(figures) == 2}
    assert memory.keys() == data_loading.MEMORY.keys()


def test_own_memory_counts_what_a_process_holds(script):
    data_loading = script("data_loading")
    before = data_loading.own_memory()
    held = b"x" * 50_000_000
    assert data_loading.own_memory() - before == pytest.approx(len(held), rel=0.1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gpu_measures_every_section(script, tmp_path, capsys, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    output = tmp_path / "gpu.jsonl"
    assert script("gpu").main(["--tiny", "--device", device, "--output", str(output)]) == 0
    lines = output.read_text().splitlines()
    assert lines == capsys.readouterr().out.splitlines()
    records = [json.loads(line) for line in lines]
    sections = ["load", "image", "train", "train-flex", "image-compiled"]
    assert list(dict.fromkeys(record["section"] for record in records)) == sections
    figures = {"image": "seconds", "image-compiled": "graphs", "train": "tokens_per_second"}
    for section, figure in figures.items():
        assert all(record[figure] > 0 for record in records if record["section"] == section)


def test_gpu_goes_on_after_a_section_that_fails_or_takes_too_long(script, tmp_path, monkeypatch):
    gpu = script("gpu")

    def fail(pipe, size):
        yield {"seconds": 1.0}
        raise RuntimeError("out of memory")

    def hang(pipe, size):
        while True:
            yield {"seconds": 2.0}

    monkeypatch.setattr(gpu, "SECTIONS", {"fails": fail, "hangs": hang, "train": gpu.SECTIONS["train"]})
    reports = []
    pipe, _ = gpu.load(gpu.tiny_size(), torch.device("cpu"))
    done = [
        gpu.run_section(name, pipe, gpu.tiny_size(), seconds, reports.append)
        for name, seconds in {"fails": 60, "hangs": 0.2, "train": 600}.items()
    ]
    assert done == [False, False, True]
    assert {"section": "fails", "error": "RuntimeError: out of memory"} in reports
    assert any("TimeoutError: not done after" in record.get("error", "") for record in reports)
    trained = {name for name, parameter in pipe.model.named_parameters() if parameter.requires_grad}
    assert "language_model.model.layers.0.mlp_moe_gen.up_proj.weight" in trained
    assert "language_model.model.layers.0.mlp.up_proj.weight" not in trained
