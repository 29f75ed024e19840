"""Importing the package, or asking the command line for help, loads nothing heavy."""

import subprocess
import sys

import pytest

import echo4o_hf

HEAVY = {"torch", "transformers", "diffusers", "datasets", "evaluate", "gradio"}


def loaded_by(code: str) -> set[str]:
    """The heavy modules that a fresh interpreter has loaded after running `code`."""
    report = f"import sys; print('loaded:', *sorted({HEAVY!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(run.stdout.rsplit("loaded:", 1)[1].split())


def test_the_check_sees_heavy_modules() -> None:
    assert loaded_by("import sys; sys.modules['torch'] = sys") == {"torch"}


def test_import_is_light() -> None:
    assert loaded_by("import echo4o_hf") == set()


@pytest.mark.parametrize(
    "command", ["", "demo", "generate", "convert", "data", "data build", "data overlap", "evaluate", "hub metric"]
)
def test_help_is_light(command: str) -> None:
    code = f"""
from echo4o_hf.cli import main
try:
    main({[*command.split(), "--help"]!r})
except SystemExit as stop:
    assert not stop.code
"""
    assert loaded_by(code) == set()


@pytest.mark.parametrize("name", echo4o_hf.__all__)
def test_public_names_load(name: str) -> None:
    assert name in dir(echo4o_hf)
    assert getattr(echo4o_hf, name) is not None


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Bagle'"):
        echo4o_hf.Bagle  # noqa: B018
