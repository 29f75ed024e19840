"""What each open page may stop, and how it is told what went wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from threading import Event

import gradio as gr

from ..pipeline.memory import is_out_of_memory
from .studio import Studio

MODEL = "model"  # what all calls of the model wait for, in Gradio's queue


class Stops:
    """What the Stop buttons set, by session, while something waits or runs.

    Args:
        studio: where it runs.
    """

    def __init__(self, studio: Studio) -> None:
        """See the class."""
        self.studio = studio
        self._events: dict[str | None, Event] = {}

    def begin(self, request: gr.Request) -> None:
        """A session asks for something, and may stop it from now on."""
        self._events[request.session_hash] = Event()

    def stop(self, request: gr.Request) -> None:
        """Stop what the session asked for."""
        if request.session_hash in self._events:
            self.studio.stop(self._events[request.session_hash])

    @contextmanager
    def during(self, request: gr.Request) -> Iterator[Event]:
        """The session's event, during a call of the model; errors that the user can mend become messages."""
        event = self._events.setdefault(request.session_hash, Event())
        try:
            yield event
        except (ValueError, OSError, ImportError) as error:
            raise message(str(error)) from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise message(
                "There is not enough memory for this: draw fewer or smaller images, or take fewer references."
            ) from error
        finally:
            self._events.pop(request.session_hash, None)


def message(text: str) -> gr.Error:
    """An error as the page shows it, without a trace in the terminal."""
    return gr.Error(escape(text, quote=False), duration=15, print_exception=False)
