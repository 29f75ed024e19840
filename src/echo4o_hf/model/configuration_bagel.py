"""Configuration of Bagel: a mixture of two transformer experts with a vision encoder and latent heads."""

from __future__ import annotations

import os
from functools import cache
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, Qwen2Config, SiglipVisionConfig

SPECIAL_TOKEN_IDS = ("bos_token_id", "eos_token_id", "start_of_image_token_id", "end_of_image_token_id")


@strict
class BagelConfig(PreTrainedConfig):
    """Sizes of `BagelForConditionalGeneration`; the defaults are those of `ByteDance-Seed/BAGEL-7B-MoT`.

    Args:
        text_config: Both experts (`Qwen2Config`, whose attention gets a norm on queries and keys).
        vision_config: The SigLIP vision encoder; `num_hidden_layers` counts the layers that the checkpoint holds.
        latent_channels: Channels of the VAE's latents.
        latent_downsample: Image pixels per latent, along one side.
        latent_patch_size: Latents per token, along one side.
        max_latent_size: Rows and columns of the table of latent positions; limits the size of an image.
        vit_max_num_patch_per_side: Rows and columns of the tables of vision positions.
        interpolate_pos: Spread each image over the whole position tables instead of using their upper left corner.
        connector_act: Activation between the two layers that bring vision features into the language model.
        timestep_shift: Shift of the timesteps drawn in training.
        bos_token_id: Begins every text segment (`<|im_start|>`).
        eos_token_id: Ends every text segment (`<|im_end|>`).
        start_of_image_token_id: Begins every image segment (`<|vision_start|>`).
        end_of_image_token_id: Ends every image segment (`<|vision_end|>`).

    Raises:
        ValueError: Sizes that do not fit each other, with the numbers seen.
    """

    model_type = "bagel"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {"text_config": Qwen2Config, "vision_config": SiglipVisionConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    latent_channels: int = 16
    latent_downsample: int = 8
    latent_patch_size: int = 2
    max_latent_size: int = 64
    vit_max_num_patch_per_side: int = 70
    interpolate_pos: bool = False
    connector_act: str = "gelu_pytorch_tanh"
    timestep_shift: float = 1.0
    bos_token_id: int | None = 151644
    eos_token_id: int | list[int] | None = 151645
    pad_token_id: int | None = None
    start_of_image_token_id: int = 151652
    end_of_image_token_id: int = 151653
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None:
            self.text_config = {
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "vocab_size": 152064,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            }
        if self.vision_config is None:
            self.vision_config = {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 26,
                "num_attention_heads": 16,
                "patch_size": 14,
                "image_size": 980,
            }
        super().__post_init__(**kwargs)
        self._check_sizes()
        _register_models()

    @property
    def latent_stride(self) -> int:
        """Image pixels per latent token, along one side."""
        return self.latent_patch_size * self.latent_downsample

    @property
    def latent_dim(self) -> int:
        """Values of one latent token."""
        return self.latent_patch_size**2 * self.latent_channels

    @property
    def patch_dim(self) -> int:
        """Values of one vision patch."""
        return 3 * int(self.vision_config.patch_size) ** 2  # type: ignore[union-attr]

    def _check_sizes(self) -> None:
        # Not as a `validate_...` method, which transformers runs too: its error would not be a ValueError.
        text, vision = self.text_config, self.vision_config
        assert isinstance(text, Qwen2Config) and isinstance(vision, SiglipVisionConfig)
        _require_multiple("text_config.hidden_size", text.hidden_size, "num_attention_heads", text.num_attention_heads)
        _require_multiple(
            "text_config.num_attention_heads",
            text.num_attention_heads,
            "num_key_value_heads",
            text.num_key_value_heads or text.num_attention_heads,
        )
        _require_multiple(
            "vision_config.hidden_size", vision.hidden_size, "num_attention_heads", vision.num_attention_heads
        )
        if text.hidden_size % 4:
            raise ValueError(
                f"text_config.hidden_size={text.hidden_size} must be a multiple of 4: "
                "the position tables give a quarter each to the sines and cosines of column and row"
            )
        head_dim = text.hidden_size // text.num_attention_heads
        if head_dim % 2:
            raise ValueError(
                f"hidden_size={text.hidden_size} / num_attention_heads={text.num_attention_heads} gives heads of "
                f"{head_dim}, and rotary embeddings need an even size"
            )
        side = vision.image_size // vision.patch_size
        if side != self.vit_max_num_patch_per_side:
            raise ValueError(
                f"vision_config.image_size={vision.image_size} / patch_size={vision.patch_size} gives {side} patches "
                f"a side, but vit_max_num_patch_per_side={self.vit_max_num_patch_per_side}; they must be equal"
            )
        from transformers.activations import ACT2FN  # needs torch

        activations = {
            "connector_act": self.connector_act,
            "text_config.hidden_act": text.hidden_act,
            "vision_config.hidden_act": vision.hidden_act,
        }
        for name, activation in activations.items():
            if activation not in ACT2FN:
                raise ValueError(
                    f"{name}={activation!r} is no activation of transformers, such as 'gelu_pytorch_tanh'"
                )
        for name in ("latent_channels", "latent_downsample", "latent_patch_size", "max_latent_size", "timestep_shift"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in SPECIAL_TOKEN_IDS:
            token_id = getattr(self, name)
            if not isinstance(token_id, int) or not 0 <= token_id < text.vocab_size:
                raise ValueError(f"{name}={token_id} is not in the vocabulary of {text.vocab_size} tokens")

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read our `config.json`, or the several JSON files of the official layout."""
        from .checkpoint import (  # needs transformers' tokenizers, this file not
            HUB_OPTIONS,
            LOOKUP_OPTIONS,
            find_files,
            layout,
            official_config_dict,
        )

        hub_options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name)}
        folder = find_files(pretrained_model_name_or_path, "model", **hub_options)
        if folder is None:
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        settings = {name: kwargs[name] for name in kwargs if name not in (*HUB_OPTIONS, *LOOKUP_OPTIONS)}
        if layout(folder) == "official":
            return official_config_dict(folder), settings
        return super().get_config_dict(folder, **settings)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; `AutoConfig` brings the official config.json here, which says too little by itself.

        Raises:
            ValueError: an official config.json without the folder that it came from.
        """
        if "llm_config" in config_dict:
            if "name_or_path" not in kwargs:
                raise ValueError(
                    "the official config.json needs the files beside it: use BagelConfig.from_pretrained(folder)"
                )
            config_dict, _ = cls.get_config_dict(kwargs["name_or_path"])
        return super().from_dict(config_dict, **kwargs)


@cache
def _register_models() -> None:
    """Tell `AutoModel` and its kin which class belongs to this configuration."""
    from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

    from .modeling_bagel import BagelForConditionalGeneration

    for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(BagelConfig, BagelForConditionalGeneration, exist_ok=True)


def _require_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if divisor <= 0 or value % divisor:
        raise ValueError(f"{name}={value} must be a multiple of {divisor_name}={divisor}")
