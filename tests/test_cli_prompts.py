"""`echo4o generate` with many prompts and seeds: the same bits however they are drawn, stopped and gone on with."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import TaylorSeerCacheConfig
from peft import LoraConfig
from PIL import ExifTags, Image

from echo4o_hf import Echo4oPipeline
from echo4o_hf.cli import generate as generate_command
from echo4o_hf.cli import main
from echo4o_hf.pipeline import guidance

MODEL = "echo4o-miniature"
FAST = ("--model", MODEL, "--steps", "2", "--height", "32", "--width", "32")
LINES = ("two red circles", "", {"prompt": "a blue star", "height": 48, "guidance_scale": 2}, "a green heart")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in LINES))
    return path


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    Image.new("RGB", (48, 32), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def generate(*arguments: object) -> int:
    return main(["generate", *FAST, *map(str, arguments)])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def test_each_prompt_with_each_seed(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, grid = tmp_path / "out", tmp_path / "grids" / "grid.png"
    assert generate("--prompts", prompts, "--seeds", "0", "3-4", "-o", out, "--grid", grid) == 0
    assert capsys.readouterr().out == f"9 drawn, 0 were there already\n{out}\n{grid}\n"
    names = [f"{line}_{seed}.png" for line in (1, 3, 4) for seed in (0, 3, 4)]
    assert [record["file_name"] for record in lines(out)] == names
    third = lines(out)[4]
    assert (third["prompt"], third["seed"], third["number"]) == ("a blue star", 3, 3)
    assert third["parameters"]["height"] == 48 and third["parameters"]["guidance_scale"] == 2
    assert third["parameters"]["width"] == 32 and third["parameters"]["guidance_renorm_min"] == 0.0
    assert Image.open(out / "3_3.png").size == (32, 48)
    cells = pixels(grid)  # of 256 pixels, with 8 between them
    assert cells.shape[1] == 3 * 264 + 8
    for column, seed in enumerate((0, 3, 4)):
        cell = cells[8 : 8 + 256, 8 + 264 * column :][:, :256]
        assert np.array_equal(cell[4::8, 4::8], pixels(out / f"1_{seed}.png"))


def test_alone_or_among_others_the_bits_are_the_same(prompts: Path, tmp_path: Path) -> None:
    out, alone = tmp_path / "out", tmp_path / "alone.png"
    assert generate("--prompts", prompts, "--seeds", "0,3", "-o", out) == 0
    assert generate("a green heart", "--seed", 3, "-o", alone) == 0
    assert np.array_equal(pixels(alone), pixels(out / "4_3.png"))
    assert not np.array_equal(pixels(alone), pixels(out / "4_0.png"))
    before = {path.name: path.read_bytes() for path in out.glob("*.png")}
    (out / "1_3.png").write_bytes(before["1_3.png"][:100])
    (out / "4_0.png").unlink()
    assert generate("--prompts", prompts, "--seeds", "0,3", "-o", out) == 0
    assert {path.name: path.read_bytes() for path in out.glob("*.png")} == before
    assert generate("--prompts", prompts, "--seeds", "0,3", "-o", tmp_path / "batches", "--batch-size", 4) == 0
    for name in before:
        assert np.abs(pixels(tmp_path / "batches" / name) - pixels(out / name)).max() <= 1


def test_lines_with_references_and_seeds(reference: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    rows = [{"prompt": "a star", "images": ["red.png"], "seed": 5}, {"prompt": "a star", "seed": 5}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--guidance-interval", "0.1", "0.9", "--guidance-renorm", "channel", "--image-guidance-scale", "1.5")
    assert generate("--prompts", path, "-o", out, "--batch-size", 2, *options) == 0
    first, second = lines(out)
    assert (first["file_name"], second["file_name"]) == ("1_5.png", "2_5.png")
    assert first["parameters"]["image"][0]["file"] == str(reference) and second["parameters"]["image"] is None
    assert first["parameters"]["guidance_interval"] == [0.1, 0.9]
    assert generate("a star", "--image", reference, "--seed", 5, "-o", tmp_path / "alone.png", *options) == 0
    assert np.abs(pixels(tmp_path / "alone.png") - pixels(out / "1_5.png")).max() <= 1
    Image.new("RGB", (48, 32), "blue").save(reference)
    assert generate("--prompts", path, "-o", out, *options) == 2  # another picture is another drawing


def test_other_seeds_with_other_settings_are_another_folder(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert generate("--prompts", prompts, "--seeds", 1, "-o", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for other in (("--steps", 3), ("--dtype", "bfloat16")):
        capsys.readouterr()
        assert generate("--prompts", prompts, "--seeds", 0, "-o", out, *other) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert "1_1.png was drawn with " in last and "name another folder" in last
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert generate("--prompts", prompts, "--seeds", 0, "-o", out) == 0
    assert len(lines(out)) == 6


def test_references_are_known_by_their_content(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("a star", "--seeds", "0", "-o", tmp_path / "out", "--image")
    monkeypatch.chdir(tmp_path)
    assert generate(*arguments, "red.png") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    assert generate(*arguments, "../red.png") == 0
    assert capsys.readouterr().out.startswith("0 drawn, 1 were there already\n")
    assert lines(tmp_path / "out")[0]["parameters"]["image"][0]["file"] == "red.png"
    Image.new("RGB", (48, 32), "blue").save(reference)
    assert generate(*arguments, "../red.png") == 2
    assert 'drawn with image=[{"file": "red.png", "sha256": ' in capsys.readouterr().err


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    image = Image.linear_gradient("L").resize((48, 32))
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6  # to be shown turned by 90 degrees clockwise
    image.save(tmp_path / "upright.png")
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=turned)
    rows = [{"prompt": "a star", "images": [f"{name}.png"], "seed": 0} for name in ("upright", "photo")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert generate("--prompts", tmp_path / "prompts.jsonl", "-o", tmp_path / "out") == 0
    assert np.array_equal(pixels(tmp_path / "out" / "1_0.png"), pixels(tmp_path / "out" / "2_0.png"))
    assert generate("a star", "--image", tmp_path / "photo.png", "-o", tmp_path / "alone.png") == 0
    assert np.array_equal(pixels(tmp_path / "out" / "1_0.png"), pixels(tmp_path / "alone.png"))


@pytest.mark.parametrize("seeds", ["3-1", "0,7-6"])
def test_a_range_of_seeds_that_ends_below_its_beginning(
    seeds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        generate("a star", "--seeds", seeds, "-o", tmp_path / "out")
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    part = seeds.rsplit(",")[-1]
    assert f"'{part}' ends below where it begins; write {part[::-1]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seeds", "1", "1"), "--seeds names a seed twice: 1, 1"),
        (("--seeds", "0-299", "--grid", "grid.png"), "--grid holds 256 pictures at most, these are 600"),
        (("--grid", "grid.jpg"), "--grid must end in .png, got 'grid.jpg'"),
        (("--grid", "out/1_0.png"), "--grid out/1_0.png is the name of a picture"),
        (("--image", "a.png"), '--image goes with PROMPT; lines of --prompts have "images"'),
        (("-o", "out.png"), "OUT must be a folder with --prompts or --seeds, got 'out.png'"),
        (("--batch-size", "0"), "batch_size=0 must be at least 1"),
        (("--attention", "telepathy"), "telepathy"),
        (("--cache-interval", "1"), "--cache-interval 1 must be at least 2"),
    ],
)
def test_mistakes(
    options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a star\na heart\n")
    assert generate("--prompts", "prompts.txt", "-o", "out", *options) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("echo4o: error: ") and message in last
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a heart", "height": 33}, "height=33"),
        ({"prompt": "a heart", "num_inference_steps": 1001}, "num_inference_steps=1001 must be at most 1000"),
        ({"prompt": "a heart", "images": ["missing.png"]}, "missing.png"),
        ({"prompt": "a heart", "seed": 1}, "has a seed of its own"),
        ({"prompt": "heart " * 600}, "the tokenizer's limit is 256"),
    ],
)
def test_a_bad_line_is_found_before_the_model_is_loaded(
    line: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text(f"a star\n{json.dumps(line)}\n")
    assert generate("--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "out", "--seeds", "0", "1") == 2
    output = capsys.readouterr().err
    assert f"prompts.txt, line 2{' ' if 'seed' in line else ': '}" in output and message in output
    assert "Loading weights" not in output and not (tmp_path / "out").exists()


def test_adapters_and_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = Echo4oPipeline.from_pretrained(MODEL)
    torch.manual_seed(0)
    values = ["v_proj_moe_gen", "o_proj_moe_gen"]  # which change more than where a token looks
    pipe.model.add_adapter(LoraConfig(r=8, lora_alpha=64, target_modules=values, init_lora_weights=False), "it")
    pipe.save_lora_weights(tmp_path / "lora", "it")
    pictures = {}
    for name, options in {
        "plain": (),
        "none": ("--lora", f"{tmp_path / 'lora'}=0"),
        "all": ("--lora", tmp_path / "lora"),
        "eager": ("--attention", "eager"),
    }.items():
        assert generate("a star", "--seeds", "0", "-o", tmp_path / name, *options) == 0
        pictures[name] = pixels(tmp_path / name / "1_0.png")
    assert np.array_equal(pictures["plain"], pictures["none"])
    assert np.abs(pictures["plain"] - pictures["all"]).max() > 5
    assert np.abs(pictures["plain"] - pictures["eager"]).max() <= 1
    assert lines(tmp_path / "all")[0]["lora"] == [[str(tmp_path / "lora"), 1.0]]
    assert lines(tmp_path / "eager")[0]["attention"] == "eager"
    assert generate("a star", "--seeds", "0", "-o", tmp_path / "all") == 2  # drawn with an adapter, now without
    again = ("a star", "--seeds", "0", "-o", tmp_path / "all", "--lora", tmp_path / "lora")
    assert generate(*again) == 0
    pipe.model.add_adapter(LoraConfig(r=8, target_modules=values, init_lora_weights=False), "other")
    pipe.save_lora_weights(tmp_path / "lora", "other")
    capsys.readouterr()
    assert generate(*again) == 2
    assert "1_0.png was drawn with other weights than" in capsys.readouterr().err


def test_cached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("a star", "--seeds", "0", "-o", tmp_path / "out", "--steps", "8", "--cache-interval", "3") == 0
    pipe = Echo4oPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipe.enable_cache(
        TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1, taylor_factors_dtype=torch.float32)
    )
    options = {"height": 32, "width": 32, "num_inference_steps": 8}
    image = pipe("a star", generator=torch.Generator().manual_seed(0), **options).images[0]
    assert np.array_equal(np.asarray(image).astype(int), pixels(tmp_path / "out" / "1_0.png"))
    assert lines(tmp_path / "out")[0]["cache_interval"] == 3
    for other in ((), ("--cache-interval", "2")):  # neither exact pictures nor others may mix with these
        assert generate("a star", "--seeds", "0", "-o", tmp_path / "out", "--steps", "8", *other) == 2
        assert "cache_interval=3" in capsys.readouterr().err


def test_the_renorms_are_those_of_the_pipeline() -> None:
    assert generate_command.RENORMS == guidance.RENORMS


def test_after_ctrl_c_the_same_command_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["generate", "a star", *FAST, "--seeds", "0-199", "-o", str(out)]
    # A job in the background of a shell ignores SIGINT, and so would what it starts.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listen}; import sys; from echo4o_hf.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as process:
        assert process.stderr
        seen = b""
        while not re.search(rb" ([2-9]|\d\d+)/200", seen):  # the bar does not show every number
            read = process.stderr.read(1)
            assert read, seen.decode()
            seen += read
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read().decode()
    assert process.returncode == 130
    there = sorted(path.name for path in out.glob("*.png"))
    assert 2 <= len(there) < 200
    message = f"echo4o: interrupted; {len(there)} of 200 pictures are in {out}, and the same command goes on"
    assert rest.splitlines()[-1] == message
    assert {path.suffix for path in out.iterdir() if path.name != ".metadata.lock"} == {".png", ".jsonl"}
    assert [record["file_name"] for record in lines(out)] == sorted(there, key=lambda name: int(name[2:-4]))
    bits = {name: pixels(out / name) for name in there}  # all are whole
    end = len(there)
    assert generate("a star", "--seeds", f"0-{end}", "-o", out) == 0
    assert capsys.readouterr().out.startswith(f"1 drawn, {end} were there already\n")
    assert generate("a star", "--seed", end, "-o", tmp_path / "alone.png") == 0
    assert np.array_equal(pixels(tmp_path / "alone.png"), pixels(out / f"1_{end}.png"))
    assert all(np.array_equal(pixels(out / name), array) for name, array in bits.items())
