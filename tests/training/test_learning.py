"""Clean compositional data raises the score of the shipped base: the thesis of the paper in small."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "learn_shapes.py"
MARGIN = 0.05  # of the mean of tag accuracies on Shapes-140


@pytest.mark.slow
def test_fine_tuning_raises_the_score(tmp_path):
    run = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=True)
    lines = re.findall(r"^(\w+): (.+)$", run.stdout, re.MULTILINE)
    assert [name for name, _ in lines][-2:] == ["full", "lora"]
    for _, line in lines[-2:]:
        scores = [float(score) for score in re.findall(r"([.\d]+) at \d+", line)]
        assert scores[-1] >= scores[0] + MARGIN, run.stdout
    for name in ("learning.png", "before_after.png"):
        with Image.open(tmp_path / name) as picture:
            picture.load()
