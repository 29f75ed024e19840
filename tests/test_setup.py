"""setup.py, constraints.txt and the source tree agree."""

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import echo4o_hf

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "echo4o_hf"


def setup_argument(name: str) -> Any:
    """A literal argument of the call of `setup` in setup.py."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py has no {name}")


def requirements() -> dict[str, Requirement]:
    """All requirements by canonical name, extras included."""
    lines = [*setup_argument("install_requires"), *sum(setup_argument("extras_require").values(), [])]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def pinned() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_version_is_the_packages() -> None:
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.split()[-1] == echo4o_hf.__version__


@pytest.mark.parametrize("name", requirements())
def test_lower_bounds_are_the_tested_versions(name: str) -> None:
    (bound,) = requirements()[name].specifier
    assert bound.operator == ">="
    lowest = Version(bound.version)
    assert lowest.release == pinned()[name].release[: len(lowest.release)]


def test_every_import_is_declared() -> None:
    imported = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                imported.add(node.module.split(".")[0])
    outside = imported - sys.stdlib_module_names - {"echo4o_hf"}
    distributions = packages_distributions()
    names = {canonicalize_name(distributions[module][0]) for module in outside}
    extras = setup_argument("extras_require")
    lines = [
        *setup_argument("install_requires"),
        *(line for name in extras if name != "test" for line in extras[name]),
    ]
    assert names <= {canonicalize_name(Requirement(line).name) for line in lines}


def test_every_data_file_is_packaged() -> None:
    patterns = setup_argument("package_data")
    packaged = set()
    for package, globs in patterns.items():
        folder = ROOT / "src" / package.replace(".", "/")
        packaged.update(path for pattern in globs for path in folder.glob(pattern))
    data = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}}
    assert data <= packaged
