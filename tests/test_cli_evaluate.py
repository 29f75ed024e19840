"""`echo4o evaluate`, `install-metrics` and `hub metric`, run for real on pictures of the shapes world."""

import json
from pathlib import Path

import numpy as np
import pytest

from echo4o_hf.benchmarks.results import read_results
from echo4o_hf.cli import main
from echo4o_hf.cli.evaluate import _usage
from echo4o_hf.cli.parser import build_parser
from echo4o_hf.miniature.captions import scene_for
from echo4o_hf.miniature.items import load_items
from echo4o_hf.miniature.world import render


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Every tenth item of Shapes-140 in items.jsonl, their pictures in images/."""
    rng = np.random.default_rng(0)
    items = load_items()[::10]
    (tmp_path / "images").mkdir()
    for number, item in enumerate(items):
        render(scene_for(item, rng), rng).save(tmp_path / "images" / f"{number:05}.png")
    (tmp_path / "items.jsonl").write_text("\n".join(json.dumps(item.to_dict()) for item in items))
    return tmp_path


def evaluate(folder: Path, *options: str, images: str = "images", judge: str = "shapes") -> int:
    arguments = ["--images", str(folder / images), "--judge", judge, "-o", str(folder / "results.json"), *options]
    return main(["evaluate", "geneval_pp", *arguments, "--items", str(folder / "items.jsonl")])


def test_evaluate(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(shapes) == 0
    results = read_results(shapes / "results.json")
    assert results["scores"]["geneval_pp"] == 1.0 and results["scores"]["num_items"] == 14
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["geneval_pp", "1.000"] and out[-1] == str(shapes / "results.json")
    assert "shapes: 14 calls, 0 replies from the store" in out  # no tokens, so no cost
    assert {path.name for path in shapes.iterdir() if "sqlite" not in path.suffix} == {
        "images",
        "items.jsonl",
        "results.json",
    }
    (shapes / "images" / "00003.png").unlink()
    assert evaluate(shapes, "--store", str(shapes / "verdicts.sqlite")) == 0
    out = capsys.readouterr().out
    assert "shapes: 0 calls, 13 replies from the store" in out and "1 unscored: no image" in out


def test_evaluate_with_several_judges_and_repeats(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shapes / "no.jsonl").write_text('{"prompt": "", "reply": "{\\"correct\\": 0}"}\n')
    assert evaluate(shapes, "--judge", f"scripted:{shapes / 'no.jsonl'}", "--repeats", "2") == 0
    results = read_results(shapes / "results.json")
    assert results["repeats"] == 2 and len(results["self_agreement"]) == 2
    assert [scores["accuracy"] for scores in results["per_judge"].values()] == [1.0, 0.0]
    assert "14 unscored: a tie" in capsys.readouterr().out


def test_each_judge_has_options_of_its_own() -> None:
    given = (
        "--judge-option a=1 --judge x --judge-option b=[2,8] --judge y --judge-option a=2 --judge-option c=z --judge w"
    )
    arguments = ["evaluate", "geneval_pp", "--images", "i", "-o", "o", *given.split()]
    for _ in range(2):  # nothing is left of the first time
        judges = build_parser().parse_args(arguments).judges
        assert judges == [("x", {"a": 1, "b": [2, 8]}), ("y", {"a": 2, "c": "z"}), ("w", {"a": 1})]


def test_usage_of_a_judge() -> None:
    judge = {"calls": 2, "from_store": 1, "input_tokens": 0, "output_tokens": None, "cost": None, "total_cost": None}
    assert list(_usage(judge)) == ["2 calls", "1 replies from the store"]
    paid = {**judge, "input_tokens": 900, "output_tokens": 14, "cost": 0.0019, "total_cost": 0.5}
    assert list(_usage(paid))[2:] == [
        "900 tokens in",
        "14 out",
        "estimated cost 0.0019 (0.5000 with what the store holds)",
    ]


def test_evaluate_exits_with_2_where_nothing_could_be_judged(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shapes / "refusal.jsonl").write_text('{"prompt": "", "reply": "I cannot help with that."}\n')
    assert evaluate(shapes, judge=f"scripted:{shapes / 'refusal.jsonl'}") == 2
    assert "echo4o: error: nothing could be judged; the first picture: the judge refused" in capsys.readouterr().err
    assert read_results(shapes / "results.json")["scores"]["geneval_pp"] is None
    prompt = json.loads((shapes / "items.jsonl").read_text().splitlines()[0])["prompt"]
    with (shapes / "refusal.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": prompt, "reply": '{"correct": 1}'}))
    assert evaluate(shapes, judge=f"scripted:{shapes / 'refusal.jsonl'}") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "missing"}, "missing is no folder"),
        ({"judge": "gpt-4.1"}, "'gpt-4.1'"),
        ({"judge": "openai:gpt-4.1"}, "OPENAI_API_KEY"),
        ({"options": ["--judge-option", "temperature=0"]}, "shapes takes other options than temperature"),
        ({"options": ["--judge", "shapes"]}, "several with different names; got ['shapes', 'shapes']"),
        ({"options": ["--concurrency", "0"]}, "concurrency must be at least 1, got 0"),
        ({"options": ["--repeats", "0"]}, "repeats must be at least 1; got 0"),
        ({"options": ["--numbering", "1"]}, "there is no item 0"),
        ({"options": ["--numbering", "id"]}, "must be one of 0, 1 for these items"),
        ({"options": ["--judge-text", "missing.py"]}, "missing.py"),
    ],
)
def test_evaluate_mistakes(
    options: dict, message: str, shapes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    options = dict(options)
    assert evaluate(shapes, *options.pop("options", []), **options) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("echo4o: error: ") and message in line and "replies so far" not in line
    assert not (shapes / "results.json").exists()


def test_evaluate_names_the_broken_item(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (shapes / "items.jsonl").open("a") as file:
        file.write('\n{"tag": "counting"}\n')
    assert evaluate(shapes) == 2
    assert "items.jsonl:15" in capsys.readouterr().err


def test_install_metrics_and_hub_metric(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", tmp_path / "modules")
    assert main(["install-metrics"]) == 0
    installed = capsys.readouterr().out.splitlines()
    assert [Path(line).name for line in installed] == ["geneval_pp.py", "imagine_bench.py"]
    assert all(Path(line).is_relative_to(tmp_path / "modules") for line in installed)
    assert main(["hub", "metric", "geneval_pp", "--output", str(tmp_path / "geneval_pp")]) == 0
    assert str(tmp_path / "geneval_pp" / "app.py") in capsys.readouterr().out.splitlines()
    assert main(["hub", "metric", "geneval_pp", "--output", str(tmp_path), "--push-to-hub", "me/x"]) == 2
    assert "offline" in capsys.readouterr().err
