"""benchmark/judging.py at tiny size."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmark" / "judging.py"


def test_judging_prints_the_ratio_to_the_ideal():
    arguments = ["--calls", "12", "--concurrency", "4", "--latency", "0.2", "--side", "64"]
    run = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=True)
    for calls in (12, 48):
        (row,) = re.findall(rf"^\| {calls} \| (.+) \|$", run.stdout, re.MULTILINE)
        seconds, ideal, ratio, cpu, latency, again, memory, _ = map(float, row.split(" | "))
        assert ideal == pytest.approx(calls / 4 * 0.2)
        assert seconds >= ideal and ratio == pytest.approx(seconds / ideal, abs=0.02)
        assert cpu > 0 and latency >= 0.2 and memory > 10 and again < seconds
