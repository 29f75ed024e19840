"""The VAE of the official layout (`ae.safetensors`, latent-diffusion names) as diffusers' `AutoencoderKL` and back."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file

from .files import Shapes, check_tensors, tensor_shapes

VAE_FILE = "ae.safetensors"

# FLUX.1's VAE, which the published checkpoints use and the official loaders hard-code.
FLUX_SCALE_FACTOR, FLUX_SHIFT_FACTOR = 0.3611, 0.1159
OFFICIAL_NORM_GROUPS = 32

# diffusers' name -> the official one, replaced in this order. diffusers itself converts in one direction only
# (`convert_ldm_vae_checkpoint`, with which a test compares this table).
OFFICIAL_NAMES = {
    "conv_norm_out.": "norm_out.",
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    ".group_norm.": ".norm.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".proj_out.",
    "down_blocks.": "down.",
    "up_blocks.": "up.",
    ".resnets.": ".block.",
    ".downsamplers.0.": ".downsample.",
    ".upsamplers.0.": ".upsample.",
    ".conv_shortcut.": ".nin_shortcut.",
}


def official_name(name: str, levels: int) -> str:
    """The official name of a tensor of an `AutoencoderKL` with `levels` resolutions."""
    for ours, official in OFFICIAL_NAMES.items():
        name = name.replace(ours, official)
    # The official decoder counts from the highest resolution, diffusers' from the lowest.
    return re.sub(r"(?<=decoder\.up\.)\d+", lambda match: str(levels - 1 - int(match[0])), name)


def encode_mean(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """The posterior's mean, scaled as the model expects: (B, 3, height, width) in [-1, 1] -> (B, z, h, w) float32."""
    mean: torch.Tensor = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
    return (mean.float() - (vae.config["shift_factor"] or 0.0)) * vae.config["scaling_factor"]


def vae_sizes(shapes: Shapes) -> dict[str, Any]:
    """Sizes of the `AutoencoderKL`, read off the shapes in ae.safetensors.

    Raises:
        ValueError: tensors of another architecture.
    """
    channels: list[int] = []
    while f"encoder.down.{len(channels)}.block.0.conv2.weight" in shapes:
        channels.append(shapes[f"encoder.down.{len(channels)}.block.0.conv2.weight"][0])
    blocks = 0
    while f"encoder.down.0.block.{blocks}.conv2.weight" in shapes:
        blocks += 1
    try:
        first, in_channels = shapes["encoder.conv_in.weight"][:2]
        latent_channels, out_channels = shapes["decoder.conv_in.weight"][1], shapes["decoder.conv_out.weight"][0]
    except KeyError as error:
        raise ValueError(f"{VAE_FILE} has no tensor {error}: it is no VAE in latent-diffusion names") from error
    if not channels or first != channels[0]:
        raise ValueError(
            f"{VAE_FILE} has blocks of {channels} channels after a first convolution to {first} channels; "
            "diffusers' AutoencoderKL needs the first block as wide as that convolution"
        )
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "block_out_channels": tuple(channels),
        "layers_per_block": blocks,
        "latent_channels": latent_channels,
    }


def load_vae(
    path: str | os.PathLike[str], vae_config: dict[str, Any] | None = None, dtype: torch.dtype | None = None
) -> AutoencoderKL:
    """The VAE of a folder in the official layout, memory-mapped; all sizes come from its tensors.

    Args:
        path: the folder, or a file such as its `ae.safetensors`.
        vae_config: `scale_factor`, `shift_factor`, `resolution` and `norm_num_groups` (ours; the official code has 32)
            as under `vae_config` in config.json; FLUX.1's values where it is silent.
        dtype: None keeps the file's.

    Raises:
        OSError: the file is missing or truncated.
        ValueError: tensors are missing, unexpected or of another shape, or a factor is no number.
    """
    path, vae_config = Path(path), vae_config or {}
    file = path / VAE_FILE if path.is_dir() else path
    shapes = tensor_shapes(file)
    sizes = vae_sizes(shapes)
    levels = len(sizes["block_out_channels"])
    with torch.device("meta"):
        vae = AutoencoderKL(
            **sizes,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            norm_num_groups=vae_config.get("norm_num_groups", OFFICIAL_NORM_GROUPS),
            sample_size=vae_config.get("resolution", 256),
            scaling_factor=_number(vae_config, "scale_factor", FLUX_SCALE_FACTOR),
            shift_factor=_number(vae_config, "shift_factor", FLUX_SHIFT_FACTOR),
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    vae.load_state_dict(_read_tensors(file, shapes, vae, dtype), assign=True)
    return vae.eval()


def save_vae(vae: AutoencoderKL, folder: Path) -> dict[str, Any]:
    """Write `ae.safetensors`; returns the `vae_config` to put into config.json.

    Raises:
        ValueError: a VAE that the official layout cannot describe.
    """
    config = vae.config
    channels = config.block_out_channels
    if config.use_quant_conv or config.use_post_quant_conv:
        raise ValueError("the official layout has no quant convolutions; this AutoencoderKL has some")
    if any(width % channels[0] for width in channels):
        raise ValueError(f"the official layout needs multiples of the first width, got {tuple(channels)}")
    tensors = {
        official_name(name, len(channels)): tensor.reshape(_official_shape(name, tensor)).contiguous()
        for name, tensor in vae.state_dict().items()
    }
    save_file(tensors, folder / VAE_FILE, metadata={"format": "pt"})
    groups = {} if config.norm_num_groups == OFFICIAL_NORM_GROUPS else {"norm_num_groups": config.norm_num_groups}
    return {
        "resolution": config.sample_size,
        "in_channels": config.in_channels,
        "downsample": 2 ** (len(channels) - 1),
        "ch": channels[0],
        "out_ch": config.out_channels,
        "ch_mult": [width // channels[0] for width in channels],
        "num_res_blocks": config.layers_per_block,
        "z_channels": config.latent_channels,
        "scale_factor": config.scaling_factor,
        "shift_factor": config.shift_factor or 0.0,
        **groups,
    }


def _read_tensors(
    file: Path, shapes: Shapes, vae: AutoencoderKL, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Tensors of the file under the names, and in the shapes, of `vae`."""
    ours = vae.state_dict()
    names = {name: official_name(name, len(vae.config.block_out_channels)) for name in ours}
    wanted = {names[name]: _official_shape(name, tensor) for name, tensor in ours.items()}
    check_tensors(
        file,
        missing=wanted.keys() - shapes.keys(),
        unexpected=shapes.keys() - wanted.keys(),
        misshapen=[
            (name, shapes[name], wanted[name]) for name in wanted if shapes.get(name, wanted[name]) != wanted[name]
        ],
    )
    with safe_open(file, framework="pt") as tensors:
        return {
            name: tensors.get_tensor(names[name]).reshape(tensor.shape).to(dtype=dtype)
            for name, tensor in ours.items()
        }


def _official_shape(name: str, tensor: torch.Tensor) -> tuple[int, ...]:
    """The official attention projects by 1x1 convolutions, diffusers' by linear layers."""
    is_projection = ".attentions." in name and tensor.dim() == 2
    return (*tensor.shape, 1, 1) if is_projection else tuple(tensor.shape)


def _number(config: dict[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if type(value) not in (int, float):
        raise ValueError(f"vae_config[{name!r}] must be a number, got {value!r}")
    return float(value)
