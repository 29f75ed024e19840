"""A checkpoint from the official layout to a saved pipeline, or back."""

from __future__ import annotations

import os
from typing import Any

from ..model.checkpoint import write_official
from ..model.files import new_folder
from .pipeline_echo4o import Echo4oPipeline

LAYOUTS = ("ours", "official")


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    dtype: Any = None,
    to: str = "ours",
    lora: str | os.PathLike[str] | None = None,
) -> None:
    """Load `src` as `Echo4oPipeline.from_pretrained` does and write it to the new folder `dst`, whole or not at all.

    The weights are memory-mapped and written from there; only another `dtype` or an adapter copies them once.

    Args:
        src: folder, bundled name or name on the Hub, in either layout.
        dst: must not exist, or be empty.
        dtype: of model and VAE; None keeps each as it is.
        to: "ours" (model_index.json, model/, vae/, scheduler/, processor/) or "official" (ema.safetensors, ...).
        lora: folder or Hub name of an adapter to add to the weights, in `dtype`.

    Raises:
        OSError: `src` or `lora` cannot be read, or `dst` not be written.
        ValueError: `dst` is not empty, `to` is unknown, `src` holds values or sizes that cannot work, or
            `lora` is for another model.
        ImportError: `lora` without peft.
    """
    if to not in LAYOUTS:
        raise ValueError(f"to={to!r} is no layout; choose one of {', '.join(LAYOUTS)}")
    with new_folder(dst) as folder:
        pipeline = Echo4oPipeline.from_pretrained(src, dtype=dtype)
        if lora is not None:
            pipeline.load_lora_weights(lora)
            pipeline.fuse_lora(safe_fusing=True)
            pipeline.unload_lora_weights()
        if to == "official":
            write_official(pipeline.components, folder)
        else:
            pipeline.save_pretrained(folder)
