"""The examples run as they are."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
EXAMPLES = [path for path in EXAMPLES if path.stem != "learn_shapes"]  # half an hour: training/test_learning.py
SIZES = {"load_dataset": (608, 704)}  # three rows of up to two references and the output


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(script: Path, tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    printed = run.stdout.splitlines()
    assert printed
    for name in printed:
        if name.endswith(".png"):
            assert Image.open(tmp_path / name).size == SIZES.get(script.stem, (64, 64))
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {name for name in printed if name.endswith(".png")}
