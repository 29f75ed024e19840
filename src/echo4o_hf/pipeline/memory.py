"""What to do when memory runs out, told by the error itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

if TYPE_CHECKING:
    from .pipeline_echo4o import Echo4oPipeline

P = ParamSpec("P")
Result = TypeVar("Result")
Pipeline = TypeVar("Pipeline", bound="Echo4oPipeline")

TILING = "The VAE needs less in tiles: pipe.vae.enable_tiling()."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine has no memory left; `torch.OutOfMemoryError` is only one of its faces."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and (should_reduce_batch_size(error) or "std::bad_alloc" in str(error))


def with_advice(
    method: Callable[Concatenate[Pipeline, P], Result],
) -> Callable[Concatenate[Pipeline, P], Result]:
    """Add to errors of a pipeline's method that are about memory what would need less of it, as a note."""

    @wraps(method)
    def run(self: Pipeline, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            if is_out_of_memory(error) and not getattr(error, "__notes__", None):
                error.add_note(advice(self, method.__name__))
            raise

    return run


def advice(pipe: Echo4oPipeline, during: str) -> str:
    """What would need less memory than this pipeline in one of its methods, and is not in use yet.

    In brackets, what it is in a shell.
    """
    model: Any = pipe.model
    on_cpu = pipe._execution_device.type == "cpu"
    steps = [] if during == "to" else ["fewer images in a call", "smaller ones (height, width)"]
    if model.dtype == torch.float32:
        steps.append("dtype=torch.bfloat16 in from_pretrained (--dtype bfloat16)")
    if not model.config.to_dict().get("quantization_config"):
        steps.append("a quantization_config of 8 or 4 bits in from_pretrained (--quantize 8bit, --quantize 4bit)")
    if not on_cpu and not is_offloaded(model):
        steps.append('pipe.enable_group_offload("cuda", offload_type="leaf_level", use_stream=True) (--offload)')
    tiling = f"{TILING} " if during in ("decode_latents", "encode_image") and not pipe.vae.use_tiling else ""
    return f"{tiling}What needs less memory: {'; '.join(steps) or 'a larger device'}."


def is_offloaded(model: nn.Module) -> bool:
    """Whether a part of the model waits on the CPU or on disk until it is called."""
    hooked = (getattr(module, "_hf_hook", None) for module in model.modules())
    return any(getattr(hook, "offload", False) for hook in hooked) or any(
        "group_offloading" in registry.hooks
        for module in model.modules()
        if (registry := getattr(module, "_diffusers_hook", None)) is not None
    )
