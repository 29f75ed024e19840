"""The page, and how it looks."""

from __future__ import annotations

from html import escape

import gradio as gr

from .chat import ChatTab
from .images import ImagesTab
from .studio import NO_ADAPTER, Studio

THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = """
#gallery .preview { background: var(--background-fill-primary); }  /* the grid would shine through */
#references .grid-wrap { padding-top: 32px; }  /* the label would cover the pictures */
#references .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)); }  /* on a phone, too */
"""


def build_page(studio: Studio) -> gr.Blocks:
    """The page of a studio, to be launched with `THEME` and `CSS`; it loads nothing from elsewhere."""
    title = f"Echo-4o: {studio.source.model}"
    images, chat = ImagesTab(studio), ChatTab(studio)
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True) as page:
        gr.Markdown(f"### {escape(title)}")
        with gr.Accordion("Adapter (LoRA)", open=False, render=False, elem_id="adapters") as adapters, gr.Row():
            adapter = gr.Dropdown(
                [NO_ADAPTER, *studio.adapters],
                value=NO_ADAPTER,
                label="Adapter",
                info="those that the app was started with: --lora FOLDER",
            )
            weight = gr.Slider(0, 2, 1, step=0.05, label="Weight")
        with gr.Tab("Images"):
            images.build(adapter, weight)
        with gr.Tab("Chat"):
            chat.build(adapter, weight)
        adapters.render()
        page.unload(images.runs.leave)
        page.unload(chat.runs.leave)
    return page
