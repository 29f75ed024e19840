"""The scripts of benchmark/ run at tiny size, and count the arithmetic that the model does."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from echo4o_hf.model.configuration_bagel import BagelConfig
from echo4o_hf.model.context import Context
from echo4o_hf.model.packing import IGNORE, Segment, collate

BENCHMARK = Path(__file__).parents[1] / "benchmark"


@pytest.fixture
def script(monkeypatch):
    """Function (name) -> the script as a module; torch's threads are put back afterwards."""
    monkeypatch.syspath_prepend(BENCHMARK)
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


def test_inference_prints_ratios_to_bare_products(script, capsys):
    script("inference").main(["--tiny", "--repeats", "2", "--threads", "1", "--batch-sizes", "2"])
    printed = capsys.readouterr().out
    ways = ["image, plain", "image, packed", "2 images, packed", "image, compiled", "2 images, compiled"]
    ways += [f"{what}, {way}, cached" for what in ("image", "2 images") for way in ("packed", "compiled")]
    for name in (*ways, "training step"):
        (row,) = re.findall(rf"^\| {name} \| (.+) \|$", printed, re.MULTILINE)
        _, seconds, median, bare, bare_median, ratio, ratio_median = map(float, row.split(" | "))
        assert 0 < seconds <= median and 0 < bare <= bare_median
        assert ratio == pytest.approx(seconds / bare, rel=0.02)
        assert ratio_median == pytest.approx(median / bare_median, rel=0.02)


def test_caching_prints_speed_and_quality(script, capsys):
    caching = script("caching")
    caching.main(["--tiny", "--updates", "6", "--repeats", "2", "--threads", "1"])
    rows = [row.split(" | ") for row in re.findall(r"^\| (\w.+) \|$", capsys.readouterr().out, re.MULTILINE)]
    quality = {name: list(map(float, figures)) for name, *figures in rows if len(figures) == 6}
    evaluations = {name: figures[0] for name, figures in quality.items()}
    assert evaluations["6 updates, exact"] == 11 and evaluations["interval 2"] == 6 == evaluations["3 updates, exact"]
    assert quality["6 updates, exact"] == [11, 1, quality["6 updates, exact"][2], 0, 0, float("inf")]
    for name, (_, faster, score, changed, distance, psnr) in quality.items():
        assert faster > 0 and 0 <= score <= 1 and 0 <= changed <= 2
        assert (distance > 0 and 0 < psnr < 100) or name == "6 updates, exact"

    speed = {name: figures for name, *figures in rows if len(figures) == 5}
    assert [float(figures[0]) for figures in speed.values()] == [8, 4, 4, 4]
    for _, least, median, faster, quartiles in speed.values():
        low, high = map(float, quartiles.split(" to "))
        assert 0 < float(least) <= float(median) and low <= float(faster) <= high


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


def test_the_plain_path_draws_the_same_image(script):
    inference, random_model = script("inference"), script("random_model")
    config = random_model.small_config(*inference.TINY.model, max_latent_size=inference.TINY.side)
    pipe = random_model.make_pipeline(config, vae_channels=(8, 8, 8, 8), vae_layers=1)
    drawn = []
    for run in (inference.draw(pipe, inference.TINY), inference.draw_plain(pipe, inference.TINY)):
        torch.manual_seed(0)
        drawn.append(run())
    torch.testing.assert_close(drawn[0].images, drawn[1])


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
    sections = ["load", "image", "image-profile", "image-cached", "train", "train-flex", "image-compiled"]
    assert list(dict.fromkeys(record["section"] for record in records)) == sections
    figures = {
        "image": "seconds",
        "image-profile": "share",
        "image-cached": "seconds",
        "image-compiled": "graphs",
        "train": "tokens_per_second",
    }
    for section, figure in figures.items():
        assert all(record[figure] > 0 for record in records if record["section"] == section)


def test_gpu_goes_on_after_a_section_that_fails_or_takes_too_long(script):
    gpu = script("gpu")

    def fail(pipe, size):
        yield {"seconds": 1.0}
        raise RuntimeError("out of memory")

    def hang(pipe, size):
        while True:
            yield {"seconds": 2.0}

    sections = {"fails": fail, "hangs": hang, "train": gpu.SECTIONS["train"]}
    reports = []
    pipe, _ = gpu.load(gpu.tiny_size(), torch.device("cpu"))
    done = [
        gpu.run_section(name, section, pipe, gpu.tiny_size(), seconds, reports.append)
        for (name, section), seconds in zip(sections.items(), (60, 0.2, 600), strict=True)
    ]
    assert done == [False, False, True]
    assert {"section": "fails", "error": "RuntimeError: out of memory"} in reports
    assert any("TimeoutError: not done after" in record.get("error", "") for record in reports)
    trained = {name for name, parameter in pipe.model.named_parameters() if parameter.requires_grad}
    assert "language_model.model.layers.0.mlp_moe_gen.up_proj.weight" in trained
    assert "language_model.model.layers.0.mlp.up_proj.weight" not in trained


def test_products_of_a_pack_are_those_of_its_samples(script):
    inference, random_model = script("inference"), script("random_model")
    size = inference.FULL
    config = random_model.small_config(*size.model, max_latent_size=size.side)
    batch = random_model.training_pack(config, size.images, size.prompt, size.side, size.answer)
    assert random_model.pack_products(config, batch) == inference.training_products(config, size)

    markers = [config.start_of_image_token_id, config.end_of_image_token_id]
    reference = Segment("latents", markers, latents=torch.zeros(6, config.latent_dim), grid=(2, 3))
    target = Segment("target", markers, latents=torch.zeros(4, config.latent_dim), grid=(2, 2))
    batch = collate([[reference, Segment("text", [5] * 5), target, target]], packed=True)
    forward = random_model.forward_products(config, 11, 14, [(8, 8), (5, 8 + 3), (6, 6 + 13), (6, 6 + 13)])
    expected = forward + random_model.backward_products(forward)
    assert random_model.flops(random_model.pack_products(config, batch)) == random_model.flops(expected)


@pytest.mark.parametrize("method", ["full", "generation", "lora"])
def test_products_of_each_method_are_about_those_of_the_model(script, method):
    """The model saves a few gradients of inputs in its first layer, and of markers in its last one."""
    random_model, training = script("random_model"), script("training")
    config = random_model.small_config(256, 6, 4, 2, 320, max_latent_size=6)
    pipe = random_model.make_pipeline(config, vae_channels=(8, 8, 8, 8), vae_layers=1)
    pipe.model.set_attn_implementation("eager")
    markers = [config.start_of_image_token_id, config.end_of_image_token_id]
    target = Segment("target", markers, latents=torch.randn(36, config.latent_dim), grid=(6, 6))
    batch = collate([[target]], packed=True)
    batch["shift_labels"] = torch.full_like(batch["input_ids"], IGNORE)
    model = training.make_model(pipe, method)
    with FlopCounterMode(display=False) as counter:
        training.train(model, batch)()
    embedder = 36 * 2 * (256 * 256 + 256 * 256) * (1 if method == "lora" else 3)
    needed = random_model.flops(random_model.pack_products(config, batch, method))
    assert needed == pytest.approx(counter.get_total_flops() - embedder, rel=0.06)


def test_training_prints_speed_packs_and_what_the_cache_changes(script, capsys):
    assert script("training").main(["--tiny", "--threads", "1", "--repeats", "1"]) == 0
    tables = [table.splitlines()[2:] for table in re.findall(r"^\|(?:.+\n)+", capsys.readouterr().out, re.MULTILINE)]
    cells = [[[cell.strip() for cell in row.strip("|").split("|")] for row in rows] for rows in tables]
    steps, published, smaller, data = cells
    for method, gflop, best, median, seconds, bare, ratio, least in steps:
        assert method in ("full", "generation", "lora") and float(gflop) > 0 and float(least) > 0
        assert float(best) == pytest.approx(float(median))  # of one repetition
        assert float(ratio) == pytest.approx(float(seconds) / float(bare), rel=0.02)
    assert [row[0] for row in steps] == ["full", "generation", "lora"]
    assert published[0][:2] == ["100", "30720"] and 0.9 < float(published[0][4]) <= 1
    assert float(smaller[0][2]) <= float(smaller[0][1]) <= 1 and float(smaller[0][3]) == 1
    for (_, loading, vae, step, total, share, _), cached in zip(data, (False, True), strict=True):
        assert float(total) == pytest.approx(float(loading) + float(vae) + float(step), rel=0.02)
        assert float(share) == pytest.approx(float(loading) / float(total), rel=0.02)
        assert (float(vae) < 1e-3) == cached
    assert float(data[1][6]) == pytest.approx(float(data[0][4]) / float(data[1][4]), rel=0.02)


def test_training_needs_gpu_for_the_options_of_gpu(script, capsys):
    with pytest.raises(SystemExit):
        script("training").main(["--tiny", "--sections", "lora"])
    assert "--sections goes with --gpu" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_training_on_a_gpu_measures_every_section(script, tmp_path, capsys, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    output = tmp_path / "training.jsonl"
    assert script("training").main(["--gpu", "--tiny", "--device", device, "--output", str(output)]) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    sections = ["load", "latents", "lora", "lora-uncached", "generation"]
    assert list(dict.fromkeys(record["section"] for record in records)) == sections
    assert records[1]["pictures"] > 0 and records[1]["pictures_per_second"] > 0
    for section in sections[2:]:
        steps = [record for record in records if record["section"] == section]
        assert [record["warm_up"] for record in steps][:3] == [True, True, False]
        for record in steps:
            assert 0 < record["seconds_waiting"] < record["seconds"] and record["mfu"] > 0
            assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["seconds"], rel=1e-3)
    trained = {section: [r["tokens"] for r in records if r["section"] == section] for section in sections[2:4]}
    assert trained["lora"] == trained["lora-uncached"]


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads memory as Linux tells it")


@on_linux
def test_loading_takes_little_more_than_the_checkpoint(script, tmp_path):
    loading = script("loading")
    config = loading.config_of(1e8, torch.bfloat16, hidden=256)
    size = loading.write(tmp_path / "checkpoint", config, torch.bfloat16, "official")
    assert size == pytest.approx(1e8, rel=0.1)
    peaks = loading.peak_of_loading(tmp_path / "checkpoint", None)
    assert peaks["own"] < 1.15 * size + 60e6  # modules, caches and threads, which do not grow with the checkpoint


@on_linux
@pytest.mark.slow
def test_loading_prints_ratios(script, capsys):
    assert script("loading").main(["--gigabytes", "1"]) == 0  # no ratio above the limit
    rows = [
        row.split(" | ")
        for row in re.findall(r"^\| (\w+ \| \w+ \| \w+ \| [0-9.].+) \|$", capsys.readouterr().out, re.M)
    ]
    assert [row[0] for row in rows] == ["official"] * 3 + ["ours"] * 3
    for row in rows:
        size, own, ratio = map(float, row[3:6])
        assert size == pytest.approx(1, rel=0.1) and ratio == pytest.approx(own / size, abs=0.02)


def test_memory_table_counts_what_is_held(script, capsys):
    memory_table = script("memory_table")
    memory_table.main(["--tiny"])
    rows = [row.split(" | ") for row in re.findall(r"^\| (.+) \|$", capsys.readouterr().out, re.MULTILINE)]
    assert rows[0][2:] == [task.name for task in memory_table.TASKS]
    assert [row[0] for row in rows[1::2]] == ["bf16", "bf16, group offload", "8 bits", "4 bits"]

    def hold():
        first = torch.empty(1000, device="meta")
        second = first.view(10, 100) + 1
        del first
        return second * 2

    assert memory_table.peak(hold) == 8000 / memory_table.GIB
    model, _ = memory_table.make_model(memory_table.Size(BagelConfig(), (8, 8, 8, 8), 1))
    assert memory_table.weights(model, "bf16") == pytest.approx(2 * 14.69e9 / memory_table.GIB, rel=0.01)
    assert memory_table.weights(model, "bf16") > memory_table.weights(model, "8 bits") > 15
