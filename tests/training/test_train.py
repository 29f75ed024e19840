"""`echo4o train`, run for real on the miniature: from settings to what the pipeline loads."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from echo4o_hf import BagelConfig, Echo4oPipeline
from echo4o_hf.cli import main
from echo4o_hf.miniature.dataset import write_dataset
from echo4o_hf.model.checkpoint import BUNDLED, load_processor
from echo4o_hf.model.image_processing_bagel import BagelImageProcessor
from echo4o_hf.model.processing_bagel import BagelProcessor
from echo4o_hf.training.sizes import training_sizes
from echo4o_hf.training.train import default_max_tokens

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = "echo4o-miniature"
PROMPT = "two red circles on the left"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, 8)
    return folder


@pytest.fixture
def flags(data: Path, tmp_path: Path) -> list[str]:
    """A run of a second: small packs of eight rows, written to tmp_path/out."""
    source = ["--dataset", "echo-4o-image", "--dataset_config", "instruction_following", "--data_dir", str(data)]
    where = ["--model", MODEL, "--output_dir", str(tmp_path / "out"), "--latent_cache", str(tmp_path / "latents")]
    quick = "--max_tokens 256 --gradient_accumulation_steps 1 --dataloader_num_workers 0 --report_to none"
    return [*source, *where, *quick.split(), "--validation_inference_steps", "1"]


def draw(pipe: Echo4oPipeline) -> Image.Image:
    return pipe(PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images[0]


def test_an_adapter_that_the_pipeline_loads(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--max_steps", "2", "--save_steps", "1", "--learning_rate", "0.01", "--warmup_steps", "0"]
    assert main(["train", str(EXAMPLES / "train_lora.yaml"), *flags, *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert any("trained" in line for line in printed[:10]) and printed[-1] == str(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "checkpoint-1", "checkpoint-2"} <= names
    assert {path.name for path in (tmp_path / "out/validation").iterdir()} == {"step-0.png", "step-2.png"}
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == 64 and config["base_model_name_or_path"] == MODEL

    pipe = Echo4oPipeline.from_pretrained(MODEL, dtype=torch.float32)
    before = draw(pipe).tobytes()
    pipe.load_lora_weights(tmp_path / "out")
    assert draw(pipe).tobytes() != before
    pipe.unload_lora_weights()
    assert draw(pipe).tobytes() == before


def test_a_checkpoint_that_the_pipeline_loads(flags: list[str], tmp_path: Path) -> None:
    options = ["--max_steps", "1", "--warmup_steps", "0", "--save_strategy", "no", "--validation_prompts", PROMPT]
    assert main(["train", str(EXAMPLES / "train_full.yaml"), *flags, *options]) == 0
    out, base = tmp_path / "out", BUNDLED / MODEL / "model"
    assert not list(out.glob("checkpoint-*"))
    for name in ("config.json", "generation_config.json"):  # training has left no marks in them
        saved, before = (json.loads((folder / name).read_text()) for folder in (out / "model", base))
        saved, before = ({key: value for key, value in part.items() if key != "dtype"} for part in (saved, before))
        assert saved == before
    weights, before_training = load_file(out / "model/model.safetensors"), load_file(base / "model.safetensors")
    assert weights.keys() == before_training.keys()
    moved = [name for name in weights if not torch.equal(weights[name], before_training[name].float())]
    assert any("_moe_gen" in name for name in moved) and any("_moe_gen" not in name for name in moved)
    draw(Echo4oPipeline.from_pretrained(out))


def test_an_earlier_run_is_gone_on_with_or_left_alone(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ["train", *flags, "--save_steps", "2", "--max_steps"]
    assert main([*steps, "2", "--resume_from_checkpoint", "true"]) == 0  # nothing there yet
    capsys.readouterr()
    assert main([*steps, "4"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path}/out/checkpoint-2 is of an earlier run" in error and "--resume_from_checkpoint true" in error
    assert main([*steps, "4", "--resume_from_checkpoint", "true"]) == 0
    state = json.loads((tmp_path / "out/checkpoint-4/trainer_state.json").read_text())
    assert state["global_step"] == 4
    assert main([*steps, "4", "--resume_from_checkpoint", str(tmp_path / "nowhere")]) == 2
    assert "nowhere' is no folder" in capsys.readouterr().err


def test_precompute_latents(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *flags, "--precompute-latents"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'latents'}\n"
    assert not (tmp_path / "out").exists()
    entries = {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").rglob("*.safetensors")}
    assert len(entries) == 8
    assert main(["train", *flags, "--max_steps", "1", "--save_strategy", "no"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "latents").rglob("*.safetensors")} == entries


def test_streaming(flags: list[str], tmp_path: Path) -> None:
    options = ["--streaming", "--shuffle_window", "4", "--max_steps", "3", "--save_strategy", "no"]
    assert main(["train", *flags, *options]) == 0
    with safe_open(tmp_path / "out/adapter_model.safetensors", framework="pt") as file:
        assert any(file.get_tensor(name).any() for name in file.keys() if "lora_B" in name)  # noqa: SIM118


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no-such-folder"], "'no-such-folder' is no folder"),
        (["--caption_column", "text"], "caption_column='text', but the columns are ["),
        (["--image_size", "100"], "image_size=100 must be a multiple of 16 from 16 to 64"),
        (["--max_tokens", "20", "--oversize", "error"], "more than max_tokens=20"),
        (["--lora_rnk", "3"], "there is no --lora_rnk; did you mean --lora_rank?"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    options: list[str], message: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *flags, *options]) == 2
    last = capsys.readouterr().err.rsplit("\r", 1)[-1].splitlines()[-1]
    assert last.startswith("echo4o: error: ") and message in last
    assert not (tmp_path / "out").exists()


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Pictures with captions, the second cut off in its middle."""
    folder = tmp_path / "broken"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:5000])
    lines = [json.dumps({"file_name": f"{number}.png", "text": "a red star"}) for number in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_picture_is_named(
    workers: str, broken: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ["--dataset", "imagefolder", "--dataset_config", "default", "--data_dir", str(broken)]
    options = ["--caption_column", "text", "--max_steps", "1", "--save_strategy", "no", "--disable_tqdm", "true"]
    run = ["train", *flags, *source, *options, "--dataloader_num_workers", workers, "--on_error"]
    assert main([*run, "raise"]) == 2
    assert "echo4o: error: 1: output_image does not decode" in capsys.readouterr().err.splitlines()[-1]
    assert main([*run, "skip"]) == 0
    (line,) = (tmp_path / "out/left_out.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["id"] == "1"


def test_room_for_four_references() -> None:
    official = BagelConfig()
    processor = BagelProcessor(BagelImageProcessor.from_bagel_config(official), miniature()[1].tokenizer)
    assert default_max_tokens(official, training_sizes(processor, official)) == 30720
    config, processor = miniature()
    assert default_max_tokens(config, training_sizes(processor, config)) == 1024


def miniature() -> tuple[BagelConfig, BagelProcessor]:
    config = BagelConfig.from_pretrained(BUNDLED / MODEL / "model")
    return config, load_processor(BUNDLED / MODEL, config)


@pytest.mark.slow
def test_ctrl_c_names_the_last_checkpoint(flags: list[str], tmp_path: Path) -> None:
    # a shell's background job ignores SIGINT, and so would what it starts
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listen}; import sys; from echo4o_hf.training.train import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *flags, "--save_steps", "2", "--max_steps", "1000", "--disable_tqdm", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not list((tmp_path / "out").glob("checkpoint-*")) and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.stderr
        last = process.stderr.read().splitlines()[-1]
    assert process.returncode == 130
    assert "interrupted." in last and f"{tmp_path}/out/checkpoint-" in last and "--resume_from_checkpoint true" in last


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("train_*.yaml")), ids=lambda path: path.stem)
def test_examples_run_on_the_miniature(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick = "--max_steps 1 --gradient_accumulation_steps 1 --dataset_split train[:24] --validation_inference_steps 1"
    assert main(["train", str(example), "--model", MODEL, *quick.split()]) == 0
    settings = yaml.safe_load(example.read_text(encoding="utf-8"))
    pipe = Echo4oPipeline.from_pretrained(MODEL, dtype=torch.float32)
    if settings["method"] == "lora":
        pipe.load_lora_weights(settings["output_dir"])
    else:
        pipe = Echo4oPipeline.from_pretrained(settings["output_dir"])
    draw(pipe)
