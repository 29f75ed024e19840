"""`echo4o app`: what is wrong is told in one line before a model is loaded."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from echo4o_hf.cli import main

MODEL = "echo4o-miniature"


def test_without_gradio_the_extra_is_named() -> None:
    code = "import sys; sys.modules['gradio'] = None; from echo4o_hf.cli import main as m; m(['app', '--model', 'x'])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stderr.splitlines()[-1] == "echo4o: error: echo4o app needs gradio: pip install 'echo4o-hf[app]'"


def test_a_folder_without_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["app", "--model", MODEL, "--lora", str(tmp_path)]) == 2
    assert "there is no adapter_config.json in it" in capsys.readouterr().err


def test_a_port_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["app", "--model", MODEL, "--output", str(tmp_path), "--port", str(port)]) == 2
    assert str(port) in capsys.readouterr().err
