"""Questions about pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from .session import MODEL, Stops, message
from .studio import Question, Studio

Message = dict[str, Any]  # "role", and "content"; of a new question "text" and "files"


class ChatTab:
    """The tab for questions.

    Args:
        studio: answers them.
        stops: of all tabs.
    """

    def __init__(self, studio: Studio, stops: Stops) -> None:
        """See the class."""
        self.studio = studio
        self.stops = stops

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

        asked = asking.submit(
            self.ask, [asking, chatbot], [chatbot, asking, stop], queue=False, show_progress="hidden", api_name="ask"
        )
        answered = asked.success(
            self.answer,
            [chatbot, max_new_tokens, temperature, adapter, weight],
            chatbot,
            concurrency_id=MODEL,
            concurrency_limit=1,
            api_name="answer",
        )
        answered.then(lambda: gr.Button(interactive=False), None, stop, queue=False, api_visibility="private")
        stop.click(self.stops.stop, queue=False, api_visibility="private")

    def ask(
        self, question: Message, history: list[Message], request: gr.Request
    ) -> tuple[list[Message], Message, gr.Button]:
        """The conversation with a question more, and an empty line for the next one."""
        if not question["text"].strip():
            raise message("Write a question about the pictures.")
        self.stops.begin(request)
        files = [{"role": "user", "content": {"path": path}} for path in question["files"]]
        text = {"role": "user", "content": question["text"]}
        return [*history, *files, text], {"text": "", "files": []}, gr.Button(interactive=True)

    def answer(
        self,
        history: list[Message],
        max_new_tokens: int,
        temperature: float,
        adapter: str,
        adapter_weight: float,
        request: gr.Request,
    ) -> Iterator[list[Message]]:
        """The conversation with the answer, as far as it is written."""
        parts: list[str | Path] = []
        for part in (part for one in history for part in one["content"]):
            if part["type"] == "file":
                parts.append(Path(part["file"]["path"]))
            elif part["text"].strip():
                parts.append(part["text"])
        with self.stops.during(request) as stop:
            question = Question(parts, max_new_tokens, temperature, self.studio.find_adapter(adapter), adapter_weight)
            for text in self.studio.answer(question, stop):
                yield [*history, {"role": "assistant", "content": text}]
