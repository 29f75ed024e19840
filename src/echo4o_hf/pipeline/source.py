"""A pipeline and how it runs: loaded only when it is needed, and told in the records of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, TaylorSeerCacheConfig
from transformers import BitsAndBytesConfig

from .fingerprints import adapter_sha256, model_fingerprint
from .pipeline_echo4o import Echo4oPipeline

SOFTWARE = ("echo4o-hf", "diffusers", "transformers", "torch")


@dataclass(frozen=True)
class Source:
    """A pipeline, loaded only when a picture is missing.

    Attributes:
        model: checkpoint of Echo-4o (see `Echo4oPipeline.from_pretrained`), or saved pipeline of diffusers.
        dtype: "float32", "bfloat16" or "float16".
        device: "cuda" is another one in each process.
        loras: of Echo-4o, adapters by folder or Hub name, and how much of each is added.
        attention: of Echo-4o, see `Echo4oPipeline.set_attention_backend`.
        compiled: of Echo-4o, see `Echo4oPipeline.compile`.
        cache_interval: of Echo-4o, one of so many updates is evaluated (see `enable_cache`); None is all.
        quantization: of Echo-4o, "4bit" or "8bit" by bitsandbytes.
        offload: of Echo-4o, the weights wait in the machine's memory (see `enable_group_offload`).
    """

    model: str
    dtype: str = "float32"
    device: str | torch.device = "cpu"
    loras: tuple[tuple[str, float], ...] = ()
    attention: str | None = None
    compiled: bool = False
    cache_interval: int | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    offload: bool = False

    def load(self, pipeline_class: type[DiffusionPipeline]) -> DiffusionPipeline:
        """The pipeline on its device.

        Raises:
            OSError: the checkpoint or an adapter cannot be read.
            ValueError: an adapter that does not fit, or an unknown attention.
            ImportError: an attention or bitsandbytes is not installed.
        """
        if pipeline_class is Echo4oPipeline:
            pipeline = self._load_echo4o()
        else:  # only safetensors, for pickled files can run code
            dtype = getattr(torch, self.dtype)
            pipeline = pipeline_class.from_pretrained(self.model, dtype=dtype, use_safetensors=True).to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _load_echo4o(self) -> Echo4oPipeline:
        dtype = getattr(torch, self.dtype)
        if self.quantization is None:
            pipeline = Echo4oPipeline.from_pretrained(self.model, dtype=dtype)
            pipeline.to("cpu" if self.offload else self.device)
        else:
            pipeline = Echo4oPipeline.from_pretrained(
                self.model,
                dtype=dtype,
                quantization_config=_quantization_config(self.quantization, dtype),
                device_map=str(self.device),
            )
        names = [f"lora_{place}" for place in range(len(self.loras))]
        for name, (adapter, _) in zip(names, self.loras, strict=True):
            pipeline.load_lora_weights(adapter, adapter_name=name)
        if names:
            pipeline.set_adapters(names, [scale for _, scale in self.loras])
        if self.attention is not None:
            pipeline.set_attention_backend(self.attention)
        if self.compiled:
            pipeline.compile()
        if self.cache_interval is not None:
            pipeline.enable_cache(
                TaylorSeerCacheConfig(
                    cache_interval=self.cache_interval,
                    disable_cache_before_step=1,
                    taylor_factors_dtype=torch.float32,
                )
            )
        if self.offload:  # with the adapters
            device = torch.device(self.device)
            with_stream = device.type in ("cuda", "xpu")  # others have none in diffusers
            pipeline.enable_group_offload(device, offload_type="leaf_level", use_stream=with_stream)
        return pipeline

    def settings(self, pipeline_class: type[DiffusionPipeline]) -> dict[str, Any]:
        """What records say of it.

        Raises:
            ValueError: what only Echo-4o has is wanted of another pipeline.
        """
        extras = self.extras()
        if extras and pipeline_class is not Echo4oPipeline:
            raise ValueError(f"{self.model} is a {pipeline_class.__name__}; only Echo-4o takes {', '.join(extras)}")
        return {
            "model": str(self.model),
            "pipeline": pipeline_class.__name__,
            "dtype": self.dtype,
            "device": torch.device(self.device).type,
            "software": ", ".join(f"{name} {version(name)}" for name in SOFTWARE),
            **extras,
        }

    def extras(self) -> dict[str, Any]:
        """Adapters, attention, compiling, caching, quantization and offload, those that there are."""
        every = {
            "lora": [[adapter, scale] for adapter, scale in self.loras],
            "attention": self.attention,
            "compiled": self.compiled,
            "cache_interval": self.cache_interval,
            "quantization": self.quantization,
            "offload": self.offload,
        }
        return {name: value for name, value in every.items() if value}

    def fingerprints(self) -> dict[str, Any]:
        """What tells the weights from others that have these names, as far as that can be known without loading.

        Raises:
            OSError: there is no such adapter.
        """
        every = {
            "lora_sha256": [adapter_sha256(adapter) for adapter, _ in self.loras],
            "model_fingerprint": model_fingerprint(self.model),
        }
        return {name: value for name, value in every.items() if value}


def _quantization_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
