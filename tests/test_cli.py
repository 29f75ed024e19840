"""The `echo4o` command, run for real on the bundled checkpoint."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_dataset
from PIL import Image, ImageDraw

import echo4o_hf
from echo4o_hf.cli import main
from echo4o_hf.miniature.dataset import write_dataset

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
            "guidance_interval": "None",
            "guidance_renorm": "None",
            "guidance_renorm_min": "0.0",
            "thinking": "False",
            "max_think_tokens": "1000",
            "dtype": "float32",
            "software": f"echo4o-hf {echo4o_hf.__version__}",
        }


def test_the_seed_makes_the_picture(tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert generate(tmp_path / f"{name}.png", "--seed", seed) == 0
    a, b, c = (Image.open(tmp_path / f"{name}.png").tobytes() for name in "abc")
    assert a == b != c


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
        ({"options": ["--seed", "-1"]}, "a seed must be a whole number from 0 to"),
        ({"options": ["--lora", "no-such-adapter"]}, "no-such-adapter"),
        ({"options": ["--grid", "grid.png"]}, "--grid goes with --prompts or --seeds"),
        ({"options": ["--batch-size", "2"]}, "--batch-size goes with --prompts, --seeds or --benchmark"),
        ({"options": ["--guidance-interval", "1", "0"]}, "guidance_interval"),
        ({"options": ["--device", "abacus"]}, "'abacus'"),
        ({"options": ["--attention", "foo"]}, "--attention foo is unknown: choose one of "),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "echo4o: error: the following arguments are required: COMMAND"),
        ("paint", "echo4o: error: argument COMMAND: invalid choice: 'paint'"),
        ("generate", "echo4o generate: error: the following arguments are required: --model"),
        ("convert src", "echo4o convert: error: the following arguments are required: DST"),
        ("data", "echo4o data: error: the following arguments are required: COMMAND"),
        ("data paint", "echo4o data: error: argument COMMAND: invalid choice: 'paint'"),
        ("data stats --paint", "echo4o data stats: error: unrecognized arguments: --paint (echo4o data stats --help"),
        (
            "generate a --model m -o o --image a.png b.png",
            "echo4o generate: error: unrecognized arguments: b.png; for several values, repeat the option before each",
        ),
    ],
)
def test_unknown_commands_and_missing_arguments_are_one_line_and_exit_code_2(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message) and line.endswith("--help says more)")


@pytest.mark.parametrize("command", ["report it -o x", "train it", "evaluate geneval_pp --items it"])
def test_files_that_are_not_there(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    judging = ["--images", ".", "--judge", "shapes", "-o", "x"] if "evaluate" in command else []
    assert main([*command.split(), *judging]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "echo4o: error: it: No such file or directory"


def test_ctrl_c_exits_with_130_and_writes_nothing(tmp_path: Path) -> None:
    # a shell's background job ignores SIGINT, and so would what it starts
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{listen}; import sys; from echo4o_hf.cli import main; sys.exit(main())"]
    options = ["generate", PROMPT, "--model", MODEL, "-o", str(tmp_path / "out.png"), "--steps", "1000"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE) as process:
        assert process.stderr
        seen = b""
        while b"0/1000" not in seen:  # the loop over the steps has begun
            read = process.stderr.read(1)
            assert read, seen.decode()
            seen += read
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


@pytest.fixture(scope="module")
def hub_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    write_dataset(folder, 6)
    return folder


def test_data_build_loads_without_the_package(
    hub_layout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data-dir", str(hub_layout), "--subset", "multi_reference", "--subset", "surreal_fantasy"]
    assert main(["data", "build", str(tmp_path / "built"), *arguments]) == 0
    assert capsys.readouterr().out == f"surreal_fantasy: 6 rows\nmulti_reference: 6 rows\n{tmp_path / 'built'}\n"
    code = f"""
import sys
from datasets import load_dataset
dataset = load_dataset({str(tmp_path / "built")!r}, "multi_reference", split="train")
assert not any(name.startswith("echo4o") for name in sys.modules)
print(len(dataset), dataset[0]["output_image"].size)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout == "6 (64, 64)\n"


def test_data_stats(hub_layout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "stats.html"
    assert main(["data", "stats", "--data-dir", str(hub_layout), "--html", str(page)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert last == str(page) and page.read_text(encoding="utf-8").startswith("<!doctype html>")
    for subset in ("surreal_fantasy", "multi_reference", "instruction_following"):
        assert any(subset in line for line in table)


def test_data_export(hub_layout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    arguments = ["--data-dir", str(hub_layout), "--subset", "instruction_following"]
    assert main(["data", "export", "imagefolder", str(output), *arguments]) == 0
    assert len(load_dataset("imagefolder", data_dir=str(output), split="train")) == 6
    assert main(["data", "export", "imagefolder", str(output), *arguments]) == 2
    assert "holds an export already; --overwrite replaces it" in capsys.readouterr().err
    assert main(["data", "export", "imagefolder", str(output), *arguments, "--overwrite"]) == 0


def test_data_overlap(hub_layout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = load_dataset("echo-4o-image", "surreal_fantasy", data_dir=str(hub_layout), split="train")
    prompts = tmp_path / "bench.jsonl"
    prompts.write_text(json.dumps({"prompt": data[3]["instruction"].upper()}) + "\n")
    outputs = {"--html": str(tmp_path / "overlap.html"), "--drop": str(tmp_path / "clean")}
    options = [word for pair in outputs.items() for word in pair]
    arguments = ["--data-dir", str(hub_layout), "--benchmark", f"bench={prompts}", "--benchmark", "shapes_140"]
    assert main(["data", "overlap", *arguments, *options]) == 0
    *table, page, clean = capsys.readouterr().out.splitlines()
    assert [page, clean] == list(outputs.values())
    assert [line.split()[:3] for line in table if line.startswith("shapes_140")][-1] == ["shapes_140", "all", "18"]
    left = load_dataset("echo-4o-image", "surreal_fantasy", data_dir=clean, split="train")
    instruction = data[3]["instruction"]
    assert instruction not in left["instruction"]
    assert len(left) == 6 - data["instruction"].count(instruction)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "out", "--data-dir", "missing"], "missing"),
        (["build", "out", "--max-shard-size", "many"], "many"),
        (["stats", "--data-dir", "missing"], "--data-dir is not a folder: "),
        (["stats", "--data-dir", "data_dir/missing"], "/data_dir/missing"),
        (["export", "jsonl", "out", "--data-dir", "missing"], "--data-dir is not a folder: "),
        (["overlap", "--benchmark", "b=missing.jsonl"], "error: missing.jsonl: No such file or directory"),
        (["overlap", "--benchmark", "prompts.jsonl"], "'prompts.jsonl' is none of geneval_pp, "),
    ],
)
def test_data_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    hub_layout: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--data-dir" not in arguments:
        arguments = [*arguments, "--data-dir", str(hub_layout)]
    assert main(["data", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("echo4o: error: ") and message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["build", "out"], ["stats"], ["export", "jsonl", "out"]])
def test_data_without_network(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", *command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("echo4o: error: ") and "as --data-dir" in line


def test_data_names_the_broken_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "hub", 3)
    metadata = tmp_path / "hub/Surrel-Fantasy-Image/conflict.jsonl"
    lines = metadata.read_text().splitlines()
    metadata.write_text("\n".join([lines[0], "{", lines[2]]) + "\n")
    arguments = ["--data-dir", str(tmp_path / "hub"), "--subset", "surreal_fantasy"]
    for command in (["build", str(tmp_path / "built")], ["stats"]):
        assert main(["data", *command, *arguments]) == 2
        last = capsys.readouterr().err.rsplit("\r", 1)[-1].splitlines()[-1]
        assert last.startswith("echo4o: error: ") and "conflict.jsonl" in last and "line 2" in last
    assert main(["data", "build", str(tmp_path / "built"), *arguments, "--on-error", "skip"]) == 0
    assert "surreal_fantasy: 2 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats", "--data-dir", "folder", "--revision", "x"], "--revision: not allowed with argument --data-dir"),
        (["stats", "--subset", "all"], "invalid choice: 'all'"),
        (["export", "zip", "out"], "invalid choice: 'zip'"),
    ],
)
def test_data_options_that_make_no_sense(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["data", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


ITEMS = [
    {"tag": "counting", "prompt": "two red circles", "include": [{"class": "circle", "count": 2, "color": "red"}]},
    {"tag": "color_attr", "prompt": "a blue star", "include": [{"class": "star", "count": 1, "color": "blue"}]},
]


def generate_benchmark(folder: Path, *options: str) -> int:
    items = folder / "items.jsonl"
    items.write_text("".join(json.dumps(item) + "\n" for item in ITEMS), encoding="utf-8")
    arguments = ["--model", MODEL, "--benchmark", "geneval_pp", "--items", str(items), "-o", str(folder / "out")]
    return main(["generate", *arguments, "--steps", "2", *options])


def test_generate_a_benchmark_and_evaluate_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--images-per-prompt", "2", "--batch-size", "3", "--pipeline-argument", "guidance_interval=[0.1, 0.9]"]
    assert generate_benchmark(tmp_path, *options) == 0
    assert capsys.readouterr().out == f"4 drawn, 0 were there already\n{tmp_path / 'out'}\n"
    lines = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == ["0_0.png", "0_1.png", "1_0.png", "1_1.png"]
    assert lines[3]["prompt"] == "a blue star" and lines[3]["parameters"]["guidance_interval"] == [0.1, 0.9]
    assert generate_benchmark(tmp_path, *options) == 0
    assert capsys.readouterr().out.startswith("0 drawn, 4 were there already\n")
    arguments = ["--images", str(tmp_path / "out"), "--items", str(tmp_path / "items.jsonl"), "--judge", "shapes"]
    results = tmp_path / "results.json"
    assert main(["evaluate", "geneval_pp", *arguments, "--output", str(results)]) == 0
    items = json.loads(results.read_text(encoding="utf-8"))["items"]
    assert [len(item["images"]) for item in items] == [2, 2]
    assert all(image["verdict"]["unscored"] is None for item in items for image in item["images"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pipeline-argument", "guidance=3"], "Echo4oPipeline takes no guidance; did you mean guidance_"),
        (["--pipeline-argument", "num_inference_steps=3"], "num_inference_steps is given twice: 2 and 3"),
        (["--pipeline-argument", "height=33"], "item 0: height=33"),
        (["--steps", "1001"], "item 0: num_inference_steps=1001 must be at most 1000"),
        (["--image", "a.png"], "--image goes with PROMPT, not with --benchmark"),
        (["--seeds", "0-2"], "--seeds goes with PROMPT or --prompts, not with --benchmark"),
        (["--batch-size", "0"], "batch_size=0 must be at least 1"),
        (["--items", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_mistakes_of_generate_with_a_benchmark(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate_benchmark(tmp_path, *options) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_options_of_a_benchmark_want_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tmp_path / "out.png", "--pipeline-argument", "eta=1") == 2
    assert "--pipeline-argument goes only with --benchmark" in capsys.readouterr().err
