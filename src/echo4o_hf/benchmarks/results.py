"""The file of results: written in one piece, checked when read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

SCHEMA_VERSION = 1

# A type, a tuple of types, [the form of every entry], or a dict of keys that must be there; `Any` is not looked into.
_VERDICT = {"score": (int, float, NoneType), "reason": str, "parts": dict, "unscored": (str, NoneType)}
_SCHEMA: dict[str, Any] = {
    "schema_version": int,
    "benchmark": str,
    "protocol": str,
    "created": str,
    "seed": int,
    "software": dict,
    "items_sha256": str,
    "texts_sha256": (str, NoneType),
    "repeats": int,
    "deviations": [str],
    "judges": [
        {
            "name": str,
            "parameters": dict,
            "calls": int,
            "from_store": int,
            "failures": int,
            "input_tokens": (int, NoneType),
            "output_tokens": (int, NoneType),
            "prices": (list, NoneType),
            "cost": (int, float, NoneType),
            "total_cost": (int, float, NoneType),
        }
    ],
    "scores": dict,
    "per_judge": dict,
    "agreement": (dict, NoneType),
    "self_agreement": (dict, NoneType),
    "items": [
        {
            "id": (int, str),
            "group": str,
            "prompt": str,
            "item": dict,
            "checklist": (str, NoneType),
            "images": [
                {
                    "path": (str, NoneType),
                    "sha256": (str, NoneType),
                    "verdict": _VERDICT,
                    "judgements": [{"judge": str, "repeat": int, "reply": (str, NoneType), **_VERDICT}],
                }
            ],
        }
    ],
}


def write_results(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write what `evaluate_images` returned.

    Raises:
        OSError: the file cannot be written.
        ValueError: `results` are not such results.
    """
    _check(results, _SCHEMA, "results")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    # ASCII: prompts, replies and paths may hold half surrogate pairs, which UTF-8 has no bytes for.
    temporary.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="ascii")
    os.replace(temporary, path)


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check a file of results.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no results, or those of another schema version; file and place are named.
    """
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if isinstance(results, dict) and results.get("schema_version") != SCHEMA_VERSION:
        seen = results.get("schema_version")
        raise ValueError(f"{path}: schema_version is {seen!r}, this version of echo4o-hf reads {SCHEMA_VERSION}")
    _check(results, _SCHEMA, str(path))
    return dict(results)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _check(value: Any, schema: Any, where: str) -> None:
    if isinstance(schema, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: expected an object; got {type(value).__name__}")
        for key, inner in schema.items():
            if key not in value:
                raise ValueError(f"{where}: {key} is missing")
            _check(value[key], inner, f"{where}: {key}")
        if schema.keys() >= _VERDICT.keys() and (value["score"] is None) == (value["unscored"] is None):
            raise ValueError(f"{where}: exactly one of score and unscored must be null")
    elif isinstance(schema, list):
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected a list; got {type(value).__name__}")
        for place, entry in enumerate(value):
            _check(entry, schema[0], f"{where}[{place}]")
    else:
        types = schema if isinstance(schema, tuple) else (schema,)
        if not isinstance(value, types) or isinstance(value, bool):
            names = " or ".join("null" if one is NoneType else one.__name__ for one in types)
            raise ValueError(f"{where}: expected {names}; got {value!r:.80}")
