"""Bagel: two transformer experts that share one attention, a vision encoder and latent heads.

The *understanding* expert reads texts, image markers and vision patches; the *generation* expert reads and draws VAE
latents. Each token passes the norms, projections and MLP of its expert; queries, keys and values of both meet in one
attention. Parameter names are those of the official checkpoint, in which the generation expert carries `_moe_gen`.

Letters in shape comments: B batch, U understanding tokens, G generation tokens, L = U + G, K cached tokens,
N latent tokens of the largest image, C hidden size, H heads, E head size, P vision patches, I images.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, Qwen2Config, SiglipVisionConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2MLP,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.siglip.modeling_siglip import SiglipEncoder
from transformers.utils import ModelOutput

from .checkpoint import HUB_OPTIONS, layout, resolve
from .configuration_bagel import BagelConfig
from .context import Branch, Context, NoisyBlock
from .files import check_finite, check_loading_info
from .packages import keep_packing, naming_packages, spare_small_parts
from .packing import (
    IGNORE,
    IMAGE,
    PADDING,
    TARGET,
    TEXT,
    Grid,
    Segment,
    collate,
    grid_position_ids,
    real_tokens,
    visibility,
)


@dataclass
class BagelOutput(ModelOutput):
    """Output of `BagelForConditionalGeneration`.

    Attributes:
        loss: Sum of the two losses below that have targets.
        flow_loss: Squared error of the velocity, averaged over channels: a mean over target tokens, or
            (batch, generation tokens) with `loss_reduction="none"`, zero elsewhere.
        text_loss: Cross entropy: a mean over labelled tokens, or (batch, understanding tokens) likewise.
        logits: (batch, kept tokens, vocabulary); None when labels are given, as only the loss is computed then.
        velocity: (batch, generation tokens, latent_dim) float32, noise minus clean latents.
        past_key_values: The cache, when `use_cache`.
        last_hidden_state: (batch, understanding + generation tokens, hidden) after the final norms.
    """

    loss: Tensor | None = None
    flow_loss: Tensor | None = None
    text_loss: Tensor | None = None
    logits: Tensor | None = None
    velocity: Tensor | None = None
    past_key_values: Cache | None = None
    last_hidden_state: Tensor | None = None


# ------------------------------------------------------------------------------------------------- the two experts


class BagelAttention(nn.Module):
    """One attention over the tokens of both experts; each projects and normalises its own."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config = config
        hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, cast(int, config.num_key_value_heads)
        self.head_dim = hidden // heads
        self.num_key_value_groups = heads // kv_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False

        self.q_proj = nn.Linear(hidden, heads * self.head_dim)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=False)
        self.q_norm = Qwen2RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen2RMSNorm(self.head_dim, eps=config.rms_norm_eps)

        self.q_proj_moe_gen = nn.Linear(hidden, heads * self.head_dim)
        self.k_proj_moe_gen = nn.Linear(hidden, kv_heads * self.head_dim)
        self.v_proj_moe_gen = nn.Linear(hidden, kv_heads * self.head_dim)
        self.o_proj_moe_gen = nn.Linear(heads * self.head_dim, hidden, bias=False)
        self.q_norm_moe_gen = Qwen2RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm_moe_gen = Qwen2RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        understanding: Tensor,
        generation: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        branches: Sequence[Branch],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, U, C), (B, G, C) -> the same, and the new keys and values, (B, H, L, E) each."""
        batch, num_understanding, _ = understanding.shape
        heads = (batch, -1, self.config.num_attention_heads, self.head_dim)
        kv_heads = (batch, -1, cast(int, self.config.num_key_value_heads), self.head_dim)

        q_u = self.q_norm(self.q_proj(understanding).view(heads))  # (B, U, H, E)
        k_u = self.k_norm(self.k_proj(understanding).view(kv_heads))
        v_u = self.v_proj(understanding).view(kv_heads)

        q_g = self.q_norm_moe_gen(self.q_proj_moe_gen(generation).view(heads))  # (B, G, H, E)
        k_g = self.k_norm_moe_gen(self.k_proj_moe_gen(generation).view(kv_heads))
        v_g = self.v_proj_moe_gen(generation).view(kv_heads)

        q = torch.cat([q_u, q_g], dim=1).transpose(1, 2)  # (B, H, L, E)
        k = torch.cat([k_u, k_g], dim=1).transpose(1, 2)
        v = torch.cat([v_u, v_g], dim=1).transpose(1, 2)
        rotated = apply_rotary_pos_emb(q, k, *position_embeddings)  # float32, as its tables are
        q, k = rotated[0].to(v.dtype), rotated[1].to(v.dtype)

        sizes = [branch.num_rows for branch in branches]
        of_branches = zip(q.split(sizes), k.split(sizes), v.split(sizes), branches, strict=True)
        out = torch.cat([self.attend(*of_branch) for of_branch in of_branches])
        out = out.reshape(batch, out.shape[1], -1)  # (B, L, C)
        return self.o_proj(out[:, :num_understanding]), self.o_proj_moe_gen(out[:, num_understanding:]), k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, branch: Branch) -> Tensor:
        """What the rows of one branch see: (rows, H, L, E) each -> (rows, L, H, E)."""
        if branch.keys is not None and branch.values is not None:
            k, v = branch.append(branch.keys, k), branch.append(branch.values, v)  # (rows, H, K + L, E)
        backend = self.config._attn_implementation
        if "flash" in (backend or "") and isinstance(branch.mask, Tensor) and branch.mask.dim() == 4:
            backend = "sdpa"  # see `BagelForConditionalGeneration.make_mask`
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
        if backend == "flex_attention" and q.is_cpu:
            attention = partial(_flex_uncompiled, attention)
        out: Tensor = attention(
            self, q, k, v, branch.mask, scaling=self.scaling, dropout=0.0, is_causal=branch.is_causal
        )[0]
        return out


class BagelDecoderLayer(GradientCheckpointingLayer):
    """One layer of both experts, written side by side."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.self_attn = BagelAttention(config)

        self.mlp = Qwen2MLP(config)
        self.input_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

        self.mlp_moe_gen = Qwen2MLP(config)
        self.input_layernorm_moe_gen = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm_moe_gen = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, understanding: Tensor, generation: Tensor, **attention_inputs: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As its attention."""
        attended_u, attended_g, keys, values = self.self_attn(
            self.input_layernorm(understanding), self.input_layernorm_moe_gen(generation), **attention_inputs
        )
        understanding = understanding + attended_u
        generation = generation + attended_g

        understanding = understanding + self.mlp(self.post_attention_layernorm(understanding))
        generation = generation + self.mlp_moe_gen(self.post_attention_layernorm_moe_gen(generation))
        return understanding, generation, keys, values


class BagelRotaryEmbedding(Qwen2RotaryEmbedding):
    """Upstream's, but its frequencies stay float32 when the model is cast: rounded, far positions would be wrong."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if buffer.dtype != exact[name].dtype:
                setattr(self, name, exact[name].to(buffer.device))
        return self


class BagelTextModel(nn.Module):
    """Qwen2's decoder with a second set of weights for latents: upstream's has one stream."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([BagelDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.norm_moe_gen = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = BagelRotaryEmbedding(config)

    def forward(
        self,
        understanding: Tensor,
        generation: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        branches: Iterable[Sequence[Branch]],
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states: (B, U, C), (B, G, C) -> the same.

        Args:
            understanding: Embedded texts, markers and vision patches.
            generation: Embedded latents.
            position_embeddings: What `rotary_emb` gives, 2 x (B, L, E) float32.
            branches: For each layer, what the rows see.
            cache: Keys and values are appended to it.
        """
        for index, (layer, of_layer) in enumerate(zip(self.layers, branches, strict=True)):
            understanding, generation, keys, values = layer(
                understanding, generation, position_embeddings=position_embeddings, branches=of_layer
            )
            if cache is not None:
                cache.update(keys, values, index)
        return self.norm(understanding), self.norm_moe_gen(generation)


class BagelLanguageModel(nn.Module):
    """Holds `model` and `lm_head` under the official names."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.model = BagelTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


# --------------------------------------------------------------------------------------------------- seeing images


class BagelVisionEmbeddings(nn.Module):
    """Linear patches and learned positions looked up by row and column (SigLIP's own takes one square size)."""

    def __init__(self, config: SiglipVisionConfig, max_per_side: int) -> None:
        super().__init__()
        self.max_per_side = max_per_side
        self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding(max_per_side**2, config.hidden_size)

    def forward(self, patches: Tensor, position_ids: Tensor) -> Tensor:
        """(P, patch_dim), (P,) -> (P, vision hidden)."""
        return self.patch_embedding(patches) + self.position_embedding(position_ids)


class BagelVisionTransformer(nn.Module):
    """SigLIP's encoder over images of any grid, each seeing only itself."""

    def __init__(self, config: SiglipVisionConfig, max_per_side: int) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BagelVisionEmbeddings(config, max_per_side)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches: Tensor, position_ids: Tensor, lengths: list[int]) -> Tensor:
        """Patches of all images in a row (P, patch_dim), patches per image -> (P, vision hidden)."""
        embeds = self.embeddings(patches, position_ids)
        images = pad_sequence(list(embeds.split(lengths)), batch_first=True)  # (I, longest, vision hidden)
        real = real_tokens(torch.tensor(lengths, device=images.device), images.shape[1])
        with _flex_on_cpu(self.config._attn_implementation, images):
            mask = create_bidirectional_mask(config=self.config, inputs_embeds=images, attention_mask=real)
            hidden = self.encoder(inputs_embeds=images, attention_mask=mask).last_hidden_state
        return self.post_layernorm(hidden[real])


class BagelVisionModel(nn.Module):
    """Holds `vision_model` under the official name."""

    def __init__(self, config: SiglipVisionConfig, max_per_side: int) -> None:
        super().__init__()
        self.vision_model = BagelVisionTransformer(config, max_per_side)


class BagelConnector(nn.Module):
    """Brings vision features to the language model's size."""

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        vision, text = cast(SiglipVisionConfig, config.vision_config), cast(Qwen2Config, config.text_config)
        self.fc1 = nn.Linear(vision.hidden_size, text.hidden_size)
        self.act = ACT2FN[config.connector_act]
        self.fc2 = nn.Linear(text.hidden_size, text.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """(P, vision hidden) -> (P, C)."""
        return self.fc2(self.act(self.fc1(features)))


# ------------------------------------------------------------------------------------------------- drawing latents


class BagelPositionTable(nn.Module):
    """Fixed two-dimensional sines and cosines; saved with the checkpoint, never trained."""

    def __init__(self, max_per_side: int, hidden_size: int) -> None:
        super().__init__()
        self.max_per_side = max_per_side
        self.pos_embed = nn.Buffer(torch.zeros(max_per_side**2, hidden_size))

    def forward(self, position_ids: Tensor) -> Tensor:
        """(...) -> (..., C)."""
        return self.pos_embed[position_ids]

    def values(self) -> Tensor:
        """[sin column, cos column, sin row, cos row], a quarter each; float64 inside, as the official code has it."""
        quarter = self.pos_embed.shape[1] // 4
        frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
        angles = torch.arange(self.max_per_side, dtype=torch.float64)[:, None] * frequencies
        axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, C / 2)
        rows, columns = axis.repeat_interleave(self.max_per_side, 0), axis.repeat(self.max_per_side, 1)
        return torch.cat([columns, rows], dim=1).float()


class BagelTimestepEmbedder(nn.Module):
    """Timesteps in [0, 1], not multiplied by 1000 as diffusion models do."""

    num_frequencies = 128

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * self.num_frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, timestep: Tensor) -> Tensor:
        """(...) float32 -> (..., C)."""
        index = torch.arange(self.num_frequencies, dtype=torch.float32, device=timestep.device)
        angles = timestep.float()[..., None] * torch.exp(-math.log(10000.0) / self.num_frequencies * index)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(cast(nn.Linear, self.mlp[0]).weight.dtype))


# ------------------------------------------------------------------------------------------------------- the model


class BagelPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the architecture."""

    config: BagelConfig
    config_class = BagelConfig
    base_model_prefix = "language_model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["BagelDecoderLayer", "SiglipEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_missing = [r"(latent|vit)_pos_embed\.pos_embed"]
    # diffusers' group offloading by blocks brings a module when its parent is called, but these when they are called
    # themselves: their parents never are.
    _group_offload_block_modules = [
        "language_model", "model", "embed_tokens", "rotary_emb", "lm_head", "vit_model", "vision_model", "connector",
        "vit_pos_embed", "latent_pos_embed", "time_embedder", "mlp", "vae2llm", "llm2vae",
    ]  # fmt: skip

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BagelPositionTable):
            init.copy_(module.pos_embed, module.values())

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, str], allow_all_kernels: bool = False
    ) -> None:
        """As upstream's, which looks for sub-models; the parts of this one are plain modules with a config each."""
        wanted = attn_implementation if isinstance(attn_implementation, dict) else {"": attn_implementation}
        with naming_packages():
            super().set_attn_implementation({"": wanted.get("", self.config._attn_implementation)}, allow_all_kernels)
        for name in self.config.sub_configs:
            part = getattr(self.config, name)
            part._attn_implementation = wanted.get(
                name, self.config._attn_implementation if "" in wanted else part._attn_implementation
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Load our layout or the official one (`ema.safetensors`), as `PreTrainedModel.from_pretrained` does.

        bitsandbytes and torchao quantize the layers of both experts, never `packages.NOT_QUANTIZED`.

        Raises:
            ValueError: Tensors are missing, unexpected, of another shape or not finite; they are named.
            OSError: A file is missing, truncated or no safetensors.
            ImportError: A package for the attention or the quantization is missing.
        """
        with_info = kwargs.pop("output_loading_info", False)
        hub_options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        folder = resolve(pretrained_model_name_or_path, component="model", **hub_options)
        if layout(folder) == "official":
            # The generation_config.json there is Qwen's, which samples; the official code does not read it.
            config = kwargs.setdefault("config", BagelConfig.from_pretrained(folder))
            kwargs.setdefault("generation_config", GenerationConfig.from_model_config(config))
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # to name them all in our error
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = spare_small_parts(kwargs["quantization_config"])
        with naming_packages():
            model, info = super().from_pretrained(folder, *args, **kwargs)
        check_loading_info(info, folder)
        check_finite(model, folder)
        keep_packing(model)
        return (model, info) if with_info else model


class BagelForConditionalGeneration(BagelPreTrainedModel, GenerationMixin):
    """Sees images, writes text and predicts the velocity of latents.

    arXiv 2505.14683; official `modeling/bagel/bagel.py`. The VAE is not part of it: latents come in and go out as
    tokens of latent_patch_size**2 * latent_channels values, row by row.
    """

    def __init__(self, config: BagelConfig) -> None:
        super().__init__(config)
        text, vision = cast(Qwen2Config, config.text_config), cast(SiglipVisionConfig, config.vision_config)
        for part in (text, vision):  # transformers resolves the default for models only, and ours has none inside
            part._attn_implementation = part._attn_implementation or config._attn_implementation
        self.language_model = BagelLanguageModel(text)
        self.vit_model = BagelVisionModel(vision, config.vit_max_num_patch_per_side)
        self.connector = BagelConnector(config)
        self.vit_pos_embed = BagelPositionTable(config.vit_max_num_patch_per_side, text.hidden_size)
        self.time_embedder = BagelTimestepEmbedder(text.hidden_size)
        self.vae2llm = nn.Linear(config.latent_dim, text.hidden_size)
        self.llm2vae = nn.Linear(text.hidden_size, config.latent_dim)
        self.latent_pos_embed = BagelPositionTable(config.max_latent_size, text.hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of text ids."""
        return self.language_model.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding of text ids."""
        self.language_model.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The head that predicts text ids."""
        return self.language_model.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the head that predicts text ids."""
        self.language_model.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        segment_ids: Tensor | None = None,
        roles: Tensor | None = None,
        sample_ids: Tensor | None = None,
        vision_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        vision_grids: Tensor | None = None,
        latents: Tensor | None = None,
        latent_grids: Tensor | None = None,
        noise: Tensor | None = None,
        timestep: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        loss_reduction: Literal["mean", "none"] = "mean",
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> BagelOutput | tuple[Any, ...]:
        """Run both streams once; `collate` makes the inputs from segments.

        Args:
            input_ids: (batch, understanding tokens); any id where `vision_mask` is True.
            attention_mask: (batch, cached + understanding tokens), 0 on padding. Needed only for cached tokens and
                for plain text: `segment_ids` says it too.
            position_ids: (batch, understanding + generation tokens) rope positions; consecutive by default.
            past_key_values: Keys and values that all tokens see; appended to when `use_cache`.
            inputs_embeds: (batch, understanding tokens, hidden) instead of `input_ids`.
            segment_ids: (batch, understanding + generation tokens), rising along a row, -1 on padding. A token sees
                earlier segments and its own; by default all is one text.
            roles: Same shape: 0 text (causal), 1 image (sees itself both ways), 2 target (as 1, hidden from others).
            sample_ids: Same shape: tokens of different samples in one packed row do not see each other.
            vision_mask: (batch, understanding tokens) bool, True where vision features go.
            pixel_values: (batch, patches, 3 * patch_size**2), the patches of all images of a row, zero-padded.
            vision_grids: (batch, images, 2), rows and columns of each image, zero-padded.
            latents: (batch, generation tokens, latent_dim), clean.
            latent_grids: (batch, latent images, 2), rows and columns of each, zero-padded.
            noise: Like `latents`, for targets; drawn when absent.
            timestep: (batch, generation tokens) in [0, 1], read on targets; by default one per target, logit-normal
                and shifted by `config.timestep_shift` (official `PackedDataset`).
            labels: (batch, understanding tokens), shifted inside as in every causal language model.
            shift_labels: The same, already shifted: the id that each token must predict. -100 is ignored.
            loss_reduction: "none" returns the losses per token.
            use_cache: Append to `past_key_values` (made when absent) and return it.
            logits_to_keep: Number of last tokens, or indices, to compute logits of; 0 is all.
            return_dict: False for a tuple.

        Raises:
            ValueError: Tensors that do not fit each other.
        """
        # 1. Embed the understanding stream.
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        understanding = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds  # (B, U, C)
        if pixel_values is not None:
            understanding = _place(self.embed_images(pixel_values, vision_grids), vision_mask, understanding)

        # 2. Noise the targets and embed the generation stream.
        generation = target_velocity = understanding[:, :0]  # (B, 0, C)
        target_mask = generation.any(-1)  # (B, 0)
        if latents is not None:
            if roles is None or segment_ids is None or latent_grids is None:
                raise ValueError("latents need roles, segment_ids and latent_grids; `collate` makes them")
            num_latents = latents.shape[1]
            target_mask = roles[:, -num_latents:] == TARGET  # (B, G)
            noise = torch.randn_like(latents, dtype=torch.float32) if noise is None else noise
            timestep = self.sample_timestep(segment_ids[:, -num_latents:]) if timestep is None else timestep
            timestep = torch.where(target_mask, timestep.float(), 0.0)
            noisy = torch.lerp(latents.float(), noise.float(), timestep[..., None])
            target_velocity = noise.float() - latents.float()  # (B, G, latent_dim)
            generation = self.embed_latents(noisy, timestep, latent_grids)  # (B, G, C)

        # 3. Run the experts.
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        hidden_u, hidden_g = self._run(
            understanding, generation, attention_mask, position_ids, past_key_values, bool(use_cache),
            segment_ids, roles, sample_ids,
        )  # fmt: skip

        # 4. Heads, and losses where there are targets.
        output = BagelOutput(past_key_values=past_key_values, last_hidden_state=torch.cat([hidden_u, hidden_g], dim=1))
        if labels is not None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        if shift_labels is not None:
            output.text_loss = self._text_loss(hidden_u, shift_labels, loss_reduction)
            output.loss = output.text_loss
        else:
            keep = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
            output.logits = self.language_model.lm_head(hidden_u[:, keep])
        # Per token, the loss is there without targets too: processes that train together wait for all gradients.
        if latents is not None and (loss_reduction == "none" or bool(target_mask.any())):
            output.velocity = self.llm2vae(hidden_g).float()
            error = (output.velocity - target_velocity).pow(2).mean(-1) * target_mask  # (B, G)
            output.flow_loss = error if loss_reduction == "none" else error.sum() / target_mask.sum()
            if loss_reduction == "mean":
                output.loss = output.flow_loss if output.loss is None else output.loss + output.flow_loss
        if loss_reduction == "none":
            output.loss = None
        return output if return_dict is not False else output.to_tuple()

    def sample_timestep(self, segment_ids: Tensor) -> Tensor:
        """One shifted logit-normal timestep per segment, spread over its tokens: (batch, tokens) -> the same."""
        per_segment = torch.randn(
            segment_ids.shape[0], int(segment_ids.max()) + 2, device=segment_ids.device
        ).sigmoid()
        shift = self.config.timestep_shift
        return (shift * per_segment / (1 + (shift - 1) * per_segment)).gather(1, segment_ids + 1)

    def embed_images(self, pixel_values: Tensor, vision_grids: Tensor | None) -> Tensor:
        """Vision features of all images, in order: (batch, patches, patch_dim) -> (all patches, hidden).

        Raises:
            ValueError: Grids are missing or do not match the patches or the position table.
        """
        if vision_grids is None:
            raise ValueError("pixel_values need vision_grids, the rows and columns of each image")
        counts = vision_grids.prod(-1)  # (B, I)
        if int(counts.sum(1).max()) > pixel_values.shape[1]:
            raise ValueError(
                f"vision_grids={vision_grids.tolist()} name more patches than pixel_values {tuple(pixel_values.shape)}"
            )
        real = real_tokens(counts.sum(1), pixel_values.shape[1])  # (B, patches)
        grids = [(int(rows), int(columns)) for rows, columns in vision_grids.reshape(-1, 2).tolist() if rows]
        side, interpolate = self.config.vit_max_num_patch_per_side, self.config.interpolate_pos
        position_ids = torch.cat([grid_position_ids(grid, side, interpolate) for grid in grids])
        position_ids = position_ids.to(pixel_values.device)
        vision = self.vit_model.vision_model
        patches = pixel_values[real].to(vision.embeddings.patch_embedding.weight.dtype)
        features = vision(patches, position_ids, [rows * columns for rows, columns in grids])
        return cast(Tensor, self.connector(features) + self.vit_pos_embed(position_ids))

    def embed_latents(self, latents: Tensor, timestep: Tensor, latent_grids: Tensor) -> Tensor:
        """(batch, tokens, latent_dim), (batch, tokens), (batch, images, 2) -> (batch, tokens, hidden).

        Raises:
            ValueError: The grids are larger than the latents or than the position table.
        """
        rows = [[grid for grid in row if grid[0]] for row in latent_grids.tolist()]
        embeds = self.vae2llm(latents.to(self.vae2llm.weight.dtype)) + self.time_embedder(timestep)
        return cast(Tensor, embeds + self.latent_positions(rows, latents.shape[1], latents.device))

    def latent_positions(self, grids: Sequence[Sequence[Grid]], num_tokens: int, device: torch.device) -> Tensor:
        """Position embeddings of the latents of each row's images, one after the other: (batch, num_tokens, hidden).

        Raises:
            ValueError: The grids are larger than the position table, or have more than `num_tokens`.
        """
        side, interpolate = self.config.max_latent_size, self.config.interpolate_pos
        position_ids = torch.zeros(len(grids), num_tokens, dtype=torch.long)
        for row_ids, row in zip(position_ids, grids, strict=True):
            ids = torch.cat([*(grid_position_ids(grid, side, interpolate) for grid in row), row_ids[:0]])
            if len(ids) > num_tokens:
                raise ValueError(f"latent_grids name {len(ids)} tokens, but latents have {num_tokens} a row")
            row_ids[: len(ids)] = ids
        return cast(Tensor, self.latent_pos_embed(position_ids.to(device)))

    def _run(
        self,
        understanding: Tensor,
        generation: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        update_cache: bool,
        segment_ids: Tensor | None,
        roles: Tensor | None,
        sample_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        batch, length = understanding.shape[0], understanding.shape[1] + generation.shape[1]
        device = understanding.device
        cached = past_key_values.get_seq_length() if past_key_values is not None else 0
        past = torch.ones(batch, cached, dtype=torch.bool, device=device)
        if attention_mask is not None:
            past = attention_mask[:, :cached].bool()
        if segment_ids is None:  # plain text, whose padding only attention_mask tells
            segment_ids = torch.zeros(batch, length, dtype=torch.long, device=device)
            if attention_mask is not None:
                segment_ids = torch.where(attention_mask[:, cached:].bool(), segment_ids, PADDING)
        roles = torch.full_like(segment_ids, TEXT) if roles is None else roles
        sample_ids = torch.zeros_like(segment_ids) if sample_ids is None else sample_ids
        if position_ids is None:
            real = torch.cat([past, segment_ids != PADDING], dim=1)
            position_ids = (real.cumsum(1) - 1).clamp(min=0)[:, cached:]
        mask, is_causal = self.make_mask(
            past, segment_ids, roles, sample_ids, understanding.dtype, dense_for_flash=update_cache
        )
        text_model = self.language_model.model
        branches = [
            [Branch.after(past_key_values, layer, batch, mask, is_causal)] for layer in range(len(text_model.layers))
        ]
        return text_model(
            understanding,
            generation,
            text_model.rotary_emb(position_ids.float(), position_ids),
            branches,
            past_key_values if update_cache else None,
        )

    def make_mask(
        self,
        past: Tensor,
        segment_ids: Tensor,
        roles: Tensor,
        sample_ids: Tensor,
        dtype: torch.dtype,
        dense_for_flash: bool = False,
    ) -> tuple[Any, bool]:
        """What each token sees, in the form that the attention backend takes, and whether it is causal instead.

        Flash attention has no mask for rows that mix texts and images. With `dense_for_flash`, for prompts, they get
        that of sdpa, which then attends; packs for training are too long for it.

        Raises:
            ValueError: Flash attention is set and the rows mix texts and images, without `dense_for_flash`.
        """
        (batch, cached), length = past.shape, segment_ids.shape[1]
        backend = cast(Qwen2Config, self.config.text_config)._attn_implementation or "eager"
        real = segment_ids != PADDING
        unpadded = bool(past.all()) and bool(real.all())
        one_segment = bool((segment_ids == segment_ids.amax(1, keepdim=True))[real].all())
        sees_all = bool((roles != TEXT)[real].all()) or length == 1
        if unpadded and one_segment and sees_all:
            return None, False
        if "flash" in backend:
            if one_segment and (sees_all or bool((roles == TEXT)[real].all())):
                return (None if unpadded else torch.cat([past, real], dim=1)), not sees_all
            if not dense_for_flash:
                raise ValueError(
                    f"attn_implementation={backend!r} cannot mix segments in one call; use flex_attention or sdpa"
                )
            backend = "sdpa"
        with _flex_on_cpu(backend, past):
            mask = ALL_MASK_ATTENTION_FUNCTIONS[backend](
                batch_size=batch,
                q_length=length,
                kv_length=cached + length,
                q_offset=cached,
                mask_function=visibility(past, segment_ids, roles, sample_ids),
                dtype=dtype,
                device=segment_ids.device,
                allow_is_causal_skip=False,
                allow_is_bidirectional_skip=False,
            )
        return mask, False

    def _text_loss(self, hidden: Tensor, shift_labels: Tensor, reduction: str) -> Tensor:
        labelled = shift_labels != IGNORE  # (B, U)
        logits = self.language_model.lm_head(hidden[labelled])  # (labelled, vocabulary): all tokens' would be huge
        losses = F.cross_entropy(logits.float(), shift_labels[labelled], reduction="none")
        if reduction == "mean":
            return losses.sum() / labelled.sum().clamp(min=1)
        return torch.zeros(labelled.shape, device=losses.device).masked_scatter(labelled, losses)

    # ------------------------------------------------------------------------------------------------- inference

    def _uncompiled(self) -> AbstractContextManager[Any]:
        """Layers that were compiled to draw run as they are: texts are of any length, and each would be compiled."""
        is_compiled = self.language_model.model.layers[0]._compiled_call_impl is not None
        return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()

    def prefill(self, context: Context, segments: Sequence[Segment | None]) -> Context:
        """Append one segment per row (None appends nothing) and return the new context.

        The given context must not be used afterwards; `copy` it first to keep it.
        """
        batch = collate(
            [[] if segment is None else [segment] for segment in segments],
            first_positions=context.next_position.tolist(),
        )
        # Not self.device: an offloaded model is moved when it is called.
        inputs = {name: value.to(context.attention_mask.device) for name, value in batch.items()}
        with self._uncompiled():
            output = self(
                **inputs,
                attention_mask=context.attention_mask,
                past_key_values=context.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        advance = [0 if segment is None else segment.rope_advance for segment in segments]
        return Context(
            output.past_key_values,
            torch.cat([context.attention_mask, inputs["segment_ids"] != PADDING], dim=1),
            context.next_position + torch.tensor(advance, device=context.next_position.device),
        )

    def prepare_noisy_block(
        self, contexts: Sequence[Context], grids: Sequence[Grid], num_tokens: int | None = None
    ) -> NoisyBlock:
        """All of `predict_velocity` that is the same at every update; contexts are copied into it.

        Args:
            contexts: Each holds some of the images' contexts, one row per image; those of one have the same number of
                tokens, padding included, so that rows of like length belong together.
            grids: Rows and columns of all images, in tokens.
            num_tokens: Of the latents, the largest image's by default.
        """
        device = contexts[0].attention_mask.device
        config, text_model = self.config, self.language_model.model
        lengths = torch.tensor([rows * columns for rows, columns in grids], device=device)
        num_tokens = num_tokens or int(lengths.max())
        markers = torch.tensor([config.start_of_image_token_id, config.end_of_image_token_id], device=device)
        real = real_tokens(2 + lengths, 2 + num_tokens)  # the markers come first: (B, 2 + N)
        segment_ids = torch.where(real, 0, PADDING)
        roles = torch.full_like(segment_ids, IMAGE)
        sizes = [len(context.next_position) for context in contexts]
        masks = [
            self.make_mask(context.attention_mask, segments, of_rows, torch.zeros_like(segments), self.dtype)[0]
            for context, segments, of_rows in zip(contexts, segment_ids.split(sizes), roles.split(sizes), strict=True)
        ]
        position_ids = torch.cat([context.next_position for context in contexts])[:, None].expand(-1, 2 + num_tokens)
        return NoisyBlock(
            markers=self.get_input_embeddings()(markers).repeat(len(grids), 1, 1),
            latent_positions=self.latent_positions([[grid] for grid in grids], num_tokens, device),
            position_embeddings=text_model.rotary_emb(position_ids.float(), position_ids),
            branches=[
                [
                    Branch.with_room(context, layer, 2 + num_tokens, mask)
                    for context, mask in zip(contexts, masks, strict=True)
                ]
                for layer in range(len(text_model.layers))
            ],
        )

    def predict_velocity(self, latents: Tensor, timestep: Tensor, block: NoisyBlock) -> Tensor:
        """Velocity (noise minus data) of noisy images that see their contexts and leave them as they are.

        Args:
            latents: (batch, tokens, latent_dim), shorter images padded at the end.
            timestep: (batch,) in [0, 1].
            block: What `prepare_noisy_block` gives.

        Returns:
            (batch, tokens, latent_dim) float32; without meaning on padding.
        """
        embeds = self.vae2llm(latents.to(self.vae2llm.weight.dtype)) + block.latent_positions  # (B, N, C)
        generation = embeds + self.time_embedder(timestep.to(latents.device))[:, None]
        _, hidden = self.language_model.model(block.markers, generation, block.position_embeddings, block.branches)
        return cast(Tensor, self.llm2vae(hidden).float())

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Write text, as in transformers, with a dynamic cache.

        Raises:
            ValueError: Another cache, none, or a filled one without `position_ids`; assisted generation after images;
                hidden states or attentions are asked for.
        """
        cache = kwargs.get("past_key_values")
        if isinstance(cache, DynamicCache) and cache.get_seq_length() and kwargs.get("position_ids") is None:
            raise ValueError(
                "past_key_values need position_ids, as images take fewer positions than tokens: pass them, or all "
                "texts and images again without past_key_values"
            )
        with self._uncompiled():
            return super().generate(*args, **kwargs)

    def generate_from(self, context: Context, max_new_tokens: int, **kwargs: Any) -> Tensor:
        """Write one text after each row of a context, which stays as it is: ids (batch, at most max_new_tokens).

        Keyword arguments are those of `generate`, without beams, several texts per row and assisted generation.
        """
        batch, cached = context.attention_mask.shape
        bos = torch.full((batch, 1), cast(int, self.config.bos_token_id), device=context.attention_mask.device)
        input_ids = torch.cat([bos.expand(-1, cached), bos], dim=1)  # generate counts cached tokens by their ids
        ids: Tensor = self.generate(
            input_ids=input_ids,
            attention_mask=torch.cat([context.attention_mask.long(), torch.ones_like(bos)], dim=1),
            position_ids=context.next_position[:, None],
            past_key_values=context.copy().cache,
            max_new_tokens=max_new_tokens,
            use_cache=True,
            num_beams=1,
            num_return_sequences=1,
            return_dict_in_generate=False,
            **kwargs,
        )
        return ids[:, cached + 1 :]

    def prepare_inputs_for_generation(
        self, *args: Any, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """The tensors that describe segments and images belong to the first step; what follows is text."""
        cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if not isinstance(cache, DynamicCache) or not use_cache:
            raise ValueError(
                f"texts are written with a DynamicCache, not with {type(cache).__name__} and {use_cache=}: leave "
                "use_cache and cache_implementation at their defaults"
            )
        if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
            raise ValueError("output_hidden_states and output_attentions are not kept: leave them False")
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            *args, is_first_iteration=is_first_iteration, **kwargs
        )
        segment_ids = inputs.get("segment_ids")
        is_assisted = segment_ids is not None and segment_ids.shape[1] != inputs["input_ids"].shape[1]
        if is_first_iteration and is_assisted and inputs.get("pixel_values") is not None:
            raise ValueError("assisted generation (assistant_model, prompt_lookup_num_tokens) needs a prompt of text")
        if not is_first_iteration or is_assisted:
            for name in ("segment_ids", "roles", "sample_ids", "vision_mask", "pixel_values", "vision_grids"):
                inputs.pop(name, None)
        return inputs


def _flex_on_cpu(backend: str | None, states: Tensor) -> AbstractContextManager[Any]:
    """On CPUs flex attention runs as it is: compiled, it knows some lengths only, and takes wrong rows of a batch."""
    is_flex_on_cpu = backend == "flex_attention" and states.is_cpu
    return torch.compiler.set_stance("force_eager") if is_flex_on_cpu else nullcontext()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _flex_uncompiled(attention: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`_flex_on_cpu` also inside of compiled layers, where no stance can be set."""
    with torch.compiler.set_stance("force_eager"):
        return attention(*args, **kwargs)


def _place(features: Tensor, mask: Tensor | None, embeds: Tensor) -> Tensor:
    """Put features (patches, hidden) into the masked places of (batch, tokens, hidden)."""
    places = 0 if mask is None else int(mask.sum())
    if mask is None or places != features.shape[0]:
        raise ValueError(f"vision_mask marks {places} tokens, but the images have {features.shape[0]} patches")
    return embeds.masked_scatter(mask[..., None], features.to(embeds.dtype))
