"""Echo-4o for Hugging Face: its model, its pipeline, and the whole journey in miniature.

Importing the package is light. It makes `AutoConfig`, `AutoModel...` and `AutoProcessor` of transformers know
`model_type: bagel`, whichever of the two is imported first.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from ._auto import register_when_imported

__version__ = "0.1.0"

_PUBLIC = {
    "BagelConfig": "echo4o_hf.model.configuration_bagel",
    "BagelForConditionalGeneration": "echo4o_hf.model.modeling_bagel",
    "BagelImageProcessor": "echo4o_hf.model.image_processing_bagel",
    "BagelProcessor": "echo4o_hf.model.processing_bagel",
    "Echo4oPipeline": "echo4o_hf.pipeline.pipeline_echo4o",
    "Echo4oPipelineOutput": "echo4o_hf.pipeline.pipeline_echo4o",
}

if TYPE_CHECKING:
    from .model.configuration_bagel import BagelConfig as BagelConfig
    from .model.image_processing_bagel import BagelImageProcessor as BagelImageProcessor
    from .model.modeling_bagel import BagelForConditionalGeneration as BagelForConditionalGeneration
    from .model.processing_bagel import BagelProcessor as BagelProcessor
    from .pipeline.pipeline_echo4o import Echo4oPipeline as Echo4oPipeline
    from .pipeline.pipeline_echo4o import Echo4oPipelineOutput as Echo4oPipelineOutput

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


# diffusers imports bitsandbytes wherever it is installed, which then asks for a package that only 4 bits on a CPU use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
register_when_imported()
