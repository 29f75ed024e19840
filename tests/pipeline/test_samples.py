"""Folders of samples: noise of their own, any pipeline, any number of processes, resumed but never mixed."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image, PngImagePlugin
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from echo4o_hf.pipeline.pipeline_echo4o import Echo4oPipeline
from echo4o_hf.pipeline.records import read_record
from echo4o_hf.pipeline.samples import (
    Drawn,
    draw_samples,
    find_pipeline_class,
    noise_seed,
    read_arguments,
)
from echo4o_hf.pipeline.source import Source

PROMPTS = {0: "a red cat", 1: "two blue hats", 7: "a cat", 12: "two hats two hats a red cat"}
FAST = {"num_inference_steps": 2, "height": 32, "width": 32}


@pytest.fixture
def model(pipe: Echo4oPipeline, tmp_path: Path) -> str:
    pipe.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def stable_diffusion(tmp_path: Path) -> str:
    """A pipeline of diffusers that knows nothing of ours, at tiny size."""
    torch.manual_seed(0)
    letters = sorted(set("".join(PROMPTS.values())) - {" "})
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=32)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=len(tokens), max_position_embeddings=32, **sizes, **ids)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(tmp_path / "sd")
    return str(tmp_path / "sd")


def pixels(folder: Path) -> dict[str, bytes]:
    return {path.name: Image.open(path).tobytes() for path in sorted(folder.glob("*.png"))}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def test_pictures_do_not_depend_on_the_batch_or_the_order(model: str, tmp_path: Path) -> None:
    backwards = dict(reversed(PROMPTS.items()))
    for name, size, prompts in (("1", 1, PROMPTS), ("3", 3, PROMPTS), ("8", 8, PROMPTS), ("back", 3, backwards)):
        # In float64, for in float32 the size of the batch shows in the last digit.
        options = {"batch_size": size, "samples_per_prompt": 2, "arguments": FAST}
        assert draw_samples(Source(model, "float64"), prompts, tmp_path / name, **options) == Drawn(8, 0)
    first = pixels(tmp_path / "1")
    assert sorted(first) == sorted(f"{number}_{sample}.png" for number in PROMPTS for sample in (0, 1))
    assert len(set(first.values())) == 8
    assert pixels(tmp_path / "3") == pixels(tmp_path / "8") == pixels(tmp_path / "back") == first


def test_one_at_a_time_the_order_changes_not_a_bit(model: str, tmp_path: Path) -> None:
    draw_samples(Source(model), PROMPTS, tmp_path / "a", arguments=FAST)
    draw_samples(Source(model), {7: "a cat"}, tmp_path / "b", arguments=FAST)
    draw_samples(Source(model), {7: "a cat"}, tmp_path / "c", arguments=FAST, seed=1)
    a, b, c = (pixels(tmp_path / name)["7_0.png"] for name in "abc")
    assert a == b != c


def test_seeds_of_noise_never_change() -> None:
    assert noise_seed(0, 0, 0) == 3051931488724851722
    assert len({noise_seed(*places) for places in [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (0, 11, 1)]}) == 5


def test_each_picture_says_what_it_is(model: str, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    draw_samples(Source(model), {3: "a red cat", 12: "ein Hütchen, 帽子"}, folder, seed=5, arguments=FAST)
    first, second = lines(folder)
    assert (first["file_name"], second["file_name"]) == ("3_0.png", "12_0.png")
    assert second["prompt"] == "ein Hütchen, 帽子" and (second["number"], second["sample"]) == (12, 0)
    assert first["model"] == model and first["pipeline"] == "Echo4oPipeline"
    assert (first["seed"], first["dtype"], first["device"]) == (5, "float32", "cpu")
    assert first["parameters"]["height"] == 32 and first["parameters"]["guidance_scale"] == 4.0
    assert "torch" in first["software"]
    texts = Image.open(folder / "3_0.png").text
    assert texts["prompt"] == "a red cat" and texts["seed"] == "5" and json.loads(texts["parameters"])["height"] == 32
    assert read_record(folder / "12_0.png") == {name: value for name, value in second.items() if name != "file_name"}
    rows = load_dataset("imagefolder", data_dir=str(folder), split="train")
    assert sorted(rows["prompt"]) == ["a red cat", "ein Hütchen, 帽子"]


def test_plans_are_kept(model: str, tmp_path: Path) -> None:
    draw_samples(
        Source(model), {0: "a cat"}, tmp_path / "out", arguments={**FAST, "thinking": True, "max_think_tokens": 3}
    )
    (line,) = lines(tmp_path / "out")
    assert isinstance(line["plan"], str)


def test_what_is_there_stays_and_halves_are_drawn_anew(model: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    draw_samples(Source(model), PROMPTS, folder, arguments=FAST)
    before = pixels(folder)
    half = (folder / "0_0.png").read_bytes()
    for name, kept in (("0_0.png", len(half) // 2), ("1_0.png", -12), ("7_0.png", 0)):
        (folder / name).write_bytes((folder / name).read_bytes()[:kept])
    whole = (folder / "12_0.png").stat()
    (folder / "metadata.jsonl").unlink()
    assert draw_samples(Source(model), PROMPTS, folder, arguments=FAST) == Drawn(3, 1)
    assert pixels(folder) == before and (folder / "12_0.png").stat() == whole
    assert draw_samples(Source(model), PROMPTS, folder, arguments=FAST, samples_per_prompt=2, batch_size=4) == Drawn(
        4, 4
    )
    assert [line["file_name"] for line in lines(folder)] == [f"{i}_{k}.png" for i in PROMPTS for k in (0, 1)]
    assert {path.suffix for path in folder.iterdir() if not path.name.startswith(".")} == {".png", ".jsonl"}


def test_nothing_missing_loads_nothing(model: str, tmp_path: Path) -> None:
    draw_samples(Source(model), {0: "a cat"}, tmp_path / "out", arguments=FAST)
    for weights in Path(model).rglob("*.safetensors"):
        weights.unlink()
    assert draw_samples(Source(model), {0: "a cat"}, tmp_path / "out", arguments=FAST) == Drawn(0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": {0: "a hat"}}, 'prompt="a cat", now it is "a hat"'),
        ({"seed": 1}, "seed=0, now it is 1"),
        ({"dtype": "bfloat16"}, 'dtype="float32", now it is "bfloat16"'),
        ({"arguments": {**FAST, "num_inference_steps": 3}}, "num_inference_steps=2, now it is 3"),
        ({"arguments": {**FAST, "guidance_interval": [0, 1]}}, r"guidance_interval=null, now it is \[0, 1\]"),
    ],
)
def test_pictures_of_other_settings_are_never_mixed(change: dict, message: str, model: str, tmp_path: Path) -> None:
    change = dict(change)
    given = {"prompts": {0: "a cat"}, "folder": tmp_path / "out", "arguments": FAST}
    draw_samples(Source(model), **given)
    before = (tmp_path / "out" / "0_0.png").read_bytes()
    with pytest.raises(ValueError, match=f"0_0.png was drawn with {message}"):
        draw_samples(Source(model, change.pop("dtype", "float32")), **{**given, **change})
    assert (tmp_path / "out" / "0_0.png").read_bytes() == before


def save_adapter(pipe: Echo4oPipeline, folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["o_proj_moe_gen"], init_lora_weights=False)
    pipe.model.add_adapter(config, f"seed_{seed}")
    pipe.save_lora_weights(folder, f"seed_{seed}")


def without_text(path: Path, name: str) -> None:
    """A picture as it was when this text was not yet written."""
    text = PngImagePlugin.PngInfo()
    with Image.open(path) as image:
        for key, value in image.text.items():
            if key != name:
                text.add_text(key, value)
        image.save(path, pnginfo=text)


def test_an_adapter_is_known_by_its_weights(pipe: Echo4oPipeline, model: str, tmp_path: Path) -> None:
    lora, moved, folder = tmp_path / "lora", tmp_path / "moved", tmp_path / "out"

    def draw(adapter: Path, scale: float = 1.0) -> Drawn:
        return draw_samples(Source(model, loras=((str(adapter), scale),)), {0: "a cat"}, folder, arguments=FAST)

    save_adapter(pipe, lora, 0)
    assert draw(lora) == Drawn(1, 0)
    files = ["adapter_config.json", "adapter_model.safetensors"]
    expected = hashlib.sha256(b"".join((lora / name).read_bytes() for name in files)).hexdigest()
    assert lines(folder)[0]["lora_sha256"] == [expected] and lines(folder)[0]["lora"] == [[str(lora), 1.0]]
    shutil.copytree(lora, moved)
    assert draw(moved) == Drawn(0, 1)
    with pytest.raises(ValueError, match=r'lora=\[\["[^"]*lora", 1.0\]\], now it is \[\["[^"]*lora", 0.5\]\]'):
        draw(lora, 0.5)
    save_adapter(pipe, lora, 1)  # trained on, into the same folder
    with pytest.raises(
        ValueError, match="0_0.png was drawn with other weights than .*lora has now: name another fold"
    ):
        draw(lora)
    settings = json.loads((moved / files[0]).read_text())
    (moved / files[0]).write_text(json.dumps({**settings, "lora_alpha": 99}))
    with pytest.raises(ValueError, match="other weights than .*moved has now"):
        draw(moved)
    without_text(folder / "0_0.png", "lora_sha256")
    with pytest.raises(ValueError, match="0_0.png does not say which weights of .*lora it was drawn with: name anoth"):
        draw(lora)


def test_a_model_that_was_trained_on_in_its_folder(pipe: Echo4oPipeline, model: str, tmp_path: Path) -> None:
    given = {"prompts": {0: "a cat"}, "folder": tmp_path / "out", "arguments": FAST}
    draw_samples(Source(model), **given)
    (Path(model) / "checkpoint-1").mkdir()
    (Path(model) / "checkpoint-1" / "model.safetensors").write_bytes(b"of a training")
    shutil.copytree(model, tmp_path / "copy")
    shutil.rmtree(model)
    shutil.move(tmp_path / "copy", model)  # the same weights with other dates
    assert draw_samples(Source(model), **given) == Drawn(0, 1)
    with torch.no_grad():
        pipe.model.language_model.model.layers[1].self_attn.o_proj_moe_gen.weight.mul_(1.01)
    pipe.save_pretrained(model)
    with pytest.raises(ValueError, match="0_0.png was drawn with other weights than .*model has now: name another"):
        draw_samples(Source(model), **given)
    without_text(tmp_path / "out" / "0_0.png", "model_fingerprint")  # an older picture is known by the name alone
    assert draw_samples(Source(model), **given) == Drawn(0, 1)


def test_pictures_of_others_are_left_alone(model: str, tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "a cat")
    Image.new("RGB", (8, 8)).save(tmp_path / "0_0.png", pnginfo=text)
    with pytest.raises(ValueError, match="0_0.png was not drawn by this command"):
        draw_samples(Source(model), {0: "a cat"}, tmp_path, arguments=FAST)
    draw_samples(Source(model), {1: "a cat"}, tmp_path, arguments=FAST)
    assert [line["file_name"] for line in lines(tmp_path)] == ["1_0.png"]


def test_a_failure_keeps_what_was_drawn(model: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a prompt must hold text"):
        draw_samples(Source(model), {0: "a cat", 1: " "}, tmp_path / "out", arguments=FAST)
    assert [line["file_name"] for line in lines(tmp_path / "out")] == ["0_0.png"]


def test_a_pipeline_of_diffusers(stable_diffusion: str, tmp_path: Path) -> None:
    assert find_pipeline_class(stable_diffusion) is StableDiffusionPipeline
    for name, size in (("1", 1), ("4", 4)):
        arguments = {**FAST, "negative_prompt": "a hat", "eta": 1.0}  # eta: noise in every step
        options = {"batch_size": size, "arguments": arguments}
        assert draw_samples(Source(stable_diffusion, "float64"), PROMPTS, tmp_path / name, **options) == Drawn(4, 0)
    first = pixels(tmp_path / "1")
    assert first == pixels(tmp_path / "4") and len(set(first.values())) == 4
    line = lines(tmp_path / "4")[1]
    assert line["pipeline"] == "StableDiffusionPipeline" and line["prompt"] == "two blue hats"
    assert line["parameters"]["negative_prompt"] == "a hat" and line["parameters"]["guidance_scale"] == 7.5
    draw_samples(Source(stable_diffusion, "float64"), PROMPTS, tmp_path / "plain", arguments=FAST)
    assert pixels(tmp_path / "plain") != first


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guidance": 3}, "takes no guidance; did you mean guidance_"),
        ({"xyzzy": 1}, "takes no xyzzy; it takes .*num_inference_steps"),
        ({"kwargs": 1}, "takes no kwargs"),
        ({"generator": 1}, "generator is set by this command"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt is set by this command"),
    ],
)
@pytest.mark.parametrize("pipeline_class", [Echo4oPipeline, StableDiffusionPipeline])
def test_arguments_that_a_pipeline_does_not_take(pipeline_class: type, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_arguments(pipeline_class, given)


def test_classes_that_cannot_draw_prompts(tmp_path: Path) -> None:
    for name, message in ((DDPMPipeline.__name__, "takes no prompt"), ("Painter", "of the class Painter, which")):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(ValueError, match=message):
            find_pipeline_class(str(tmp_path))


@pytest.mark.parametrize("number", ["samples_per_prompt", "batch_size"])
def test_numbers_below_one(number: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{number}=0 must be at least 1"):
        draw_samples(Source("echo4o-miniature"), PROMPTS, tmp_path / "out", **{number: 0})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(model: str, tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    rows = [
        {"tag": "counting", "prompt": prompt, "include": [{"class": "cat", "count": 1}]} for prompt in PROMPTS.values()
    ]
    items.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    draw_samples(Source(model), {i: row["prompt"] for i, row in enumerate(rows[:3])}, tmp_path / "one", arguments=FAST)
    stdout = generate(
        ["--benchmark", "geneval_pp", "--items", str(items), "--model", model, "-o", tmp_path / "two"], 2
    )
    shares = sorted(line.split(",")[0] for line in stdout.splitlines() if " drawn, " in line)
    assert shares == ["1 drawn", "2 drawn"]
    assert pixels(tmp_path / "two") == pixels(tmp_path / "one")
    assert lines(tmp_path / "two") == lines(tmp_path / "one")


@pytest.mark.slow
def test_two_processes_draw_a_prompts_file_as_one_does(model: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a red circle\n{"prompt": "a blue square", "images": ["red.png"]}\n')
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    for count in (1, 2):
        folder = tmp_path / str(count)
        arguments = ["--prompts", prompts, "--seeds", "3-4", "--grid", tmp_path / f"{count}.png"]
        generate([*arguments, "--model", model, "-o", folder], count)
    names = sorted(path.name for path in (tmp_path / "1").glob("*.png"))
    assert names == ["1_3.png", "1_4.png", "2_3.png", "2_4.png"]
    assert pixels(tmp_path / "2") == pixels(tmp_path / "1")
    assert (tmp_path / "2.png").read_bytes() == (tmp_path / "1.png").read_bytes()


def generate(arguments: list[object], num_processes: int) -> str:
    """What `echo4o generate` prints, run by so many processes."""
    # accelerate starts several processes on CPUs alone only where it takes them for GPUs.
    launch = ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--num_processes", str(num_processes)]
    launch += ["--multi_gpu"] if num_processes > 1 else []
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "echo4o_hf.cli"]
    options = ["--device", "cpu", "--steps", "2", "--height", "32", "--width", "32"]
    run = subprocess.run(
        [sys.executable, *launch, "generate", *map(str, arguments), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
