"""The options of `generate`, `chat` and `app` that say how a model is loaded, run for real on the bundled model."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitsAndBytesConfig

from echo4o_hf import Echo4oPipeline
from echo4o_hf.cli import build_parser, main
from echo4o_hf.cli.loading import read_source

MODEL = "echo4o-miniature"
PROMPT = "two red circles"
FAST = ("--model", MODEL, "--steps", "2", "--height", "32", "--width", "32")


def generate(*arguments: object) -> int:
    return main(["generate", PROMPT, *FAST, *map(str, arguments)])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("device", ["cuda:99", "cpu:1", "meta", *([] if torch.cuda.is_available() else ["cuda"])])
@pytest.mark.parametrize("command", ["generate", "chat", "app"])
def test_devices_that_are_not_here(
    command: str, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    arguments = {
        "generate": [PROMPT, "-o", str(tmp_path / "out.png")],
        "chat": [str(tmp_path / "image.png"), "--question", "?"],
        "app": ["--output", str(tmp_path / "out")],
    }
    assert main([command, *arguments[command], "--model", MODEL, "--device", device]) == 2
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert last.startswith(f"echo4o: error: --device {device} is not here: torch {torch.__version__} sees cpu")
    assert "Loading weights" not in error and [path.name for path in tmp_path.iterdir()] == ["image.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--offload", "--device", "cpu"), "while they are used, and the device is cpu"),
        (("--offload", "--quantize", "4bit"), "--offload does not go with --quantize"),
        (("--offload", "--compile"), "--offload does not go with --compile"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "app"])
def test_what_offload_does_not_go_with(
    command: str, options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = [PROMPT] if command == "generate" else []
    assert main([command, *prompt, "--output", str(tmp_path / "out.png"), "--model", MODEL, *options]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("bits", "name"), [(4, "4bit"), (8, "8bit")])
def test_quantized(bits: int, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16} if bits == 4 else {}
    pipe = Echo4oPipeline.from_pretrained(
        MODEL,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **settings),
        device_map="cpu",
    )
    sizes = {"num_inference_steps": 2, "height": 32, "width": 32}
    expected = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **sizes).images[0]
    options = ("--device", "cpu", "--dtype", "bfloat16")
    folder = ("--seeds", "0", "-o", tmp_path / "out", *options)
    assert generate(*folder, "--quantize", name) == 0
    assert np.array_equal(pixels(tmp_path / "out" / "1_0.png"), np.asarray(expected))
    assert json.loads((tmp_path / "out" / "metadata.jsonl").read_text())["quantization"] == name
    assert generate("-o", tmp_path / "plain.png", *options) == 0
    assert not np.array_equal(pixels(tmp_path / "plain.png"), np.asarray(expected))
    assert generate(*folder) == 2  # neither plain pictures nor others may mix with these
    assert f'was drawn with quantization="{name}", now it is null' in capsys.readouterr().err
    question = ["--question", "Describe the picture.", "--max-new-tokens", "5"]
    chat = ["chat", str(tmp_path / "plain.png"), "--model", MODEL, *options, *question]
    assert main([*chat, "--quantize", name]) == 0
    assert capsys.readouterr().out.strip()


def test_quantize_without_bitsandbytes(tmp_path: Path) -> None:
    code = "import sys; sys.modules['bitsandbytes'] = None; from echo4o_hf.cli import main; sys.exit(main())"
    arguments = ["generate", PROMPT, *FAST, "--quantize", "4bit", "-o", str(tmp_path / "out.png")]
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert run.returncode == 2 and "Loading weights" not in run.stderr
    expected = "echo4o: error: --quantize needs bitsandbytes: pip install 'echo4o-hf[qlora]'"
    assert run.stderr.splitlines()[-1] == expected


def test_the_app_loads_as_the_others_do() -> None:
    options = ["--quantize", "8bit", "--attention", "eager", "--dtype", "bfloat16", "--device", "cpu", "--compile"]
    args = build_parser().parse_args(["app", "--model", MODEL, *options])
    source = read_source(args, compiled=args.compile)
    found = (source.quantization, source.attention, source.dtype, str(source.device), source.compiled)
    assert found == ("8bit", "eager", "bfloat16", "cpu", True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [("--offload",), ("--quantize", "8bit")])
def test_less_memory_on_a_gpu(options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("-o", tmp_path / "plain.png") == 0
    assert generate("-o", tmp_path / "less.png", *options) == 0
    assert np.abs(pixels(tmp_path / "plain.png") - pixels(tmp_path / "less.png")).mean() < 5
    capsys.readouterr()
    question = ["--question", "Describe the picture.", "--max-new-tokens", "5"]
    assert main(["chat", str(tmp_path / "plain.png"), "--model", MODEL, *question, *options]) == 0
    assert capsys.readouterr().out.strip()
