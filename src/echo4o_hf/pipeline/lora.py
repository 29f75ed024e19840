"""Low-rank adapters in the pipeline: load, mix, merge and save them, with the method names of diffusers.

diffusers' mixin does most of it, but reads and writes adapters in formats of its own; ours are peft's
(adapter_config.json and adapter_model.safetensors), which training leaves and any peft tool reads.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL
from diffusers.hooks.group_offloading import (
    _get_top_level_group_offload_hook,
    _maybe_remove_and_reapply_group_offloading,
)
from diffusers.loaders.lora_base import LoraBaseMixin
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import is_peft_available

from ..model.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, find_adapter
from ..model.files import Shapes, check_in_memory, read_json, shortened, tensor_shapes
from ..model.modeling_bagel import BagelForConditionalGeneration

if TYPE_CHECKING:
    from peft import LoraConfig

PREFIX = "base_model.model."  # of module names in files of peft


class LoraMixin(LoraBaseMixin):
    """Adapters on `pipeline.model`; `set_adapters`, `enable_lora` and others are diffusers' own."""

    _lora_loadable_modules = ["model"]

    model: BagelForConditionalGeneration
    vae: AutoencoderKL

    def load_lora_weights(
        self,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str | None = None,
        weight_name: str = ADAPTER_WEIGHTS,
        revision: str | None = None,
        subfolder: str | None = None,
        **hub_options: Any,
    ) -> None:
        """Adds an adapter in the dtype of the model, and makes it the only active one; `set_adapters` mixes several.

        Args:
            pretrained_model_name_or_path: folder or Hub name with adapter_config.json and the weights.
            adapter_name: what to call it; by default "default_0", "default_1", ...
            weight_name: file of the weights.
            revision: branch, tag or commit on the Hub.
            subfolder: where the adapter is inside.
            **hub_options: `cache_dir`, `token`, `local_files_only`, `force_download`.

        Raises:
            OSError: files are missing or damaged, or there is no network.
            ValueError: the adapter is no LoRA, or one for another model, or holds NaN; the name is taken; adapters
                are fused.
            ImportError: peft is missing.
        """
        try:
            from peft import set_peft_model_state_dict
        except ImportError as error:
            raise ImportError("load_lora_weights needs peft: pip install 'echo4o-hf[train]'") from error
        self._check_not_fused()
        name = adapter_name or next(free for n in count() if (free := f"default_{n}") not in self._adapter_names())
        if name in self._adapter_names():
            raise ValueError(f"an adapter {name!r} is loaded already; choose another adapter_name, or delete it first")
        folder = find_adapter(pretrained_model_name_or_path, weight_name, revision, subfolder, **hub_options)
        config = _read_config(folder)
        _check_fits(self.model, config, folder, tensor_shapes(folder / weight_name))
        weights = load_file(folder / weight_name)
        _check_finite(weights, folder / weight_name)

        base_model = config.base_model_name_or_path
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are what we want
            self.model.add_adapter(config, name)
        config.base_model_name_or_path = base_model  # which add_adapter overwrites
        set_peft_model_state_dict(
            self.model, {key.removeprefix(PREFIX): value for key, value in weights.items()}, adapter_name=name
        )
        self.model.eval()  # new layers begin in training mode
        self._renew_group_offload()

    def save_lora_weights(self, save_directory: str | os.PathLike[str], adapter_name: str | None = None) -> None:
        """Writes an adapter as peft does; `load_lora_weights` and `PeftModel.from_pretrained` read it.

        Args:
            save_directory: made if it does not exist.
            adapter_name: by default the active adapter.

        Raises:
            ValueError: there is no such adapter, or none or several are active.
        """
        names = [adapter_name] if adapter_name is not None else self.get_active_adapters()
        if len(names) != 1:
            raise ValueError(f"name the adapter to save: {len(names)} are active, loaded are {self._adapter_names()}")
        self._check_loaded(names)
        from peft import get_peft_model_state_dict

        weights = get_peft_model_state_dict(self.model, adapter_name=names[0], save_embedding_layers=False)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{ADAPTER_WEIGHTS}.{os.getpid()}.tmp"
        save_file(
            {PREFIX + key: value.contiguous().cpu() for key, value in weights.items()}, temporary, {"format": "pt"}
        )
        os.replace(temporary, folder / ADAPTER_WEIGHTS)
        self.model.peft_config[names[0]].save_pretrained(folder)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        **options: Any,
    ) -> None:
        """As upstream's, which would write adapters in place of the model, or weights that are not in memory.

        Args:
            save_directory: made if it does not exist.
            safe_serialization: must be True: weights are read from safetensors files only.
            variant: must be None: files of a variant are not read.
            **options: upstream's, as `max_shard_size`.

        Raises:
            ValueError: adapters are loaded, a part is on disk, or files that `from_pretrained` would not read.
        """
        if not safe_serialization or variant is not None:
            raise ValueError(
                f"safe_serialization={safe_serialization} and variant={variant!r} write files that from_pretrained "
                "does not read: leave them out, and choose another dtype with pipeline.to(dtype)"
            )
        check_in_memory(self.model, self.vae)
        if self._adapter_names():
            raise ValueError(
                f"adapters {self._adapter_names()} are loaded: merge them for good with fuse_lora() and "
                "unload_lora_weights(), or write them with save_lora_weights()"
            )
        super().save_pretrained(save_directory, **options)

    def set_adapters(
        self, adapter_names: Sequence[str] | str, adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Chooses which adapters are active, and how much of each is added.

        Raises:
            ValueError: an adapter is not loaded, numbers of names and weights differ, or adapters are fused.
        """
        self._check_not_fused()
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = list(adapter_weights) if isinstance(adapter_weights, Sequence) else adapter_weights
        self._check_loaded(names)
        super().set_adapters(names, weights)

    def delete_adapters(self, adapter_names: Sequence[str] | str) -> None:
        """Removes adapters; after the last, the model is as before the first.

        Raises:
            ValueError: an adapter is not loaded, or adapters are fused.
        """
        self._check_not_fused()
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_loaded(names)
        super().delete_adapters(names)
        if not self._adapter_names():
            self.unload_lora_weights()
        else:
            self._renew_group_offload()

    def fuse_lora(
        self,
        components: Sequence[str] = ("model",),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Adds adapters to the weights: as fast as without, until `unfuse_lora`; `unload_lora_weights` keeps the sum.

        Args:
            components: diffusers' argument; there is only "model".
            lora_scale: how much of each, beside the weight that it has.
            safe_fusing: stop if a sum is not finite.
            adapter_names: by default the active ones.

        Raises:
            ValueError: an adapter is not loaded or none is, adapters are fused already, a sum is not finite, or the
                weights are on disk.
        """
        self._check_not_fused()
        check_in_memory(self.model)
        names = list(adapter_names) if adapter_names is not None else self.get_active_adapters()
        self._check_loaded(names)
        # diffusers would scale the active adapters instead of the named ones, and leave them scaled.
        self._scaling_before = [(layer, dict(layer.scaling)) for layer in self._lora_layers()]
        for layer, scaling in self._scaling_before:
            layer.scaling.update({name: scaling[name] * lora_scale for name in names if name in scaling})
        super().fuse_lora(list(components), safe_fusing=safe_fusing, adapter_names=names)

    def unfuse_lora(self, components: Sequence[str] = ("model",)) -> None:
        """Subtracts what `fuse_lora` added: the weights come back up to rounding in their dtype.

        Raises:
            ValueError: nothing is fused.
        """
        if not self.fused_loras:
            raise ValueError("no adapter is fused")
        super().unfuse_lora(list(components))
        for layer, scaling in self._scaling_before:
            layer.scaling.update(scaling)

    def unload_lora_weights(self) -> None:
        """Removes all adapters. The weights are bit for bit the base's, or the sum after `fuse_lora`."""
        if is_peft_available():
            super().unload_lora_weights()
            self._renew_group_offload()
        self._merged_adapters: set[str] = set()

    def _renew_group_offload(self) -> None:
        """Group offload of the layers that there are now, as diffusers does it after adapters of its own models.

        What is on disk stays as it is: layers that got another name would be written there anew, without their values.
        """
        hook = _get_top_level_group_offload_hook(self.model)
        if hook is not None and hook.config.offload_to_disk_path is None:
            _maybe_remove_and_reapply_group_offloading(self.model)

    def _adapter_names(self) -> list[str]:
        return list(getattr(self.model, "peft_config", {}))  # which the model has from the first adapter on

    def _lora_layers(self) -> list[Any]:
        from peft.tuners.lora import LoraLayer

        return [module for module in self.model.modules() if isinstance(module, LoraLayer)]

    def _check_loaded(self, names: Sequence[str]) -> None:
        missing = [name for name in names if name not in self._adapter_names()]
        if missing or not names:
            raise ValueError(
                f"no adapter {', '.join(map(repr, missing)) or 'given'}; loaded are {self._adapter_names() or 'none'}"
            )

    def _check_not_fused(self) -> None:
        if self.fused_loras:
            raise ValueError(
                f"adapters {sorted(self.fused_loras)} are fused; call unfuse_lora() first, "
                "or unload_lora_weights() to keep their sum"
            )


def _read_config(folder: Path) -> LoraConfig:
    from peft import LoraConfig, PeftConfig

    settings = read_json(folder / ADAPTER_CONFIG)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{folder / ADAPTER_CONFIG}: peft_type={settings.get('peft_type')!r}; only 'LORA' is known")
    if settings.get("modules_to_save"):
        raise ValueError(
            f"{folder / ADAPTER_CONFIG}: modules_to_save={settings['modules_to_save']} replaces whole layers; load it "
            "with peft.PeftModel and merge it"
        )
    config = PeftConfig.from_pretrained(folder)
    assert isinstance(config, LoraConfig)
    return config


def _check_fits(model: BagelForConditionalGeneration, config: LoraConfig, folder: Path, shapes: Shapes) -> None:
    """Complains about an adapter for another model; peft itself says what it needs, on a model without weights."""
    from peft import get_peft_model, get_peft_model_state_dict

    source = f"the adapter in {folder} (its base: {config.base_model_name_or_path}) does not fit this model"
    wanted = deepcopy(config)
    wanted.base_model_name_or_path = None  # peft would warn that this model has another
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # which peft asks for
        skeleton = BagelForConditionalGeneration(deepcopy(model.config))
        try:
            adapted = get_peft_model(skeleton, wanted)
        except ValueError as error:  # no layer of these names
            raise ValueError(f"{source}: {error}") from error
    needed = {
        name: tuple(tensor.shape)
        for name, tensor in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()
    }
    wrong = {
        "missing": sorted(needed.keys() - shapes.keys()),
        "unknown": sorted(shapes.keys() - needed.keys()),
        "of another shape": [
            f"{name} {shapes[name]} instead of {needed[name]}"
            for name in sorted(needed.keys() & shapes.keys())
            if needed[name] != shapes[name]
        ],
    }
    parts = [f"{len(names)} tensors {what} ({shortened(names, 2)})" for what, names in wrong.items() if names]
    if parts:
        raise ValueError(f"{source}: {'; '.join(parts)}")


def _check_finite(weights: dict[str, Tensor], file: Path) -> None:
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{file} holds NaN or infinite values in {len(broken)} of {len(weights)} tensors")
