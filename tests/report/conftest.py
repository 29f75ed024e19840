"""`from report_results import ...` in the tests of this folder, and two runs with their pictures."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from echo4o_hf.report.runs import Run

sys.path.insert(0, str(Path(__file__).parent))

from report_results import entry, results_of, verdict  # noqa: E402


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "0.png")
    Image.new("RGB", (2048, 1024), "blue").save(folder / "1.jpg")
    return [folder / "0.png", folder / "1.jpg"]


@pytest.fixture
def run(pictures: list[Path], tmp_path: Path) -> Run:
    images = [
        entry(pictures[0], verdict(1.0, "three cats")),
        entry(pictures[1], verdict(0.0, "one dog")),
        entry(None, verdict(None, unscored="no image")),
    ]
    return Run("ours", results_of(images, 0.5), tmp_path)


@pytest.fixture
def other(pictures: list[Path], tmp_path: Path) -> Run:
    images = [
        entry(pictures[0], verdict(1.0, "three cats")),
        entry(pictures[1], verdict(1.0, "two dogs")),
        entry(pictures[1], verdict(None, "?", "no verdict in the reply")),
    ]
    return Run("theirs", results_of(images, 0.75), tmp_path)
