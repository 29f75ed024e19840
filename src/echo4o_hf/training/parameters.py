"""What is trained: everything, the generation expert, or low-rank adapters, and in which dtypes.

Parameters keep their official names; `lora` puts adapters on the linear layers whose names match the patterns below.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..model.modeling_bagel import BagelForConditionalGeneration

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import BitsAndBytesConfig

    from .arguments import Echo4oTrainingArguments

# What draws: the generation expert (each `*_moe_gen`) and what latents pass on their way in and out.
LATENT_HEADS = ("vae2llm", "llm2vae", "time_embedder")

GENERATION_LAYERS = (
    r"language_model\.model\.layers\.\d+\.self_attn\.[qkvo]_proj_moe_gen",
    r"language_model\.model\.layers\.\d+\.mlp_moe_gen\.(gate|up|down)_proj",
)
UNDERSTANDING_LAYERS = (
    r"language_model\.model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    r"language_model\.model\.layers\.\d+\.mlp\.(gate|up|down)_proj",
)
VISION_LAYERS = (
    r"vit_model\.vision_model\.encoder\.layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|out_proj)|mlp\.fc[12])",
    r"connector\.fc[12]",
)


def prepare_model(
    model: BagelForConditionalGeneration, arguments: Echo4oTrainingArguments
) -> BagelForConditionalGeneration | PeftModel:
    """Freezes, casts and, for `lora`, wraps a loaded model, which is changed in place.

    "full" trains every parameter. "generation" trains each `*_moe_gen`, `vae2llm`, `llm2vae` and `time_embedder`:
    texts written about images in the vision encoder stay bit for bit the same. "lora" trains adapters alone.

    Without `arguments.bf16` all is float32. With it, frozen weights are bfloat16 and trained ones
    `arguments.trainable_dtype`, adapters always float32; the forward pass then needs autocast, as Trainer has it.
    Quantized weights stay as they are.

    Args:
        model: as loaded; with `arguments.quantization`, loaded with `quantization_config(arguments)`.
        arguments: `Echo4oTrainingArguments`.

    Raises:
        ValueError: settings that exclude each other, or a model quantized unlike they say.
        ImportError: peft is missing.
    """
    if arguments.trainable_dtype != "float32" and not arguments.bf16:
        raise ValueError(f"trainable_dtype={arguments.trainable_dtype!r} needs bf16=True; without it all is float32")
    if (arguments.quantization is not None) != _is_quantized(model):
        state = "is" if _is_quantized(model) else "is not"
        raise ValueError(f"quantization={arguments.quantization!r}, but the model {state} quantized")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, arguments.method))
    _cast(model, arguments)
    if arguments.method != "lora":
        return model
    if arguments.lora_vision and arguments.activation_checkpointing:
        # Reentrant checkpointing finds parameters only behind inputs that need gradients; upstream sees to texts.
        embeddings = model.vit_model.vision_model.embeddings
        embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    # What adapter_config.json names as its base: not the folder in the cache.
    model.name_or_path = model.config.name_or_path = str(arguments.model)
    config = lora_config(arguments)
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # peft draws the first factors on the CPU
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # which peft asks for
        torch.default_generator.manual_seed(arguments.seed)
        adapted = get_peft_model(model, config)
    # No embedding is ever trained; to find that out, peft would ask the Hub for the base at each save.
    adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)
    return adapted


def is_trained(name: str, method: str) -> bool:
    """Whether `method` trains the model's own parameter of this name."""
    if method == "generation":
        return "_moe_gen" in name or name.split(".")[0] in LATENT_HEADS
    return method == "full"


def lora_config(arguments: Echo4oTrainingArguments) -> LoraConfig:
    """The adapters for peft; the pattern matches full module names.

    Raises:
        ImportError: peft is missing.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("method='lora' needs peft: pip install 'echo4o-hf[train]'") from error
    layers = (
        GENERATION_LAYERS
        + (UNDERSTANDING_LAYERS if arguments.lora_understanding else ())
        + (VISION_LAYERS if arguments.lora_vision else ())
    )
    return LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules="|".join(layers),
        revision=arguments.model_revision,
    )


def quantization_config(arguments: Echo4oTrainingArguments) -> BitsAndBytesConfig | None:
    """For loading the frozen base: the linear layers of both experts in nf4 ("4bit") or int8; None without.

    Raises:
        ImportError: bitsandbytes is missing.
    """
    if arguments.quantization is None:
        return None
    try:
        import bitsandbytes  # noqa: F401  (transformers would name it, but not our extra)
    except ImportError as error:
        raise ImportError(
            f"quantization={arguments.quantization!r} needs bitsandbytes: pip install 'echo4o-hf[qlora]'"
        ) from error
    from transformers import BitsAndBytesConfig

    if arguments.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if arguments.bf16 else torch.float32,
    )


def _is_quantized(model: nn.Module) -> bool:
    return any(type(parameter).__name__ in ("Params4bit", "Int8Params") for parameter in model.parameters())


def _cast(model: BagelForConditionalGeneration, arguments: Echo4oTrainingArguments) -> None:
    """Parameters and position tables; never the rotary frequencies, which bfloat16 would ruin."""
    frozen = torch.bfloat16 if arguments.bf16 else torch.float32
    trained = getattr(torch, arguments.trainable_dtype)
    for parameter in model.parameters():
        if parameter.is_floating_point() and type(parameter).__name__ not in ("Params4bit", "Int8Params"):
            parameter.data = parameter.data.to(trained if parameter.requires_grad else frozen)
    for table in (model.vit_pos_embed, model.latent_pos_embed):
        table.to(frozen)
