"""The rooms of the package: which may import which, and the module paths that saved checkpoints name."""

import ast
import importlib
import re
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
PACKAGE = SRC / "echo4o_hf"

MAY_IMPORT = {
    "data": set(),
    "model": set(),
    "judges": set(),
    "report": set(),
    "pipeline": {"model"},
    "training": {"model", "data", "pipeline", "benchmarks", "judges", "report"},
    "benchmarks": {"judges"},
    "miniature": {"data", "model", "judges", "report", "pipeline", "training", "benchmarks"},
}
EXCEPTIONS = {"judges/shapes.py": {"miniature"}}
ON_TOP = {"cli", "app"}  # may import everything; nobody imports them
ROOT = {"__init__", "_auto"}

FROZEN = {
    "echo4o_hf.model.configuration_bagel": ["BagelConfig"],
    "echo4o_hf.model.modeling_bagel": ["BagelForConditionalGeneration"],
    "echo4o_hf.model.image_processing_bagel": ["BagelImageProcessor"],
    "echo4o_hf.model.processing_bagel": ["BagelProcessor"],
    "echo4o_hf.pipeline.pipeline_echo4o": ["Echo4oPipeline"],
}


def room_of(path: Path) -> str:
    """The folder of a source file inside the package, or its own name at the top."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(source: str, package: str) -> set[str]:
    """Full names of all modules that `source`, a file of the package `package`, imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def imported_rooms(path: Path) -> set[str]:
    """The rooms, other than its own, that a source file imports from; "" is the top of the package."""
    package = ".".join(path.relative_to(SRC).parent.parts)
    known = {*MAY_IMPORT, *ON_TOP, *ROOT}
    rooms = set()
    for name in imported_modules(path.read_text(encoding="utf-8"), package):
        parts = name.split(".")
        if parts[0] == "echo4o_hf":
            rooms.add(parts[1] if len(parts) > 1 and parts[1] in known else "")
    return rooms - {room_of(path)}


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if room_of(path) not in ON_TOP | ROOT)


def test_imported_modules_sees_every_way_to_import() -> None:
    source = "import a.b\nfrom c import d\nfrom . import e\nfrom ..f import g\ndef h():\n    from .. import i\n"
    assert imported_modules(source, "p.q") == {"a.b", "c.d", "p.q.e", "p.f.g", "p.i"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    beyond = imported_rooms(path) - MAY_IMPORT[room_of(path)] - EXCEPTIONS.get(str(path.relative_to(PACKAGE)), set())
    assert not beyond, (
        f"{path.relative_to(SRC)} imports from {sorted(room or 'the top of echo4o_hf' for room in beyond)}"
    )


def test_every_folder_is_a_room() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert folders <= MAY_IMPORT.keys() | ON_TOP
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert files <= ON_TOP | ROOT


def test_no_room_is_a_drawer() -> None:
    names = {path.stem for path in PACKAGE.rglob("*")}
    assert names.isdisjoint({"utils", "util", "common", "core", "helpers", "misc"})


@pytest.mark.parametrize("module", FROZEN)
def test_frozen_module_paths(module: str) -> None:
    # model_index.json and config.json of saved checkpoints name these.
    loaded = importlib.import_module(module)
    for name in FROZEN[module]:
        assert getattr(loaded, name).__module__ == module


def test_the_table_in_contributing_is_this_one() -> None:
    text = (PACKAGE.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)/` \|.*\| ([^|]+) \|$", text, re.MULTILINE))
    assert rows.keys() == {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))}
    for room, allowed in rows.items():
        if room in ON_TOP:
            assert allowed == "everything; nobody imports it"
            continue
        expected = MAY_IMPORT[room]
        named = set(re.findall(r"`(\w+)`", allowed)) or (MAY_IMPORT.keys() - {room} if "any" in allowed else set())
        assert named == expected
