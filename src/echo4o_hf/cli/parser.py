"""All commands. Each imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import __version__
from .app import APP
from .chat import CHAT
from .command import Command, Group
from .convert import CONVERT
from .data import DATA
from .demo import DEMO
from .evaluate import EVALUATE, INSTALL_METRICS
from .generate import GENERATE
from .hub import HUB
from .report import REPORT
from .train import TRAIN

COMMANDS = (DEMO, GENERATE, CHAT, APP, CONVERT, DATA, TRAIN, EVALUATE, REPORT, INSTALL_METRICS, HUB)


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, without all options before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help says more)\n")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """What the parser of a command does not know is its error, not that of `echo4o`."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            hint = "" if unknown[0].startswith("-") else "; for several values, repeat the option before each"
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return known, unknown


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="echo4o", description="Echo-4o (Bagel) with transformers and diffusers.")
    parser.add_argument("--version", action="version", version=f"echo4o-hf {__version__}")
    _add_commands(parser, COMMANDS)
    return parser


def _add_commands(parser: argparse.ArgumentParser, commands: Sequence[Command | Group]) -> None:
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in commands:
        subparser = subparsers.add_parser(
            command.name, help=command.help, description=command.help[0].upper() + command.help[1:] + "."
        )
        if isinstance(command, Group):
            _add_commands(subparser, command.commands)
        else:
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, 2 for what the user can mend (one line on stderr says what), 130 after Ctrl-C.
    """
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError, ImportError) as error:
        return _failed(error)
    except (RuntimeError, MemoryError) as error:
        from ..pipeline.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return _failed(error, "out of memory: ")
    except KeyboardInterrupt as stop:
        print(f"echo4o: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


def _failed(error: Exception, prefix: str = "") -> int:
    """Say in one line what is wrong, and what the notes of the error advise."""
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:  # the system's, with a number before it
        text = f"{error.filename}: {error.strerror}"
    texts = [prefix, text, *getattr(error, "__notes__", [])]
    print("echo4o: error:", " ".join(" ".join(texts).split()), file=sys.stderr)
    return 2
