"""What each open page runs, may stop and may name, and how it is told what went wrong."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from threading import Event

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder, is_in_or_equal

from ..pipeline.memory import is_out_of_memory
from .studio import Studio

MODEL = "model"  # what all calls of the model wait for, in Gradio's queue


class Runs:
    """The runs of a tab on all open pages, which wait for the model or have it.

    Args:
        studio: where they run.
    """

    def __init__(self, studio: Studio) -> None:
        """See the class."""
        self.studio = studio
        self._stops: dict[tuple[str | None, str], Event] = {}  # by session and run

    def begin(self, request: gr.Request) -> str:
        """A run of the page, which Stop reaches from now on, until `end`."""
        run = secrets.token_hex(8)
        self._stops[request.session_hash, run] = Event()
        return run

    def end(self, request: gr.Request, run: str) -> None:
        """The run is over, or never came to the model."""
        self._stops.pop((request.session_hash, run), None)

    def there_are(self, request: gr.Request) -> bool:
        """Whether the page has runs in this tab."""
        return any(session == request.session_hash for session, _ in list(self._stops))

    def stop(self, request: gr.Request) -> None:
        """Stop all runs of the page in this tab."""
        for (session, _), stop in list(self._stops.items()):
            if session == request.session_hash:
                self.studio.stop(stop)

    def leave(self, request: gr.Request) -> None:
        """Stop them, for the page is closed; those that still wait will find themselves unknown."""
        self.stop(request)
        for session, run in list(self._stops):
            if session == request.session_hash:
                self.end(request, run)

    @contextmanager
    def during(self, request: gr.Request, run: str) -> Iterator[Event]:
        """What stops a run, while it has the model; errors that the user can mend become messages.

        Args:
            request: of the page.
            run: from `begin`; "" for a call over HTTP, which has not begun.
        """
        run = run or self.begin(request)
        stop = self._stops.get((request.session_hash, run))
        if stop is None:
            stop = Event()
            stop.set()
        try:
            yield stop
        except (ValueError, OSError, ImportError) as error:
            raise message(str(error)) from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise message(
                "There is not enough memory for this: draw fewer or smaller images, or take fewer references."
            ) from error
        finally:
            self.end(request, run)


def message(text: str) -> gr.Error:
    """What the user can mend: the page shows a warning, callers over HTTP get this error; no trace in the terminal."""
    text = escape(text, quote=False)
    gr.Warning(text, duration=15)
    return gr.Error(text, visible=False, print_exception=False)


def uploaded(paths: Iterable[str]) -> list[Path]:
    """Files that pages have sent; Gradio does not always look whether a client names others of this machine.

    Raises:
        gr.Error: a file that was not sent.
    """
    files = [Path(path) for path in paths]
    for file in files:
        if not is_in_or_equal(file, get_upload_folder()):
            raise message(f"{file.name} was not uploaded: drop it onto the page.")
    return files


def served(path: str) -> str:
    """A copy of a file that Gradio sends to the page, wherever the file is."""
    return save_file_to_cache(path, get_upload_folder())
