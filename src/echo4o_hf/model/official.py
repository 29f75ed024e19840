"""The official checkpoint layout of Bagel and Echo-4o: what its files say, and how to write them.

    ema.safetensors     the model, under the names that `BagelForConditionalGeneration` uses too
    ae.safetensors      the VAE, under the names of the original latent-diffusion code
    llm_config.json     sizes of the language model
    vit_config.json     sizes of the vision tower; `num_hidden_layers` is one more than the checkpoint holds
    config.json         optional
    tokenizer.json      Qwen2's tokenizer, or vocab.json and merges.txt

llm_config.json and vit_config.json win over config.json, and the shapes in the safetensors headers over all three.
Source: the loaders of ByteDance-Seed/Bagel and yejy53/Echo-4o.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, Qwen2Config, SiglipVisionConfig
from transformers.utils import logging

from .files import (
    WEIGHTS_FILES,
    Shapes,
    check_in_memory,
    listing,
    new_folder,
    read_json,
    tensor_shapes,
    weights_file,
    weights_shapes,
)

if TYPE_CHECKING:
    from .configuration_bagel import BagelConfig
    from .modeling_bagel import BagelForConditionalGeneration

logger = logging.get_logger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
TEXT_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
TEXT_OPTIONS = (
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
)
VISION_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "patch_size",
    "image_size",
)
VISION_OPTIONS = ("layer_norm_eps", "hidden_act")
OPTIONS = ("connector_act", "interpolate_pos", "timestep_shift")


def official_config_dict(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Arguments of `BagelConfig` for a folder in the official layout.

    Without weights (a download of the configuration alone) the JSON files must do, and the published sizes where they
    are silent.

    Raises:
        OSError: a file is missing or truncated.
        ValueError: JSON files that lack sizes, or that do not fit the tensors.
    """
    from .vae import VAE_FILE

    folder = Path(folder)
    config = config_json(folder)
    has_weights = any((folder / name).is_file() for name in WEIGHTS_FILES)
    shapes = weights_shapes(weights_file(folder)) if has_weights else {}
    vae_shapes = tensor_shapes(folder / VAE_FILE) if (folder / VAE_FILE).is_file() else {}

    text = _sizes(folder, "llm_config", config, TEXT_SIZES, TEXT_OPTIONS)
    embeddings = shapes.get("language_model.model.embed_tokens.weight")
    if embeddings is not None:
        text["vocab_size"] = embeddings[0]
    vision = _sizes(folder, "vit_config", config, VISION_SIZES, VISION_OPTIONS)
    vision["num_hidden_layers"] -= 1
    vision_side = vision["image_size"] // vision["patch_size"]
    return {
        "model_type": "bagel",
        "architectures": ["BagelForConditionalGeneration"],
        "text_config": text,
        "vision_config": vision,
        "max_latent_size": _table_side(shapes, "latent_pos_embed") or _count(config, "max_latent_size", 64),
        "vit_max_num_patch_per_side": _table_side(shapes, "vit_pos_embed")
        or _count(config, "vit_max_num_patch_per_side", vision_side),
        **_latent_sizes(folder, config, shapes, vae_shapes),
        **_special_token_ids(folder),
        **{name: config[name] for name in OPTIONS if name in config},
        # The file that transformers' `from_pretrained` then loads.
        **({"transformers_weights": weights_file(folder).name} if has_weights else {}),
    }


def config_json(folder: Path) -> dict[str, Any]:
    """The folder's config.json; empty if there is none, or one that is not JSON, as in an early Hub revision."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        return read_json(file)
    except ValueError as error:
        logger.warning("%s. Going on with llm_config.json and vit_config.json.", error)
        return {}


def vae_config(folder: Path) -> dict[str, Any]:
    """The entry of config.json that describes the VAE; empty where it is silent."""
    entry = config_json(folder).get("vae_config", {})
    if not isinstance(entry, dict):
        raise ValueError(f"'vae_config' in {folder / 'config.json'} must be an object, got {entry!r}")
    return entry


def load_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, whatever its config.json says.

    Raises:
        FileNotFoundError: no vocabulary.
    """
    check_vocabulary(Path(folder))
    # Given a config, AutoTokenizer leaves config.json alone, which may not be JSON. tokenizer_config.json still wins.
    config = PreTrainedConfig(tokenizer_class="Qwen2Tokenizer")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, config=config)
    return tokenizer


def check_vocabulary(folder: Path) -> None:
    """Complain about a folder without vocabulary, where transformers would go on with an empty tokenizer.

    Raises:
        FileNotFoundError: no vocabulary.
    """
    alternatives = (["tokenizer.json"], ["vocab.json", "merges.txt"])
    if not any(all((folder / name).is_file() for name in names) for names in alternatives):
        raise FileNotFoundError(
            f"no tokenizer in {folder}: looked for tokenizer.json, or vocab.json and merges.txt; "
            f"found {listing(folder)}"
        )


def write_official(components: Mapping[str, Any], folder: str | os.PathLike[str]) -> None:
    """Write a new folder in the official layout, whole or not at all.

    Args:
        components: `model`, `vae` and `processor`, as in `pipeline.components`.
        folder: must not exist, or be empty.

    Raises:
        ValueError: the folder is not empty, the model is quantized, has adapters or is offloaded, or the VAE is one
            that the layout cannot describe.
    """
    from .vae import save_vae

    model, tokenizer = components["model"], components["processor"].tokenizer
    check_in_memory(model, components["vae"])
    parts = _official_json(model.config)
    with new_folder(folder) as temporary:
        _save_weights(model, temporary)
        parts["config"]["vae_config"] = save_vae(components["vae"], temporary)
        for name, value in parts.items():
            (temporary / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(temporary)
        # vocab.json and merges.txt, which the official code reads and transformers 5 no longer writes.
        tokenizer.backend_tokenizer.model.save(str(temporary))


def _save_weights(model: BagelForConditionalGeneration, folder: Path) -> None:
    if model.config.to_dict().get("quantization_config"):
        raise ValueError("the official layout has no quantized weights: load the model without quantization_config")
    adapters = list(getattr(model, "peft_config", {}))  # which the model has from the first adapter on
    if adapters:
        raise ValueError(f"adapters {adapters} are loaded, which the official layout has no place for: merge them")
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    offloaded = [name for name, tensor in tensors.items() if tensor.is_meta]
    if offloaded:
        raise ValueError(
            f"{len(offloaded)} tensors are offloaded ({offloaded[0]}, ...); "
            "load the model without device_map to write it"
        )
    save_file(tensors, folder / WEIGHTS_FILES[0], metadata={"format": "pt"})


def _official_json(config: BagelConfig) -> dict[str, dict[str, Any]]:
    """Contents of config.json (without `vae_config`), llm_config.json and vit_config.json."""
    text_config, vision_config = cast(Qwen2Config, config.text_config), cast(SiglipVisionConfig, config.vision_config)
    text, vision = text_config.to_dict(), vision_config.to_dict()
    llm = {
        "model_type": "qwen2",
        **{name: text[name] for name in (*TEXT_SIZES, *TEXT_OPTIONS) if name in text and name != "rope_parameters"},
        **_rope(text_config),
        "tie_word_embeddings": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
    vit = {
        "model_type": "siglip_vision_model",
        **{name: vision[name] for name in (*VISION_SIZES, *VISION_OPTIONS)},
        "num_hidden_layers": vision["num_hidden_layers"] + 1,
    }
    names = ("max_latent_size", "vit_max_num_patch_per_side", "latent_patch_size", *OPTIONS)
    whole = {
        "model_type": "bagel",
        "architectures": ["BagelForConditionalGeneration"],
        "llm_config": llm,
        "vit_config": vit,
        **{name: getattr(config, name) for name in names},
    }
    return {"config": whole, "llm_config": llm, "vit_config": vit}


def _rope(text_config: Qwen2Config) -> dict[str, Any]:
    """`rope_parameters` of transformers 5 as the two keys of the official file."""
    parameters = dict(cast(dict[str, Any], text_config.rope_parameters))
    theta = parameters.pop("rope_theta")
    return {"rope_theta": theta, "rope_scaling": None if parameters == {"rope_type": "default"} else parameters}


def _sizes(
    folder: Path, name: str, config: dict[str, Any], required: tuple[str, ...], optional: tuple[str, ...]
) -> dict[str, Any]:
    """Part `name` of the configuration: its own file, else the entry of config.json."""
    file = folder / f"{name}.json"
    found = read_json(file) if file.is_file() else config.get(name)
    if not isinstance(found, dict):
        raise FileNotFoundError(
            f"{file} is missing, and config.json has no {name!r} either; {folder} holds {listing(folder)}"
        )
    wrong = {key: found.get(key) for key in required if not _is_count(found.get(key))}
    if wrong:
        raise ValueError(f"{name} of {folder} must give whole positive numbers, got {wrong}")
    return {key: found[key] for key in (*required, *optional) if found.get(key) is not None}


def _latent_sizes(folder: Path, config: dict[str, Any], shapes: Shapes, vae_shapes: Shapes) -> dict[str, int]:
    from .vae import vae_sizes

    patch_size = _count(config, "latent_patch_size", 2)
    if vae_shapes:
        sizes = vae_sizes(vae_shapes)
        channels, downsample = sizes["latent_channels"], 2 ** (len(sizes["block_out_channels"]) - 1)
    else:
        vae = vae_config(folder)
        channels, downsample = _count(vae, "z_channels", 16), _count(vae, "downsample", 8)
    if "vae2llm.weight" in shapes:
        values = shapes["vae2llm.weight"][1]
        patch_size = math.isqrt(values // channels)
        if patch_size**2 * channels != values:
            raise ValueError(
                f"vae2llm.weight takes tokens of {values} values, which hold no square of latents with "
                f"{channels} channels (the VAE's): model and VAE are of different checkpoints"
            )
    return {"latent_channels": channels, "latent_downsample": downsample, "latent_patch_size": patch_size}


def _table_side(shapes: Shapes, name: str) -> int | None:
    """Rows, and columns, of a table of positions (side**2, hidden); None without the table."""
    shape = shapes.get(f"{name}.pos_embed")
    if shape is None:
        return None
    side = math.isqrt(shape[0])
    if side**2 != shape[0]:
        raise ValueError(f"{name}.pos_embed has {shape[0]} rows, but a square grid of positions has a square number")
    return side


def _special_token_ids(folder: Path) -> dict[str, int]:
    from .configuration_bagel import SPECIAL_TOKEN_IDS
    from .image_processing_bagel import BagelImageProcessor
    from .processing_bagel import BagelProcessor

    processor = BagelProcessor(BagelImageProcessor(), load_tokenizer(folder))
    return {name: getattr(processor, name) for name in SPECIAL_TOKEN_IDS}


def _count(config: dict[str, Any], name: str, default: int) -> int:
    value: int = config.get(name, default)
    if not _is_count(value):
        raise ValueError(f"config.json: {name} must be a whole positive number, got {value!r}")
    return value


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0
