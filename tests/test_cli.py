"""The `echo4o` command, run for real on the bundled checkpoint."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

import echo4o_hf
from echo4o_hf.cli import main

MODEL = "echo4o-miniature"
PROMPT = "two red circles on the left and a blue star on the right"


def generate(output: Path, *options: str, prompt: str = PROMPT, model: str = MODEL) -> int:
    return main(["generate", prompt, "--model", model, "-o", str(output), "--steps", "3", *options])


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill="red")
    image.save(tmp_path / "reference.png")
    return tmp_path / "reference.png"


def test_generate_writes_a_picture_with_its_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new folder" / "out.png"
    assert generate(output, "--seed", "7", "--guidance-scale", "2.5") == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert [path.name for path in output.parent.iterdir()] == ["out.png"]
    with Image.open(output) as image:
        assert image.size == (64, 64)
        assert image.text == {
            "prompt": PROMPT,
            "references": "[]",
            "model": MODEL,
            "seed": "7",
            "height": "None",
            "width": "None",
            "num_inference_steps": "3",
            "guidance_scale": "2.5",
            "image_guidance_scale": "None",
            "thinking": "False",
            "max_think_tokens": "1000",
            "dtype": "float32",
            "software": f"echo4o-hf {echo4o_hf.__version__}",
            "index": "0",
        }


def test_the_seed_makes_the_picture(tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert generate(tmp_path / f"{name}.png", "--seed", seed) == 0
    a, b, c = (Image.open(tmp_path / f"{name}.png").tobytes() for name in "abc")
    assert a == b != c


def test_several_pictures_get_an_index(tmp_path: Path) -> None:
    assert generate(tmp_path / "out.png", "--num-images", "2", "--height", "32", "--width", "48") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-0.png", "out-1.png"]
    first, second = (Image.open(tmp_path / f"out-{index}.png") for index in range(2))
    assert first.size == second.size == (48, 32)
    assert first.tobytes() != second.tobytes()


def test_references_change_the_picture(tmp_path: Path, reference: Path) -> None:
    assert generate(tmp_path / "with.png", "--image", str(reference), "--image", str(reference)) == 0
    assert generate(tmp_path / "without.png") == 0
    assert Image.open(tmp_path / "with.png").tobytes() != Image.open(tmp_path / "without.png").tobytes()


def test_thinking_prints_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tmp_path / "out.png", "--thinking", "--max-think-tokens", "4") == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2
    assert Image.open(tmp_path / "out.png").text["max_think_tokens"] == "4"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": " "}, "a prompt must hold text"),
        ({"model": "no-such-folder"}, "'no-such-folder' is no folder"),
        ({"options": ["--height", "33"]}, "height=33"),
        ({"options": ["--image", "missing.png"]}, "missing.png"),
        ({"options": ["--image", __file__]}, "test_cli.py"),
        ({"options": ["--num-images", "0"]}, "num_images_per_prompt must be at least 1"),
        ({"options": ["--device", "abacus"]}, "'abacus'"),
        ({"output": "out.jpg"}, "OUT must end in .png, got"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    options: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = dict(options)
    output = tmp_path / options.pop("output", "out.png")
    assert generate(output, *options.pop("options", []), **options) == 2
    last = capsys.readouterr().err.rsplit("\r", 1)[-1].splitlines()[-1]  # progress bars stand before it
    assert last.startswith("echo4o: error: ") and message in last
    assert not list(tmp_path.iterdir())


def test_unknown_commands_and_missing_arguments_exit_with_2() -> None:
    for arguments in ([], ["paint"], ["generate"], ["generate", "a"], ["convert", "src"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


def test_ctrl_c_exits_with_130_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; from echo4o_hf.cli import main; sys.exit(main())"]
    options = ["generate", PROMPT, "--model", MODEL, "-o", str(tmp_path / "out.png"), "--steps", "100000"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE) as process:
        assert process.stderr
        seen = b""
        while b"0/100000" not in seen:  # the loop over the steps has begun
            seen += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read().endswith(b"echo4o: interrupted\n")
    assert process.returncode == 130
    assert not list(tmp_path.iterdir())


def test_convert_there_and_back(tmp_path: Path) -> None:
    official, ours = tmp_path / "official", tmp_path / "ours"
    assert main(["convert", MODEL, str(official), "--to", "official", "--dtype", "float32"]) == 0
    assert (official / "ema.safetensors").exists()
    assert main(["convert", str(official), str(ours)]) == 0
    assert (ours / "model_index.json").exists()
    for model in (MODEL, str(official), str(ours)):
        assert generate(tmp_path / f"{Path(model).name}.png", model=model) == 0
    pictures = [Image.open(tmp_path / name).tobytes() for name in (f"{MODEL}.png", "official.png", "ours.png")]
    assert pictures[0] == pictures[1] == pictures[2]


def test_convert_of_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(tmp_path / "empty"), str(tmp_path / "out")]) == 2
    assert "echo4o: error: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
