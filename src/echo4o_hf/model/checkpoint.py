"""Where a checkpoint is, in which layout, and what is loaded from it.

A checkpoint is a folder, a folder inside one (`Echo-4o/`), a bundled name or a Hub name, in one of three layouts:

    "official"  ema.safetensors, ae.safetensors, llm_config.json, ... as ByteDance-Seed and Yejy53 publish
    "pipeline"  model_index.json with model/, vae/, scheduler/, processor/: what `Echo4oPipeline` saves
    "model"     config.json with model.safetensors: what `BagelForConditionalGeneration` saves
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import get_cached_repo_tree, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from .files import (
    WEIGHTS_FILES,
    check_finite,
    check_loading_info,
    listing,
    read_json,
    shortened,
    weights_file,
    weights_shapes,
)
from .official import TOKENIZER_FILES, load_tokenizer, official_config_dict, vae_config, write_official

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

    from .configuration_bagel import BagelConfig
    from .modeling_bagel import BagelForConditionalGeneration
    from .processing_bagel import BagelProcessor

__all__ = [
    "check_finite",
    "check_loading_info",
    "find_adapter",
    "find_files",
    "is_official_layout",
    "layout",
    "layout_of",
    "load_autoencoder",
    "load_components",
    "load_processor",
    "load_scheduler",
    "official_config_dict",
    "resolve",
    "write_official",
]

BUNDLED = Path(__file__).parents[1] / "miniature" / "checkpoints"
BUNDLED_NAMES = ("bagel-miniature", "echo4o-miniature")
SHARED = BUNDLED / "shared"  # what the bundled checkpoints have in common

# What `from_pretrained` methods take to find a checkpoint: arguments of `resolve`.
HUB_OPTIONS = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download")
# What transformers passes on beside these while it looks for a configuration.
LOOKUP_OPTIONS = ("proxies", "trust_remote_code", "gguf_file", "_from_auto", "_from_pipeline", "_commit_hash")

PIPELINE_FILE = "model_index.json"
LOOKUP_FILES = ["*config.json", PIPELINE_FILE]  # some of them are in every checkpoint
COMPONENTS = ("model", "vae", "scheduler", "processor")
OFFICIAL_FILES = ("ema.safetensors", "ae.safetensors", "llm_config.json", "vit_config.json")
SAVED_VAE_FILE = "diffusion_pytorch_model.safetensors"  # diffusers' name
OFFICIAL_SHIFT = 3.0  # of the sampling schedule
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
CONFIG_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")


def resolve(
    path: str | os.PathLike[str],
    revision: str | None = None,
    subfolder: str | None = None,
    component: str | None = None,
    **hub_options: Any,
) -> Path:
    """The local folder of a checkpoint; from the Hub, only the files needed are downloaded (or found in the cache).

    Args:
        path: a folder, a bundled name (a folder of that name in the working directory wins) or a Hub name.
        revision: branch, tag or commit on the Hub.
        subfolder: where inside; found by itself if exactly one folder holds a checkpoint.
        component: if the checkpoint is a saved pipeline, the folder of this part ("model", "vae", ...).
        **hub_options: `cache_dir`, `token`, `local_files_only`, `force_download` of `snapshot_download`.

    Raises:
        OSError: nothing there, no checkpoint in it, weights missing or damaged, or no network.
        ValueError: several checkpoints to choose from.
    """
    root, names = _names(path, revision, subfolder, hub_options)
    place = _place(names, subfolder, path)
    if place is None:
        raise FileNotFoundError(
            f"no checkpoint in {path}{f', subfolder {subfolder!r}' if subfolder else ''}: looked for {PIPELINE_FILE} "
            f"(a saved pipeline), {', '.join(OFFICIAL_FILES)} (the official layout), or config.json with "
            f"model.safetensors, there or in one folder inside; found {shortened(sorted(names), 12) or 'nothing'}"
        )
    if _local_folder(path) is None:
        _complete(str(path), root, place, _wanted_files(_inside(names, place), component), hub_options)
    folder = root / place if component is None else component_folder(root / place, component)
    if layout(folder) in ("official", "model"):
        weights_shapes(weights_file(folder))  # complains about files that are missing or damaged
    return folder


def find_files(
    path: str | os.PathLike[str],
    component: str,
    revision: str | None = None,
    subfolder: str | None = None,
    **hub_options: Any,
) -> Path | None:
    """The local folder with the JSON files of "model" or "processor"; from the Hub, without the weights.

    None if `path` is neither a saved pipeline nor in the official layout: transformers finds the files itself.

    Raises:
        OSError: `path` is neither here nor on the Hub, or there is no network.
        ValueError: several checkpoints to choose from.
    """
    if os.path.isfile(path):  # a JSON file, which transformers takes as a configuration
        return None
    root, names = _names(path, revision, subfolder, hub_options)
    place = _place(names, subfolder, path)
    if place is None or layout_of(_inside(names, place)) not in ("official", "pipeline"):
        return None
    if _local_folder(path) is None:
        wanted = _wanted_files(_inside(names, place), component)
        _complete(str(path), root, place, [name for name in wanted if not name.endswith(".safetensors")], hub_options)
    return component_folder(root / place, component)


def find_adapter(
    path: str | os.PathLike[str],
    weight_name: str = ADAPTER_WEIGHTS,
    revision: str | None = None,
    subfolder: str | None = None,
    **hub_options: Any,
) -> Path:
    """The local folder of an adapter as peft saves it; from the Hub, only its two files are downloaded.

    Raises:
        OSError: `path` is neither here nor on the Hub, holds no adapter, or there is no network.
    """
    root, names = _names(path, revision, subfolder, hub_options)
    place = f"{subfolder.strip('/')}/" if subfolder else ""
    inside = _inside(names, place)
    if not {ADAPTER_CONFIG, weight_name} <= inside:
        raise FileNotFoundError(
            f"no adapter in {path}{f', subfolder {subfolder!r}' if subfolder else ''}: looked for {ADAPTER_CONFIG} "
            f"and {weight_name}; found {shortened(sorted(inside), 12) or 'nothing'}"
        )
    if _local_folder(path) is None:
        _complete(str(path), root, place, [ADAPTER_CONFIG, weight_name], hub_options)
    return root / place


def is_official_layout(
    path: str | os.PathLike[str], subfolder: str | None = None, revision: str | None = None, **hub_options: Any
) -> bool:
    """Whether `path` (as in `resolve`) is a checkpoint in the official layout."""
    folder = find_files(path, "model", revision, subfolder, **hub_options)
    return folder is not None and layout(folder) == "official"


def layout(folder: Path) -> str | None:
    """The layout of a folder: official, pipeline or model; None for another folder."""
    return layout_of({entry.name for entry in folder.iterdir()})


def layout_of(names: Collection[str]) -> str | None:
    """The layout of a folder that holds these names."""
    if PIPELINE_FILE in names:
        return "pipeline"
    if any(name in names for name in OFFICIAL_FILES):
        return "official"
    if "config.json" in names and any(name in names for name in WEIGHTS_FILES):
        return "model"
    return None


def component_folder(folder: Path, component: str) -> Path:
    """The folder of one part of a saved pipeline; the other layouts keep all in one folder.

    Raises:
        FileNotFoundError: the part is missing.
    """
    if layout(folder) != "pipeline":
        return folder
    candidates = [folder / component, *([SHARED / component] if folder.parent == BUNDLED else [])]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"the pipeline in {folder} has no {component}/; it holds {listing(folder)}")


# ------------------------------------------------------------------------------------------------ loading the parts


def load_components(
    path: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    device_map: Any = None,
    max_memory: dict[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    quantization_config: Any = None,
    attn_implementation: str | None = None,
    given: Mapping[str, Any] | None = None,
    **hub_options: Any,
) -> dict[str, Any]:
    """`model`, `vae`, `scheduler` and `processor` of a checkpoint that has them all, in either layout.

    Args:
        path: as in `resolve`.
        dtype: of model and VAE; None keeps those of the files.
        revision: as in `resolve`.
        subfolder: as in `resolve`.
        device_map: for the model, as in transformers; the VAE goes to the first that computes.
        max_memory: of each device, for `device_map`, as in transformers.
        offload_folder: for what `device_map` puts on "disk".
        quantization_config: for the model, transformers' or diffusers' `PipelineQuantizationConfig`.
        attn_implementation: of the model, as in transformers.
        given: some of the four, which are taken instead of the checkpoint's.
        **hub_options: as in `resolve`.

    Raises:
        OSError: files are missing or damaged, or there is no network.
        ValueError: configuration and tensors do not fit, or weights are not finite.
        ImportError: a package for the attention or the quantization is missing.
    """
    from diffusers.quantizers import PipelineQuantizationConfig

    from .modeling_bagel import BagelForConditionalGeneration

    folder = resolve(path, revision, subfolder, **hub_options)
    if isinstance(quantization_config, PipelineQuantizationConfig):
        quantization_config = quantization_config._resolve_quant_config(is_diffusers=False, module_name="model")
    parts = dict(given or {})
    if "model" not in parts:
        parts["model"] = BagelForConditionalGeneration.from_pretrained(
            component_folder(folder, "model"),
            dtype=dtype,
            device_map=device_map,
            max_memory=max_memory,
            offload_folder=offload_folder,
            quantization_config=quantization_config,
            attn_implementation=attn_implementation,
        )
    if "vae" not in parts:
        parts["vae"] = load_autoencoder(folder, dtype)
        if device_map is not None:
            parts["vae"].to(_main_device(parts["model"]))
    if "scheduler" not in parts:
        parts["scheduler"] = load_scheduler(folder)
    if "processor" not in parts:
        parts["processor"] = load_processor(folder, parts["model"].config)
    return parts


def _main_device(model: BagelForConditionalGeneration) -> torch.device | str:
    """The first device that holds weights and computes: what waits on the CPU or disk (meta) is brought there."""
    devices = (weight.device for weight in model.parameters())
    return next((device for device in devices if device.type not in ("cpu", "meta")), "cpu")


def load_processor(folder: Path, config: BagelConfig) -> BagelProcessor:
    """The processor of a checkpoint; in the official layout, the model's tables of positions limit the image sizes."""
    from .image_processing_bagel import BagelImageProcessor
    from .processing_bagel import BagelProcessor

    if layout(folder) == "pipeline":
        return BagelProcessor.from_pretrained(component_folder(folder, "processor"))
    return BagelProcessor(BagelImageProcessor.from_bagel_config(config), load_tokenizer(folder))


def load_scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a saved pipeline; in the other layouts, with the official shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    if layout(folder) == "pipeline":
        return FlowMatchEulerDiscreteScheduler.from_pretrained(component_folder(folder, "scheduler"))
    return FlowMatchEulerDiscreteScheduler(shift=OFFICIAL_SHIFT)


def load_autoencoder(folder: Path, dtype: torch.dtype | str | None = None) -> AutoencoderKL:
    """The VAE of a checkpoint; without `dtype`, in that of its file.

    Raises:
        OSError: its file is missing or damaged.
        ValueError: configuration and tensors do not fit, or weights are not finite.
    """
    vae = _load_vae(folder, dtype)
    check_finite(vae, component_folder(folder, "vae"))
    return vae


def _load_vae(folder: Path, dtype: torch.dtype | str | None) -> AutoencoderKL:
    import torch
    from diffusers import AutoencoderKL

    from .vae import load_vae

    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else getattr(torch, dtype)
    if layout(folder) != "pipeline":
        return load_vae(folder, vae_config(folder), dtype)
    folder = component_folder(folder, "vae")
    vae, info = AutoencoderKL.from_pretrained(
        folder, torch_dtype=dtype or _saved_dtype(folder), output_loading_info=True, ignore_mismatched_sizes=True
    )
    check_loading_info(info, folder)
    return vae


def _saved_dtype(folder: Path) -> torch.dtype:
    """The dtype of a VAE that diffusers saved, in one file or in shards, all of which are there and whole."""
    from safetensors import safe_open

    file, name = folder / SAVED_VAE_FILE, "decoder.conv_in.weight"
    index = file.with_name(f"{file.name}.index.json")
    if name not in weights_shapes(index if index.is_file() else file):
        raise ValueError(f"{file} has no tensor {name!r}: it is no AutoencoderKL")
    if index.is_file():
        file = folder / read_json(index)["weight_map"][name]
    with safe_open(file, framework="pt") as tensors:
        dtype: torch.dtype = tensors.get_tensor(name).dtype
    return dtype


# ------------------------------------------------------------------------------------------------ folders and the Hub


def _local_folder(path: str | os.PathLike[str]) -> Path | None:
    """A folder, or the bundled one of that name; None for a name on the Hub.

    Raises:
        FileNotFoundError: a bundled name whose files are not installed.
    """
    if os.path.isdir(path):
        return Path(path)
    if str(path) not in BUNDLED_NAMES:
        return None
    if not (BUNDLED / path).is_dir():
        raise FileNotFoundError(f"{path} is not part of this installation ({BUNDLED} holds {listing(BUNDLED)})")
    return BUNDLED / path


def _names(
    path: str | os.PathLike[str], revision: str | None, subfolder: str | None, hub_options: dict[str, Any]
) -> tuple[Path, set[str]]:
    """The root folder of a checkpoint and the files in it, as far as they matter, relative to it."""
    root = _local_folder(path)
    if root is None:
        return _repository(str(path), revision, hub_options)
    places = [root / subfolder] if subfolder else [root, *(entry for entry in root.iterdir() if entry.is_dir())]
    return root, {file.relative_to(root).as_posix() for place in places if place.is_dir() for file in place.iterdir()}


def _place(names: set[str], subfolder: str | None, path: object) -> str | None:
    """Where among the files the checkpoint is: "" or a folder with a slash at its end; None if nowhere."""
    if subfolder:
        places = [subfolder.strip("/") + "/"]
    else:
        places = ["", *sorted({name.split("/")[0] + "/" for name in names if "/" in name})]
    found = [place for place in places if layout_of(_inside(names, place))]
    if found[:1] == [""]:
        return ""
    if len(found) > 1:
        raise ValueError(f"{path} holds several checkpoints: {', '.join(found)}; choose one with subfolder=")
    return found[0] if found else None


def _inside(names: set[str], place: str) -> set[str]:
    return {name.removeprefix(place) for name in names if name.startswith(place)}


def _wanted_files(names: set[str], component: str | None = None) -> list[str]:
    """The files of a checkpoint that are worth downloading."""
    if PIPELINE_FILE in names:
        parts = COMPONENTS if component is None else (component,)
        return sorted(name for name in names if name == PIPELINE_FILE or name.split("/")[0] in parts)
    weights = next((name for name in WEIGHTS_FILES if name in names), "")
    stem = weights.removesuffix(".safetensors.index.json")
    shards = {
        name for name in names if weights != stem and name.startswith(f"{stem}-") and name.endswith(".safetensors")
    }
    return sorted(names & {weights, *OFFICIAL_FILES[1:], *CONFIG_FILES, *TOKENIZER_FILES} | shards)


def _repository(name: str, revision: str | None, hub_options: dict[str, Any]) -> tuple[Path, set[str]]:
    """The snapshot folder of a Hub repository (named after the commit) and the names of all its files."""
    folder = _download(name, revision, LOOKUP_FILES, hub_options)
    try:
        tree = get_cached_repo_tree(name, revision=folder.name, cache_dir=hub_options.get("cache_dir"))
    except CachedRepoTreeNotFoundError:  # cached by an older huggingface_hub, and the Hub is out of reach
        return folder, {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    return folder, {entry.path for entry in tree}


def _complete(name: str, root: Path, place: str, wanted: list[str], hub_options: dict[str, Any]) -> None:
    """Download those of the wanted files that the snapshot folder lacks."""
    files = [
        place + file for file in wanted if hub_options.get("force_download") or not (root / place / file).exists()
    ]
    if files:
        _download(name, root.name, files, hub_options)


def _download(name: str, revision: str | None, patterns: list[str], hub_options: dict[str, Any]) -> Path:
    """`snapshot_download` with errors that say how to go on."""
    where = f"{name!r}" + (f" (revision {revision!r})" if revision else "")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **hub_options))
    except HFValidationError as error:
        raise FileNotFoundError(f"{name!r} is neither a folder nor a name on the Hub ({error})") from error
    except LocalEntryNotFoundError as error:
        lack = "has nothing" if patterns == LOOKUP_FILES else f"lacks {shortened(patterns, 3)}"
        why = "HF_HUB_OFFLINE is set" if is_offline_mode() else f"the Hub cannot be asked ({error.__cause__ or error})"
        raise OSError(
            f"{where} is no folder in {Path.cwd()}, the Hub's cache {lack} of it, and {why}: "
            "give the path of a folder, or download it with network"
        ) from error
    except HfHubHTTPError as error:
        raise OSError(
            f"{where} is no folder in {Path.cwd()} and cannot be had from the Hub: {error}. Check the name and the "
            "revision; private and gated repositories need `hf auth login`"
        ) from error
