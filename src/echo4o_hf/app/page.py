"""The page: what `Studio` does, in a browser, with Gradio."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from threading import Event
from typing import Any

import gradio as gr
import torch

from ..pipeline.guidance import REFERENCES, RENORMS, TEXT_TO_IMAGE
from .studio import Drawing, Question, Studio, settings_of

MAX_SEED = 2**32 - 1
MODEL = "model"  # what all calls of the model wait for, in Gradio's queue
CSS = "#gallery .preview { background: var(--background-fill-primary); }"  # what is behind would shine through
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
Message = dict[str, Any]


class Page:
    """The page of a studio.

    Args:
        studio: draws and answers.
    """

    def __init__(self, studio: Studio) -> None:
        """See the class."""
        self.studio = studio
        self.stops: dict[str | None, Event] = {}  # by session, of those that wait or run

    def build(self) -> gr.Blocks:
        """The page, to be launched with `THEME`."""
        title = f"Echo-4o: {self.studio.source.model}"
        with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True) as blocks:
            gr.Markdown(f"### {escape(title)}")
            with gr.Accordion("Adapter (LoRA)", open=False, render=False) as adapters:
                picker = self._adapter_picker()
            with gr.Tab("Images"):
                self._images_tab(picker)
            with gr.Tab("Chat"):
                self._chat_tab(picker)
            adapters.render()
            blocks.unload(self.stop)
        return blocks

    def _adapter_picker(self) -> list[gr.components.Component]:
        with gr.Row():
            adapter = gr.Dropdown(
                ["none", *self.studio.adapters],
                value="none",
                label="Adapter",
                info="of the list, or a folder or name on the Hub, typed",
                allow_custom_value=True,
                filterable=True,
            )
            weight = gr.Slider(0, 2, 1, step=0.05, label="Weight")
        return [adapter, weight]

    def _images_tab(self, picker: list[gr.components.Component]) -> None:
        config = self.studio.pipeline.model.config
        stride, largest = config.latent_stride, config.latent_stride * config.max_latent_size
        positions = self.studio.num_positions
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                prompt = gr.Textbox(label="Prompt", lines=3, autofocus=True, elem_id="prompt")
                references = gr.Gallery(
                    label="References, for the prompt to speak of",
                    type="filepath",
                    file_types=["image"],
                    columns=4,
                    fit_columns=False,
                    height=180,
                    object_fit="contain",
                    interactive=True,
                    elem_id="references",
                )
                with gr.Row():
                    generate = gr.Button("Generate", variant="primary", min_width=120, elem_id="generate")
                    stop = gr.Button("Stop", variant="stop", min_width=120, interactive=False, elem_id="stop")
            with gr.Column(scale=3, min_width=320):
                gallery = gr.Gallery(
                    label="Images",
                    columns=3,
                    height=480,
                    object_fit="contain",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="gallery",
                )
        with gr.Row():
            status = gr.Markdown(elem_id="status")
            reuse = gr.Button("Use as reference", visible=False, size="sm", elem_id="reuse")
        plan = gr.Textbox(label="Plan", lines=2, interactive=False, visible=False, elem_id="plan")
        with gr.Accordion("Settings of the image", open=False, visible=False, elem_id="details") as details:
            settings = gr.JSON(show_label=False, elem_id="settings")
        with gr.Row():
            num_images = gr.Slider(1, 8, 1, step=1, label="Images", min_width=150)
            steps = gr.Slider(1, 100, 49, step=1, label="Steps", min_width=150, elem_id="steps")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=150, elem_id="seed")
            random_seed = gr.Checkbox(True, label="Random seed", min_width=150, elem_id="random-seed")
        with gr.Row():
            with gr.Column(min_width=300), gr.Accordion("Size", open=False):
                default_size = gr.Checkbox(
                    True, label="Default", info=f"that of the last reference, else {largest} x {largest}"
                )
                with gr.Row(visible=False) as sizes:
                    width = gr.Slider(stride, largest, largest, step=stride, label="Width", min_width=120)
                    height = gr.Slider(stride, largest, largest, step=stride, label="Height", min_width=120)
            with gr.Column(min_width=300), gr.Accordion("Guidance", open=False):
                scale = gr.Slider(1, 10, TEXT_TO_IMAGE.text_scale, step=0.1, label="Text guidance scale")
                default_guidance = gr.Checkbox(True, label="Default for the rest", info=_defaults())
                with gr.Column(visible=False) as guidance:
                    image_scale = gr.Slider(1, 5, REFERENCES.image_scale, step=0.1, label="Image guidance scale")
                    with gr.Row():
                        start = gr.Slider(0, 1, REFERENCES.interval[0], step=0.05, label="Interval from", min_width=120)
                        end = gr.Slider(0, 1, REFERENCES.interval[1], step=0.05, label="Interval to", min_width=120)
                    renorm = gr.Dropdown(list(RENORMS), value=REFERENCES.renorm, label="Renorm")
            with gr.Column(min_width=300), gr.Accordion("Thinking", open=False):
                thinking = gr.Checkbox(False, label="Thinking", info="write a plan first", elem_id="thinking")
                max_think_tokens = gr.Slider(
                    1, positions // 2, min(1000, positions // 2), step=1, label="Tokens of the plan, at most"
                )
        shown, chosen = gr.State([]), gr.State(None)

        default_size.change(lambda default: gr.Row(visible=not default), default_size, sizes, show_progress="hidden")
        default_guidance.change(
            lambda default: gr.Column(visible=not default), default_guidance, guidance, show_progress="hidden"
        )
        begun = gr.on(
            [generate.click, prompt.submit], self.begin, None, [generate, stop], queue=False, show_progress="hidden"
        )
        drawn = begun.then(
            self.draw,
            [
                *(prompt, references, num_images, steps, seed, random_seed, thinking, max_think_tokens),
                *(default_size, width, height, scale, default_guidance, image_scale, start, end, renorm),
                *(*picker, shown),
            ],
            [gallery, shown, plan, status, seed],
            concurrency_id=MODEL,
            concurrency_limit=1,
            show_progress_on=[gallery],
            api_name="draw",
        )
        drawn.then(self.end, None, [generate, stop], queue=False, show_progress="hidden")
        stop.click(self.stop, None, None, queue=False, show_progress="hidden")
        gallery.select(self.show_settings, shown, [settings, details, chosen, reuse], show_progress="hidden")
        drawn.success(self.show_newest, shown, [settings, details, chosen, reuse], show_progress="hidden")
        reuse.click(
            lambda chosen, references: [*(references or []), (chosen, None)],
            [chosen, references],
            references,
            show_progress="hidden",
        )

    def _chat_tab(self, picker: list[gr.components.Component]) -> None:
        chatbot = gr.Chatbot(show_label=False, height=480, buttons=["copy"], elem_id="chat", feedback_options=None)
        message = gr.MultimodalTextbox(
            file_count="multiple",
            file_types=["image"],
            placeholder="Drop pictures here, and ask",
            show_label=False,
            stop_btn=False,
            elem_id="question",
        )
        stop = gr.Button("Stop", variant="stop", size="sm", interactive=False, elem_id="stop-chat")
        with gr.Accordion("Settings", open=False), gr.Row():
            positions = self.studio.num_positions
            max_new_tokens = gr.Slider(
                1, positions // 2, min(1000, positions // 4), step=1, label="Tokens of the answer, at most"
            )
            temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0: the likeliest word each time")
        asked = message.submit(self.ask, [message, chatbot], [chatbot, message, stop], queue=False)
        answered = asked.success(
            self.answer,
            [chatbot, max_new_tokens, temperature, *picker],
            chatbot,
            concurrency_id=MODEL,
            concurrency_limit=1,
            api_name="answer",
        )
        answered.then(lambda: gr.Button(interactive=False), None, stop, queue=False, show_progress="hidden")
        stop.click(self.stop, None, None, queue=False, show_progress="hidden")

    def begin(self, request: gr.Request) -> tuple[gr.Button, gr.Button]:
        """A session asks for something: from now on it may stop it."""
        self.stops[request.session_hash] = Event()
        return gr.Button(interactive=False), gr.Button(interactive=True)

    def end(self) -> tuple[gr.Button, gr.Button]:
        """It has it."""
        return gr.Button(interactive=True), gr.Button(interactive=False)

    def stop(self, request: gr.Request) -> None:
        """Stop what the session asked for, waiting or running."""
        if request.session_hash in self.stops:
            self.stops[request.session_hash].set()

    @contextmanager
    def _stoppable(self, request: gr.Request) -> Iterator[Event]:
        """What a session's Stop button sets, during a call; what goes wrong becomes a message on the page."""
        stop = self.stops.setdefault(request.session_hash, Event())
        try:
            yield stop
        except torch.OutOfMemoryError as error:
            raise _message(
                f"not enough memory: {error}. Draw fewer or smaller images, with fewer references"
            ) from error
        except (ValueError, OSError, ImportError) as error:
            raise _message(str(error)) from error
        finally:
            self.stops.pop(request.session_hash, None)

    def draw(
        self,
        prompt: str,
        references: list[tuple[str, str | None]] | None,
        num_images: int,
        steps: int,
        seed: int | None,
        random_seed: bool,
        thinking: bool,
        max_think_tokens: int,
        default_size: bool,
        width: int,
        height: int,
        guidance_scale: float,
        default_guidance: bool,
        image_guidance_scale: float,
        interval_start: float,
        interval_end: float,
        guidance_renorm: str,
        adapter: str,
        adapter_weight: float,
        shown: list[str],
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (how Gradio finds it)
    ) -> tuple[Any, ...]:
        """The gallery with the new images, their files, the plan, what happened, and the seed."""
        arguments: dict[str, Any] = {
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "thinking": thinking,
            "max_think_tokens": max_think_tokens,
        }
        if not default_size:
            arguments |= {"width": width, "height": height}
        if not default_guidance:
            arguments |= {
                "image_guidance_scale": image_guidance_scale,
                "guidance_interval": (interval_start, interval_end),
                "guidance_renorm": guidance_renorm,
            }
        progress(0, desc="writing the plan" if thinking else "reading the prompt")
        began = time.monotonic()
        with self._stoppable(request) as stop:
            if random_seed:
                seed = secrets.randbelow(MAX_SEED)
            if seed is None:
                raise ValueError("give a seed, or tick Random seed")
            drawing = Drawing(
                prompt,
                [Path(path) for path, _ in references or []],
                range(seed, seed + num_images),
                arguments,
                self._adapter(adapter),
                adapter_weight,
            )
            drawn = self.studio.draw(drawing, stop, lambda done: progress((done, steps), desc="drawing", unit="steps"))
        seconds = time.monotonic() - began
        if not drawn.paths:
            return gr.skip(), shown, _plan(drawn.plan), f"Stopped after {drawn.num_updates} of {steps} steps.", seed
        shown = [*map(str, drawn.paths), *shown]
        images = [(path, f"seed {Path(path).stem.rsplit('-', 1)[-1]}") for path in shown]
        gallery = gr.Gallery(images, selected_index=0)
        return gallery, shown, _plan(drawn.plan), f"{_count(len(drawn.paths))} in {seconds:.1f} s", seed

    def show_newest(self, shown: list[str]) -> tuple[Any, ...]:
        """The settings of the first image, which was drawn last."""
        return self._details(shown[0]) if shown else (gr.skip(),) * 4

    def show_settings(self, shown: list[str], selected: gr.SelectData) -> tuple[Any, ...]:
        """The settings of the image that was selected."""
        return self._details(shown[selected.index])

    def _details(self, path: str) -> tuple[Any, ...]:
        return settings_of(Path(path)), gr.Accordion(visible=True), path, gr.Button(visible=True)

    def ask(
        self, message: Message, history: list[Message], request: gr.Request
    ) -> tuple[list[Message], Message, gr.Button]:
        """The conversation with a question more, and an empty line for the next one."""
        if not message["text"].strip():
            raise _message("ask something about the pictures")
        self.begin(request)
        files = [{"role": "user", "content": {"path": path}} for path in message["files"]]
        question = {"role": "user", "content": message["text"]}
        return [*history, *files, question], {"text": "", "files": []}, gr.Button(interactive=True)

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
        conversation: list[str | Path] = []
        for part in (part for one in history for part in one["content"]):
            if part["type"] == "file":
                conversation.append(Path(part["file"]["path"]))
            elif part["text"].strip():
                conversation.append(part["text"])
        with self._stoppable(request) as stop:
            question = Question(conversation, max_new_tokens, temperature, self._adapter(adapter), adapter_weight)
            for text in self.studio.answer(question, stop):
                yield [*history, {"role": "assistant", "content": text}]

    def _adapter(self, chosen: str | None) -> str | None:
        """Folder or Hub name."""
        name = (chosen or "").strip()
        return None if name in ("", "none") else self.studio.adapters.get(name, name)


def _count(number: int) -> str:
    return "1 image" if number == 1 else f"{number} images"


def _plan(text: str) -> gr.Textbox:
    return gr.Textbox(text, visible=bool(text))


def _defaults() -> str:
    parts = [
        f"{name}: image guidance {one.image_scale:g}, interval {one.interval[0]:g} to {one.interval[1]:g}, "
        f"renorm {one.renorm}"
        for name, one in (("with references", REFERENCES), ("without", TEXT_TO_IMAGE))
    ]
    return "; ".join(parts)


def _message(text: str) -> gr.Error:
    """An error as the page shows it, without a trace in the terminal."""
    return gr.Error(escape(text, quote=False), duration=15, print_exception=False)
