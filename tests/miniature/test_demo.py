import json

import pytest

from echo4o_hf.benchmarks.results import read_results
from echo4o_hf.miniature import demo, training
from echo4o_hf.miniature.items import TAGS
from echo4o_hf.pipeline.pipeline_echo4o import Echo4oPipeline


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(demo, "QUICK", {"items_per_tag": 1, "examples": 6, "steps": 2})
    monkeypatch.setattr(training, "BATCH_SIZE", 2)
    monkeypatch.setattr("echo4o_hf.miniature.scoring.STEPS", 2)


def test_the_journey_leaves_a_report_and_goes_on_where_it_was(tiny, tmp_path, capsys, monkeypatch):
    output = tmp_path / "demo"
    results = demo.run_demo(output, quick=True, control=True)
    assert list(results["runs"]) == ["bagel-miniature", "fine-tuned", "control", "echo4o-miniature"]
    assert all(run["num_items"] == 7 and set(run["per_tag"]) == set(TAGS) for run in results["runs"].values())
    assert json.loads((output / "summary.json").read_text()) == results
    scored = read_results(output / "control.scores.json")
    assert scored["benchmark"] == "shapes_140" and scored["scores"] == results["runs"]["control"]
    page = (output / "report.html").read_text()
    assert (
        page.count("data:image/png;base64,") >= 28 and "NaN" not in (output / "fine-tuned.training.json").read_text()
    )
    printed = capsys.readouterr().out
    assert "Shapes-140" in printed and "2 steps are too few to learn; without --quick there are 500" in printed
    assert isinstance(Echo4oPipeline.from_pretrained(output / "fine-tuned"), Echo4oPipeline)

    (output / "echo4o-miniature.scores.json").unlink()

    def fail(*args, **kwargs):
        raise AssertionError("a finished stage ran again")

    monkeypatch.setattr(demo, "train", fail)
    again = demo.run_demo(output, quick=True, control=True)
    assert again["runs"] == results["runs"]
    assert " s; the pictures are in " in capsys.readouterr().out
    demo.run_demo(output, quick=True, control=True)
    assert f"all of it was there already; the pictures are in {output / 'report.html'}" in capsys.readouterr().out


def test_other_settings_start_over_but_foreign_files_are_kept(tmp_path):
    demo._start_over_if_changed(tmp_path / "new", {"seed": 0})
    (tmp_path / "new" / "old.json").touch()
    demo._start_over_if_changed(tmp_path / "new", {"seed": 0})
    assert (tmp_path / "new" / "old.json").exists()
    demo._start_over_if_changed(tmp_path / "new", {"seed": 1})
    assert not (tmp_path / "new" / "old.json").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").touch()
    with pytest.raises(ValueError, match="give an empty folder"):
        demo._start_over_if_changed(foreign, {"seed": 0})
    assert (foreign / "thesis.txt").exists()
