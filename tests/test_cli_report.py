"""`echo4o report`, on what `echo4o evaluate` wrote."""

import json
from pathlib import Path

import numpy as np
import pytest

from echo4o_hf.cli import main
from echo4o_hf.miniature.captions import scene_for
from echo4o_hf.miniature.items import load_items
from echo4o_hf.miniature.world import render


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Results of two models: one that draws every item right, and one that draws the one before."""
    folder = tmp_path_factory.mktemp("results")
    rng = np.random.default_rng(0)
    items = load_items()[::20]
    (folder / "items.jsonl").write_text("\n".join(json.dumps(item.to_dict()) for item in items))
    paths = []
    for model, shift in (("right", 0), ("wrong", 1)):
        (folder / model).mkdir()
        for place in range(len(items)):
            picture = render(scene_for(items[place - shift], rng), rng)
            picture.save(folder / model / f"{place}.png")
        paths.append(folder / model / "results.json")
        arguments = ["--images", str(folder / model), "--items", str(folder / "items.jsonl"), "--judge", "shapes"]
        assert main(["evaluate", "geneval_pp", *arguments, "-o", str(paths[-1])]) == 0
    return paths


def report(*arguments: str | Path) -> int:
    return main(["report", *map(str, arguments)])


def test_one_page_of_two_models(results: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "new folder/report.html"
    assert report(*results, "-o", page, "--title", "Two <models>") == 0
    assert capsys.readouterr() == (f"{page}\n", "")
    text = page.read_text(encoding="utf-8")
    assert "<title>Two &lt;models&gt;</title>" in text and "McNemar exact" in text
    assert text.count("<img ") == 14 and text.count("✓ right") == 7
    assert "right/results" in text and "wrong/results" in text  # the files have the same name
    assert "GPT-4o" not in text  # these are not the benchmark's items


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("markdown", "| **a** | 1.000 |"),
        ("latex", "a & 1.000 &"),
        ("model-index", "name: GenEval++'s protocol, other items\n"),
    ],
)
def test_texts(results: list[Path], tmp_path: Path, form: str, expected: str) -> None:
    assert report(results[0], "-o", tmp_path / "out", "--format", form, "--name", "a") == 0
    assert expected in (tmp_path / "out").read_text(encoding="utf-8")


def test_pictures_that_are_gone_are_told(
    results: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = json.loads(results[0].read_text())
    for item in moved["items"]:
        item["images"][0]["path"] = "gone.png"
    (tmp_path / "moved.json").write_text(json.dumps(moved))
    assert report(tmp_path / "moved.json", "-o", tmp_path / "report.html") == 0
    told = capsys.readouterr().err.splitlines()
    assert told == ["not shown: no such file: gone.png"] * 5 + ["7 pictures are not shown"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--name", "a", "--name", "b", "--name", "c"], "--name was given 3 times for 2 files"),
        (["--name", "a"], "two results of the same questions are called 'a'"),
        (["--format", "model-index"], "a model card is about one model, got "),
        (["missing.json"], "missing.json"),
        ([__file__], "test_cli_report.py is not JSON"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    results: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert report(*results, *options, "-o", tmp_path / "report.html") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("echo4o: error: ") and message in line
    assert not list(tmp_path.iterdir())
