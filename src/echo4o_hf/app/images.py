"""Text-to-image, references and editing."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from ..pipeline.guidance import REFERENCES, RENORMS, TEXT_TO_IMAGE
from .session import MODEL, Runs, message, served, uploaded
from .studio import Drawing, Studio, read_upload, settings_of

MAX_SEED = 2**32 - 1


class Result(NamedTuple):
    """The parts of the tab that show images."""

    gallery: gr.Gallery
    status: gr.Markdown
    plan: gr.Textbox
    reuse: gr.Button
    details: gr.Accordion
    settings: gr.JSON


class ImagesTab:
    """The tab for images.

    Args:
        studio: draws them.
    """

    def __init__(self, studio: Studio) -> None:
        """See the class."""
        self.studio = studio
        self.runs = Runs(studio)

    def build(self, adapter: gr.Dropdown, weight: gr.Slider) -> None:
        """Lay it out, and say what its parts do."""
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                prompt = gr.Textbox(label="Prompt", lines=3, autofocus=True, elem_id="prompt")
                references = _references()
                with gr.Row():
                    generate = gr.Button("Generate", variant="primary", min_width=120, elem_id="generate")
                    stop = gr.Button("Stop", variant="stop", min_width=120, interactive=False, elem_id="stop")
            with gr.Column(scale=3, min_width=320):
                gallery = _gallery()
        result = _result(gallery)
        with gr.Row():
            num_images = gr.Slider(1, 8, 1, step=1, label="Images", min_width=150)
            steps = gr.Slider(1, 100, 49, step=1, label="Steps", min_width=150, elem_id="steps")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=150, elem_id="seed")
            random_seed = gr.Checkbox(True, label="Random seed", min_width=150, elem_id="random-seed")
        with gr.Row():
            with gr.Column(min_width=300):
                size = self._size()
            with gr.Column(min_width=300):
                guidance = _guidance()
            with gr.Column(min_width=300):
                thinking = self._thinking()
        shown, chosen = gr.State([]), gr.State(None)  # files and captions, the newest first; the file selected
        run = gr.Textbox("", label="Run", visible=False)

        buttons = [generate, stop]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        # Queued, for Gradio shows no errors of others; and at once.
        begun = gr.on(
            [generate.click, prompt.submit], self.begin, None, [*buttons, run], concurrency_limit=None, **quiet
        )
        drawn = begun.success(
            self.draw,
            [
                *(prompt, references, num_images, steps, seed, random_seed),
                *(*size, *guidance, *thinking, adapter, weight, run, shown),
            ],
            [gallery, shown, result.plan, result.status, seed],
            concurrency_id=MODEL,
            concurrency_limit=1,
            show_progress_on=[gallery],
            api_name="draw",
        )
        for over in (drawn.success, drawn.failure):  # Gradio's `then` is not called after an error
            over(self.end, run, buttons, queue=False, api_visibility="private")
        cleared = [gallery, result.status]  # the images would stay hidden under the word Error
        drawn.failure(lambda: (gr.skip(), ""), None, cleared, queue=False, api_visibility="private")
        references.upload(self.check, references, references, **quiet)
        stop.click(self.runs.stop, queue=False, api_visibility="private")
        outputs = [result.settings, result.details, chosen, result.reuse]
        drawn.success(self.show_newest, shown, outputs, **quiet)
        gallery.select(self.show_selected, shown, outputs, **quiet)
        result.reuse.click(self.reuse, [chosen, references], references, **quiet)

    def _size(self) -> list[gr.components.Component]:
        config = self.studio.pipeline.model.config
        stride, largest = config.latent_stride, config.latent_stride * config.max_latent_size
        with gr.Accordion("Size", open=False):
            default = gr.Checkbox(
                True, label="Default", info=f"that of the last reference, else {largest} x {largest}"
            )
            with gr.Row(visible=False) as row:
                width = gr.Slider(stride, largest, largest, step=stride, label="Width", min_width=120)
                height = gr.Slider(stride, largest, largest, step=stride, label="Height", min_width=120)
        default.change(lambda is_default: gr.Row(visible=not is_default), default, row, api_visibility="private")
        return [default, width, height]

    def _thinking(self) -> list[gr.components.Component]:
        longest = self.studio.num_positions // 2
        with gr.Accordion("Thinking", open=False):
            thinking = gr.Checkbox(False, label="Thinking", info="write a plan first", elem_id="thinking")
            tokens = gr.Slider(1, longest, min(1000, longest), step=1, label="Tokens of the plan, at most")
        return [thinking, tokens]

    def check(self, references: list[tuple[str, str | None]]) -> Any:
        """The references without files that are no pictures, which the page is told of."""
        files = uploaded(path for path, _ in references)
        whole = []
        for file in files:
            try:
                read_upload(file)
                whole.append((str(file), None))
            except OSError as error:
                message(str(error))
        return gr.skip() if len(whole) == len(files) else whole

    def begin(self, request: gr.Request) -> tuple[gr.Button, gr.Button, str]:
        """The buttons while an image is drawn, and the run."""
        if self.runs.there_are(request):
            raise message("Wait for the images, or stop them.")
        return gr.Button(interactive=False), gr.Button(interactive=True), self.runs.begin(request)

    def end(self, run: str, request: gr.Request) -> tuple[gr.Button, gr.Button]:
        """The buttons afterwards."""
        self.runs.end(request, run)
        return gr.Button(interactive=True), gr.Button(interactive=False)

    def draw(
        self,
        prompt: str,
        references: list[tuple[str, str | None]] | None,
        num_images: int,
        steps: int,
        seed: int | None,
        random_seed: bool,
        default_size: bool,
        width: int,
        height: int,
        guidance_scale: float,
        default_guidance: bool,
        image_guidance_scale: float,
        interval_start: float,
        interval_end: float,
        guidance_renorm: str,
        thinking: bool,
        max_think_tokens: int,
        adapter: str,
        adapter_weight: float,
        run: str,
        shown: list[tuple[str, str]],
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (how Gradio finds it)
    ) -> tuple[Any, ...]:
        """The gallery with the new images, their files, the plan, what happened, and the seed."""
        arguments: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        if not default_size:
            arguments |= {"width": width, "height": height}
        if not default_guidance:
            arguments |= {
                "image_guidance_scale": image_guidance_scale,
                "guidance_interval": (interval_start, interval_end),
                "guidance_renorm": guidance_renorm,
            }
        if thinking:
            arguments |= {"thinking": True, "max_think_tokens": max_think_tokens}

        progress(0, desc="writing the plan" if thinking else "reading the prompt")
        began = time.monotonic()
        with self.runs.during(request, run) as stop:
            if random_seed:
                seed = secrets.randbelow(MAX_SEED)
            if seed is None:
                raise ValueError("Give a seed, or tick Random seed.")
            drawing = Drawing(
                prompt,
                uploaded(path for path, _ in references or []),
                range(seed, seed + num_images),
                arguments,
                self.studio.find_adapter(adapter),
                adapter_weight,
            )
            drawn = self.studio.draw(drawing, stop, lambda done: progress((done, steps), desc="drawing", unit="steps"))
        plan = gr.Textbox(drawn.plan, visible=bool(drawn.plan))
        if not drawn.paths:
            return gr.skip(), shown, plan, f"Stopped after {drawn.num_updates} of {steps} steps.", seed
        number = "1 image" if len(drawn.paths) == 1 else f"{len(drawn.paths)} images"
        captions = [f"seed {one}" for one in drawing.seeds]
        shown = [*zip(map(str, drawn.paths), captions, strict=True), *shown]
        gallery = gr.Gallery([(served(path), caption) for path, caption in shown], selected_index=0)
        return gallery, shown, plan, f"{number} in {time.monotonic() - began:.1f} s", seed

    def show_newest(self, shown: list[tuple[str, str]]) -> tuple[Any, ...]:
        """The settings of the image that was drawn last."""
        return _details(shown[0][0]) if shown else (gr.skip(),) * 4

    def show_selected(self, shown: list[tuple[str, str]], selected: gr.SelectData) -> tuple[Any, ...]:
        """The settings of the image that was selected."""
        return _details(shown[selected.index][0])

    def reuse(self, path: str, references: list[tuple[str, str | None]] | None) -> list[tuple[str | Path, str | None]]:
        """The references, and the image that was selected."""
        return [*((file, None) for file in uploaded(one for one, _ in references or [])), (served(path), None)]


def _references() -> gr.Gallery:
    return gr.Gallery(
        label="References",
        type="filepath",
        file_types=["image"],
        columns=4,
        fit_columns=False,
        height=180,
        object_fit="contain",
        interactive=True,
        elem_id="references",
    )


def _gallery() -> gr.Gallery:
    return gr.Gallery(
        label="Images",
        columns=3,
        height=480,
        object_fit="contain",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id="gallery",
    )


def _result(gallery: gr.Gallery) -> Result:
    with gr.Row():
        status = gr.Markdown(elem_id="status")
        reuse = gr.Button("Use as reference", visible=False, size="sm", elem_id="reuse")
    plan = gr.Textbox(label="Plan", lines=2, interactive=False, visible=False, elem_id="plan")
    with gr.Accordion("Settings of the image", open=False, visible=False, elem_id="details") as details:
        settings = gr.JSON(show_label=False, elem_id="settings")
    return Result(gallery, status, plan, reuse, details, settings)


def _guidance() -> list[gr.components.Component]:
    with gr.Accordion("Guidance", open=False):
        scale = gr.Slider(1, 10, TEXT_TO_IMAGE.text_scale, step=0.1, label="Text guidance scale")
        cases = {"with references": REFERENCES, "without": TEXT_TO_IMAGE}
        info = "; ".join(
            f"{case}: image guidance {one.image_scale:g}, interval {one.interval[0]:g} to {one.interval[1]:g}, "
            f"renorm {one.renorm}"
            for case, one in cases.items()
        )
        default = gr.Checkbox(True, label="Default for the rest", info=info)
        with gr.Column(visible=False) as column:
            image_scale = gr.Slider(1, 5, REFERENCES.image_scale, step=0.1, label="Image guidance scale")
            with gr.Row():
                start = gr.Slider(0, 1, REFERENCES.interval[0], step=0.05, label="Interval from", min_width=99)
                end = gr.Slider(0, 1, REFERENCES.interval[1], step=0.05, label="Interval to", min_width=99)
            renorm = gr.Dropdown(list(RENORMS), value=REFERENCES.renorm, label="Renorm")
    default.change(lambda is_default: gr.Column(visible=not is_default), default, column, api_visibility="private")
    return [scale, default, image_scale, start, end, renorm]


def _details(path: str) -> tuple[Any, ...]:
    return settings_of(Path(path)), gr.Accordion(visible=True), path, gr.Button(visible=True)
