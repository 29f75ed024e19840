"""The README is true: its commands parse, its code runs, its file map is the tree, its help is the command's."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_dataset
from PIL import Image

from echo4o_hf.cli import build_parser, main
from echo4o_hf.miniature.dataset import write_dataset
from echo4o_hf.training.arguments import parse_arguments

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAPPED_BY_FOLDER = {"tests", "examples", "benchmark", "checkpoints"}  # their files are not listed one by one


def blocks(language: str) -> list[str]:
    """The contents of the README's code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


HERE_DOCUMENT = re.compile(r"^cat > (\S+) <<'EOF'\n(.*?)^EOF\n", re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    texts = [HERE_DOCUMENT.sub("", block).replace("\\\n", "") for block in blocks("sh")]
    lines = [line for text in texts for line in text.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line]


def mapped_files() -> list[str]:
    """The paths of the file map, folders with a slash at the end."""
    (block,) = [block for block in blocks("text") if block.startswith("README.md")]
    parents: list[str] = []
    paths = []
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], name]
        paths.append("".join(parents))
    return paths


def files_of_the_tree() -> set[str]:
    """Tracked files, those of some folders as the folder alone."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout, so which files belong to the project is not known")
    run = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = set()
    for name in run.stdout.splitlines():
        parts = name.split("/")
        folders = [index for index, part in enumerate(parts[:-1]) if part in MAPPED_BY_FOLDER]
        paths.add("/".join(parts[: folders[0] + 1]) + "/" if folders else name)
    return {path for path in paths if not path.endswith("/__init__.py") or path.count("/") == 2}


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_exist(command: list[str]) -> None:
    program, *arguments = command
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{target}:.*## ", makefile, re.MULTILINE) for target in arguments)
    elif arguments[0] == "train" or program == "accelerate":
        after = arguments.index("train" if program == "echo4o" else "echo4o_hf.training.train") + 1
        assert (ROOT / arguments[after]).is_file()
        parse_arguments([str(ROOT / arguments[after]), *arguments[after + 1 :]])
    elif program == "echo4o":
        assert build_parser().parse_args(arguments).run
    elif program == "python":
        assert (ROOT / arguments[0]).is_file()
    else:
        assert command[:4] == ["pip", "install", "-c", "constraints.txt"]


def test_data_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_dataset("shapes", samples_per_subset=20)
    run = [command for command in commands() if command[:2] == ["echo4o", "data"]]
    assert [command[2] for command in run] == ["build", "stats", "export", "overlap"]
    for command in run:
        assert main(command[1:]) == 0
    written = {"stats.html", "overlap.html", "shapes-bagel", "shapes-clean", "shapes-parquet"}
    assert written < {path.name for path in tmp_path.iterdir()}
    assert load_dataset("./shapes-parquet", "multi_reference", split="train").num_rows == 20


def test_evaluate_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = [command for command in commands() if "shapes-images" in command or "shapes-results/results.json" in command]
    assert [command[1] for command in run] == ["generate", "evaluate", "report"]
    monkeypatch.chdir(tmp_path)
    items = Path("src/echo4o_hf/miniature/items.jsonl")
    items.parent.mkdir(parents=True)
    lines = (ROOT / items).read_text(encoding="utf-8").splitlines(keepends=True)
    items.write_text("".join(lines[:2]), encoding="utf-8")  # of 140, which take a minute
    for command in run:
        assert main(command[1:]) == 0
    assert "a green heart, one orange cross" in Path("shapes-results/report.html").read_text(encoding="utf-8")


def test_drawing_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks("sh"):
        for name, content in HERE_DOCUMENT.findall(block):
            Path(name).write_text(content, encoding="utf-8")
    run = [command for command in commands() if {"shapes.png", "prompts.txt"} & {*command}]
    assert [command[1] for command in run] == ["generate", "generate", "chat"]
    for command in run:
        assert main([*command[1:], *(["--steps", "1"] if command[1] == "generate" else [])]) == 0
    assert sorted(path.name for path in Path("drawn").glob("*_0.png")) == ["1_0.png", "2_0.png", "3_0.png"]
    assert Image.open("grid.png").size[0] > 4 * 64


def test_benchmark_commands_exist() -> None:
    text = (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
    scripts = re.findall(r"python (benchmark/\w+\.py)", text)
    assert scripts and all((ROOT / script).exists() for script in scripts)


@pytest.mark.parametrize("command", ["echo4o --help", "echo4o data --help"])
def test_help_is_the_commands(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(command.split()[1:])
    assert f"$ {command}\n{capsys.readouterr().out}" in blocks("text")


def test_file_map_is_the_tree() -> None:
    paths = [path for path in mapped_files() if not path.endswith("/") or path.split("/")[-2] in MAPPED_BY_FOLDER]
    assert len(paths) == len(set(paths))
    assert set(paths) == files_of_the_tree()


QUICK_TRAINING = """
--max_steps 1 --gradient_accumulation_steps 1 --max_tokens 512 --dataset_split train[:8]
--validation_inference_steps 1 --dataloader_num_workers 0 --report_to none
"""


def test_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (train,) = [command[1:] for command in commands() if "shapes-lora" in command and command[1] == "train"]
    assert main([*train[:1], str(ROOT / train[1]), *train[2:], *QUICK_TRAINING.split()]) == 0
    code = "\n".join(blocks("python"))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert Image.open(tmp_path / "shapes.png").size == (64, 64)
