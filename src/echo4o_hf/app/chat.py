"""Questions about pictures."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import gradio as gr

from .session import MODEL, Runs, message, uploaded
from .studio import Question, Studio, read_upload

Message = dict[str, Any]  # "role", and "content": a text, or {"path": ...}; of a new question "text" and "files"


class ChatTab:
    """The tab for questions.

    What was said is kept here, for a page could send anything as what it shows.

    Args:
        studio: answers them.
    """

    def __init__(self, studio: Studio) -> None:
        """See the class."""
        self.studio = studio
        self.runs = Runs(studio)

    def build(self, adapter: gr.Dropdown, weight: gr.Slider) -> None:
        """Lay it out, and say what its parts do."""
        chatbot = gr.Chatbot(show_label=False, height=480, buttons=["copy"], feedback_options=None, elem_id="chat")
        asking = gr.MultimodalTextbox(
            file_count="multiple",
            file_types=["image"],
            placeholder="Drop pictures here, and ask",
            show_label=False,
            elem_id="question",
        )
        stop = gr.Button("Stop", variant="stop", size="sm", interactive=False, elem_id="stop-chat")
        with gr.Accordion("Settings", open=False), gr.Row():
            longest = self.studio.num_positions // 2
            max_new_tokens = gr.Slider(
                1, longest, min(1000, longest // 2), step=1, label="Tokens of the answer, at most", elem_id="tokens"
            )
            temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0: the likeliest word each time")
        said, run = gr.State([]), gr.Textbox("", label="Run", visible=False)

        asked = asking.submit(  # queued, for Gradio shows no errors of others; and at once
            self.ask,
            [asking, said],
            [chatbot, said, asking, stop, run],
            concurrency_limit=None,
            show_progress="hidden",
            api_name="ask",
        )
        answered = asked.success(
            self.answer,
            [max_new_tokens, temperature, adapter, weight, run, said],
            [chatbot, said, asking],
            concurrency_id=MODEL,
            concurrency_limit=1,
            show_progress_on=[chatbot],
            api_name="answer",
        )
        quiet: dict[str, Any] = {"queue": False, "api_visibility": "private"}
        for over in (answered.success, answered.failure):  # Gradio's `then` is not called after an error
            over(self.end, run, stop, **quiet)
        for failed in (asked.failure, answered.failure):  # what was said would stay hidden under the word Error
            failed(gr.skip, None, chatbot, **quiet)
        stop.click(self.runs.stop, **quiet)
        chatbot.clear(list, None, said, **quiet)

    def ask(
        self, question: Message, said: list[Message], request: gr.Request
    ) -> tuple[list[Message], list[Message], Message, gr.Button, str]:
        """The conversation with a question more, an empty line for the next one, and the run."""
        if self.runs.there_are(request):
            raise message("Wait for the answer, or stop it.")
        if not question["text"].strip():
            raise message("Write a question about the pictures.")
        files = uploaded(question["files"])
        try:
            for file in files:
                read_upload(file)
        except OSError as error:
            raise message(str(error)) from error
        pictures = [{"role": "user", "content": {"path": str(file)}} for file in files]
        said = [*said, *pictures, {"role": "user", "content": question["text"]}]
        return said, said, {"text": "", "files": []}, gr.Button(interactive=True), self.runs.begin(request)

    def answer(
        self,
        max_new_tokens: int,
        temperature: float,
        adapter: str,
        adapter_weight: float,
        run: str,
        said: list[Message],
        request: gr.Request,
    ) -> Iterator[tuple[list[Message], list[Message], Any]]:
        """The conversation with the answer, as far as it is written; without one, the question goes back."""
        if not said:
            raise message("Ask something first.")
        text = ""
        try:
            with self.runs.during(request, run) as stop:
                parts = [Path(part["path"]) if isinstance(part, dict) else part for part in _contents(said)]
                folder = self.studio.find_adapter(adapter)
                question = Question(parts, max_new_tokens, temperature, folder, adapter_weight)
                for text in self.studio.answer(question, stop):
                    answered = [*said, {"role": "assistant", "content": text}]
                    yield answered, answered, gr.skip()
        except gr.Error:
            yield _take_back(said)
            raise
        if not text.strip():
            yield _take_back(said)

    def end(self, run: str, request: gr.Request) -> gr.Button:
        """The button after an answer."""
        self.runs.end(request, run)
        return gr.Button(interactive=False)


def _contents(said: list[Message]) -> list[Any]:
    return [one["content"] for one in said]


def _take_back(said: list[Message]) -> tuple[list[Message], list[Message], Message]:
    """The conversation without its last question, and that question."""
    question = list(takewhile(lambda one: one["role"] == "user", reversed(said)))[::-1]
    *pictures, text = _contents(question)
    said = said[: -len(question)]
    return said, said, {"text": text, "files": [picture["path"] for picture in pictures]}
