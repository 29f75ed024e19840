"""What a command is, and what several commands share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, NamedTuple

DTYPES = ("float32", "bfloat16", "float16")
BENCHMARKS = ("geneval_pp", "imagine_bench")


class Command(NamedTuple):
    """One word after `echo4o`, or after the name of a group."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


class Group(NamedTuple):
    """One word after `echo4o` that a command's name follows."""

    name: str
    help: str
    commands: tuple[Command, ...]


def name_and_value(text: str) -> tuple[str, Any]:
    """`NAME=VALUE`, the value being JSON or else a text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
