"""Options of loading that other packages serve: quantization, and flash attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.quantizers.auto import AutoQuantizationConfig

# Outside of the two experts' layers nothing is quantized: it is small, and heads and embeddings suffer most.
NOT_QUANTIZED = ("language_model.lm_head", "vit_model", "connector", "vae2llm", "llm2vae", "time_embedder")
SPARED = {"bitsandbytes": "llm_int8_skip_modules", "torchao": "modules_to_not_convert"}  # what they call such a list
FLASH_PACKAGES = {
    "FlashAttention2": "flash-attn",
    "FlashAttention3": "flash-attn-3",
    "FlashAttention4": "flash-attn-4",
}


def spare_small_parts(quantization_config: Any) -> Any:
    """The configuration with `NOT_QUANTIZED` among what it spares."""
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    quantization_config = copy.deepcopy(quantization_config)
    name = SPARED.get(quantization_config.quant_method)
    if name is not None:
        spared = {*(getattr(quantization_config, name) or ()), *NOT_QUANTIZED}
        setattr(quantization_config, name, sorted(spared))
    return quantization_config


def keep_packing(model: Any) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew on CPUs: an empty stream would crash, gradients be lost."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


@contextmanager
def naming_packages() -> Iterator[None]:
    """Add to transformers' error which package a flash attention is in."""
    try:
        yield
    except ImportError as error:
        packages = [package for name, package in FLASH_PACKAGES.items() if name in str(error)]
        if not packages or "installed" not in str(error):
            raise
        raise ImportError(
            f"{error} Install {packages[0]}, or kernels, with which transformers fetches it from the Hub; or choose "
            "sdpa, eager or flex_attention"
        ) from error
