"""The benchmarks' own files: items and judge texts, read at run time from one pinned revision and never shipped.

A file is downloaded once, checked against its sha256, and kept below `HF_HOME/echo4o/benchmarks`. The judge texts
stand in Python files: those are parsed with `ast` and never executed.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from string import Formatter
from typing import Any
from urllib.parse import quote

SOURCE = "https://raw.githubusercontent.com"
SOURCE_VARIABLE = "ECHO4O_BENCHMARK_SOURCE"
TIMEOUT = 30.0  # seconds, per request


@dataclass(frozen=True)
class PinnedFile:
    """A file of a public repository at one commit."""

    repository: str
    revision: str
    path: str
    sha256: str

    @property
    def address(self) -> str:
        """Where it is: below `SOURCE`, or below the mirror that ECHO4O_BENCHMARK_SOURCE names."""
        base = os.environ.get(SOURCE_VARIABLE) or SOURCE
        return f"{base.rstrip('/')}/{self.repository}/{self.revision}/{quote(self.path)}"


def _echo4o(path: str, sha256: str) -> PinnedFile:
    return PinnedFile("yejy53/Echo-4o", "28f36d76558e5f53b9deceda78bf025ef0d0ea24", path, sha256)


ITEMS = {
    "geneval_pp": _echo4o(
        "test_scripts/Geneval++.jsonl", "9c1216a3f6fe2d99e4ffd63f3a6dba71f3dd7ab30a7c09cb41f03629b35d3e8f"
    ),
    "imagine_bench": _echo4o(
        "test_scripts/Imagine.jsonl", "e22e33dd5e2722b9fedfb7ecddeb56841ec6ea93b3f0246a04d8dd374ab5a19e"
    ),
}
ITEMS_SHA256 = {  # `items_sha256` of these
    "geneval_pp": "53cd0eee49975442f44779d1e2db036b00cead7be4af3e1b1af1894607645338",
    "imagine_bench": "9ae7cfd0de83f85e800cc9a9eedd347365b3f7bc7dabedb42d6af77aa181b98f",
}
JUDGE_TEXTS = {
    "geneval_pp": _echo4o(
        "test_scripts/Eval-gpt-4.1-geneval++.py", "59329c7db829f4ee9837a33d90b2e111297752348217401c362407b20bdd6f83"
    ),
    "imagine_bench": _echo4o(
        "test_scripts/Eval-gpt-4.1-Imagine.py", "0dd6a1214c6b1fa9007d915bcf5cc7c3cf4a900db5b3de3c8d83c20af0d844d3"
    ),
}


def load_items(name: str, path: str | os.PathLike[str] | None = None) -> list[dict[str, Any]]:
    """The items of a benchmark, checked, in the file's order.

    Args:
        name: "geneval_pp" or "imagine_bench".
        path: A JSON Lines file of the same form; the pinned one when None.

    Raises:
        ValueError: the name is none of these, or a line of the file is not an item (file and line are named).
        OSError: the pinned file is neither here nor to be had, or `path` cannot be read.
    """
    _check_name(name)
    source = Path(path) if path is not None else pinned_path(ITEMS[name], f"load_items({name!r}, path=...) or --items")
    return read_items(name, source)


def read_items(name: str, path: Path) -> list[dict[str, Any]]:
    """Read and check a file of items; see `load_items`."""
    from echo4o_hf.benchmarks import geneval_pp, imagine_bench

    validate = {"geneval_pp": geneval_pp.validate_item, "imagine_bench": imagine_bench.validate_item}[name]
    items: list[dict[str, Any]] = []
    seen: dict[Any, str] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        validate(item, where)
        if (own := item.get("id")) is not None and seen.setdefault(own, where) != where:
            raise ValueError(f"{where} has the id of {seen[own]}: {own!r}")
        items.append(item)
    if not items:
        raise ValueError(f"{path} holds no items")
    return items


def items_sha256(items: Iterable[Mapping[str, Any]]) -> str:
    """The sha256 of the items' canonical JSON: the same whatever the file's spacing and order of keys."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n")
    return digest.hexdigest()


def pinned_path(file: PinnedFile, instead: str) -> Path:
    """The pinned file on this machine, downloaded when it is not here yet.

    Args:
        file: Which.
        instead: What the user can pass instead, for the error.

    Raises:
        OSError: it cannot be had, or what was sent is another file.
    """
    from huggingface_hub.constants import HF_HOME

    target = Path(HF_HOME, "echo4o", "benchmarks", file.revision, file.path)
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == file.sha256:
        return target
    content = _download(file.address, instead)
    seen = hashlib.sha256(content).hexdigest()
    if seen != file.sha256:
        raise OSError(f"{file.address} is not the pinned file: sha256 {seen}, expected {file.sha256}")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    os.replace(partial, target)
    return target


def _download(address: str, instead: str) -> bytes:
    from huggingface_hub.utils import http_backoff, httpx  # type: ignore[attr-defined]

    try:
        response = http_backoff(
            "GET", address, max_retries=2, base_wait_time=0.5, timeout=TIMEOUT, follow_redirects=True
        )
        response.raise_for_status()
    except (httpx.HTTPError, OSError) as error:
        raise OSError(
            f"{address} is not on this machine and cannot be downloaded ({error}). Get it on another machine and pass"
            f" {instead}, or set {SOURCE_VARIABLE} to a mirror of {SOURCE}."
        ) from error
    return bytes(response.content)


@dataclass(frozen=True)
class JudgeText:
    """What the official script says to its judge.

    Attributes:
        system: The system message.
        user: Of the user message, the text (even positions) and names of item fields (odd ones); () when the
            benchmark's module writes it.
        pinned: Whether it comes from the pinned file, or an exact copy.
    """

    system: str
    user: tuple[str, ...] = ()
    pinned: bool = False

    def fill(self, item: Mapping[str, Any]) -> str:
        """The user message for one item."""
        return "".join(part if index % 2 == 0 else str(item[part]) for index, part in enumerate(self.user))


def official_text(name: str, path: str | os.PathLike[str] | None = None) -> JudgeText:
    """The official judge text of a benchmark.

    Args:
        name: "geneval_pp" (its user message is `geneval_pp.checklist`'s) or "imagine_bench".
        path: A copy of the official Python file; the pinned one when None.

    Raises:
        ValueError: the name is none of these, or the file does not hold the texts in a form that can be read.
        OSError: the pinned file is neither here nor to be had, or `path` cannot be read.
    """
    _check_name(name)
    instead = f"judge_text=... (--judge-text, official_text({name!r}, path=...)), use protocol='strict'"
    source = Path(path) if path is not None else pinned_path(JUDGE_TEXTS[name], instead)
    content = source.read_bytes()
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{source} is not Python: {error}") from error
    try:
        text = JudgeText(_constant(tree, "SYSTEM_PROMPT")) if name == "geneval_pp" else _messages(tree)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    unix = content.replace(b"\r\n", b"\n")  # git on Windows writes the other
    return replace(text, pinned=hashlib.sha256(unix).hexdigest() == JUDGE_TEXTS[name].sha256)


def _check_name(name: str) -> None:
    if name not in ITEMS:
        raise ValueError(f"the benchmark must be one of {', '.join(ITEMS)}; got {name!r}")


def _assignments(body: Iterable[ast.AST]) -> dict[str, ast.expr]:
    """What each name is set to, the last time counting."""
    found: dict[str, ast.expr] = {}
    for node in body:
        if isinstance(node, ast.Assign):
            found |= {target.id: node.value for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found[node.target.id] = node.value
    return found


def _constant(tree: ast.Module, name: str) -> str:
    names = _assignments(tree.body)
    if name not in names:
        raise ValueError(f"no constant {name}; found {', '.join(names) or 'none'}")
    parts = _pieces(names[name], names)
    if len(parts) != 1 or not parts[0].strip():
        raise ValueError(f"{name} is not a fixed text: line {names[name].lineno}")
    return parts[0]


def _messages(tree: ast.Module) -> JudgeText:
    """The system and the user text in `build_messages`."""
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if "build_messages" not in functions:
        raise ValueError(f"no function build_messages; found {', '.join(functions) or 'none'}")
    nodes = list(ast.walk(functions["build_messages"]))
    names = _assignments(tree.body) | _assignments(nodes)
    texts: dict[str, list[tuple[str, ...]]] = {"system": [], "user": []}
    for node in nodes:
        if isinstance(node, ast.Dict):
            entries = _entries(node)
            role = entries.get("role")
            if isinstance(role, ast.Constant) and role.value in texts and "content" in entries:
                texts[role.value].extend(_pieces(part, names) for part in _text_nodes(entries["content"]))
    found = ", ".join(f"{len(parts)} {role}" for role, parts in texts.items())
    if [len(parts) for parts in texts.values()] != [1, 1]:
        raise ValueError(f"build_messages should hold one system and one user text; found {found}")
    (system,), (user,) = texts.values()
    if len(system) != 1 or not system[0].strip():
        raise ValueError(f"the system text should be fixed; it names {', '.join(system[1::2])}")
    if set(user[1::2]) != {"instruction", "note"}:
        raise ValueError(f"the user text should name instruction and note; it names {', '.join(user[1::2]) or 'none'}")
    return JudgeText(system[0], user)


def _text_nodes(content: ast.expr) -> list[ast.expr]:
    """The text parts of a message's content: itself, or the {"type": "text", "text": ...} of a list."""
    if not isinstance(content, ast.List):
        return [content]
    entries = [_entries(part) for part in content.elts if isinstance(part, ast.Dict)]
    return [entry["text"] for entry in entries if "text" in entry]


def _entries(node: ast.Dict) -> dict[Any, ast.expr]:
    pairs = zip(node.keys, node.values, strict=True)
    return {key.value: value for key, value in pairs if isinstance(key, ast.Constant)}


def _pieces(node: ast.expr, names: Mapping[str, ast.expr]) -> tuple[str, ...]:
    """A text expression as text and names of item fields, by turns; begins and ends with text."""
    match node:
        case ast.Constant(value=str(text)):
            return (text,)
        case ast.JoinedStr(values=values):
            return _joined(_pieces(value, names) for value in values)
        case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
            return _pieces(value, names)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _joined([_pieces(left, names), _pieces(right, names)])
        case ast.Call(func=ast.Attribute(value=text, attr="format"), args=args, keywords=keywords):
            given = dict(enumerate(args)) | {keyword.arg: keyword.value for keyword in keywords}
            return _formatted(_pieces(text, names), {str(key): _pieces(value, names) for key, value in given.items()})
        case ast.Call(func=ast.Attribute(value=text, attr="strip"), args=[], keywords=[]):
            first, *others = _pieces(text, names)
            return (first.strip(),) if not others else (first.lstrip(), *others[:-1], others[-1].rstrip())
        case (
            ast.Subscript(slice=ast.Constant(value=str(field)))
            | ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value=str(field)), *_])
        ):
            return ("", field, "")
        case ast.Name(id=name) if name in names:
            return _pieces(names[name], {other: value for other, value in names.items() if other != name})
        case ast.Name(id=name):
            return ("", name, "")
    raise ValueError(f"line {node.lineno}: expected a text, found {ast.unparse(node)[:80]}")


def _joined(texts: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    joined = [""]
    for first, *others in texts:
        joined[-1] += first
        joined += others
    return tuple(joined)


def _formatted(template: tuple[str, ...], given: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """What `str.format` makes of a fixed template."""
    if len(template) != 1:
        raise ValueError("a text is formatted twice")
    parts: list[tuple[str, ...]] = []
    position = 0
    for literal, name, spec, conversion in Formatter().parse(template[0]):
        parts.append((literal,))
        if name is not None:
            key = name or str(position)
            position += not name
            if key not in given or spec or conversion:
                raise ValueError(f"cannot fill {{{name}}}; given are {', '.join(given) or 'none'}")
            parts.append(given[key])
    return _joined(parts)
