"""Files of a checkpoint: safetensors headers, JSON, and errors that name what is wrong with them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Shapes: TypeAlias = dict[str, tuple[int, ...]]

# In order of preference: the official loaders take the averaged weights.
WEIGHTS_FILES = (
    "ema.safetensors",
    "model.safetensors",
    "ema.safetensors.index.json",
    "model.safetensors.index.json",
)
NAMES_SHOWN = 5


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        OSError: the file is missing or unreadable.
        ValueError: it holds no JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a JSON {type(value).__name__}, expected an object")
    return value


def listing(folder: Path) -> str:
    """Names in a folder, for error messages."""
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir()) if folder.is_dir() else []
    return shortened(names, 12) or "nothing"


def weights_file(folder: Path) -> Path:
    """The file (or index of shards) that holds the model's tensors.

    Raises:
        FileNotFoundError: none of the known names is there.
    """
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no weights in {folder}: looked for {', '.join(WEIGHTS_FILES)}; found {listing(folder)}")


def weights_shapes(file: Path) -> Shapes:
    """Names and shapes behind a weights file: its own, or those of the shards that an index names.

    Raises:
        OSError: a file is missing, truncated or no safetensors file.
        ValueError: an index without shards.
    """
    if file.suffix != ".json":
        return tensor_shapes(file)
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{file} has no 'weight_map' and so names no shards")
    shapes: Shapes = {}
    for name in sorted(set(weight_map.values())):
        shapes |= tensor_shapes(file.parent / name)
    return shapes


def tensor_shapes(file: Path) -> Shapes:
    """Names and shapes from the header of a safetensors file; no tensor is read.

    Raises:
        OSError: the file is missing, truncated or no safetensors file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; {file.parent} holds {listing(file.parent)}")
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    except SafetensorError as error:
        raise OSError(
            f"{file} ({file.stat().st_size:,} bytes) is truncated or no safetensors file ({error}); "
            "copy or download it again (a file of about 130 bytes is a Git LFS pointer: run `git lfs pull`)"
        ) from error


def check_tensors(
    source: object,
    missing: Collection[str],
    unexpected: Collection[str],
    misshapen: Collection[tuple[str, tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Complain about tensors that do not fit the model.

    Args:
        source: the file or folder, for the message.
        missing: names that the model has and the file lacks.
        unexpected: names that the file has and the model lacks.
        misshapen: (name, shape in the file, shape in the model).

    Raises:
        ValueError: with counts and the first few names.
    """
    shapes = [f"{name} {tuple(in_file)} instead of {tuple(in_model)}" for name, in_file, in_model in misshapen]
    wrong = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    parts = [
        f"{len(names)} {what} ({shortened(sorted(names), NAMES_SHOWN)})" for what, names in wrong.items() if names
    ]
    if parts:
        raise ValueError(
            f"the tensors of {source} do not fit the model that its configuration describes: {'; '.join(parts)}"
        )


def check_finite(module: nn.Module, source: object) -> None:
    """Complain about NaN or infinity in the weights: they would come out as a black picture.

    Every tensor is read once, at the speed of memory; tensors that are offloaded (meta) or quantized are skipped.

    Raises:
        ValueError: with the names of the tensors.
    """
    tensors = {
        name: tensor
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if tensor.is_floating_point()
        and tensor.itemsize > 1
        and not tensor.is_meta
        and not is_traceable_wrapper_subclass(tensor)  # as torchao's
    }
    # A sum is cheaper than `isfinite` and catches every NaN; it may overflow by itself, hence the second look.
    suspects = [name for name, tensor in tensors.items() if not tensor.sum().isfinite()]
    broken = [name for name in suspects if not tensors[name].isfinite().all()]
    if broken:
        raise ValueError(
            f"{source} holds NaN or infinite values in {len(broken)} of {len(tensors)} tensors "
            f"({shortened(sorted(broken), NAMES_SHOWN)}); download it again, "
            "or go back to a checkpoint from before training diverged"
        )


def check_in_memory(*parts: nn.Module) -> None:
    """Complain about diffusers' group offload to disk, which leaves tensors of any content in memory between calls.

    Raises:
        ValueError: with the folder on disk.
    """
    from diffusers.hooks.group_offloading import _get_top_level_group_offload_hook

    for part in parts:
        hook = _get_top_level_group_offload_hook(part)
        if hook is not None and hook.config.offload_to_disk_path is not None:
            raise ValueError(
                f"the weights of {type(part).__name__} are on disk, in {hook.config.offload_to_disk_path}: load "
                "the pipeline again, without offload_to_disk_path"
            )


def check_loading_info(info: dict[str, Any], source: object) -> None:
    """Complain about what transformers' `from_pretrained(..., output_loading_info=True)` only logs.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape; they are named.
    """
    check_tensors(source, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to it when the block ends and removed if it fails.

    Raises:
        ValueError: `path` is a file or a folder that is not empty.
    """
    path = Path(path).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists already and is not an empty folder; remove it or choose another name")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def shortened(names: list[str], count: int) -> str:
    """The first `count` names, and how many more there are."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
