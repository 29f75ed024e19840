"""The VAE's latents of pictures, encoded once and kept.

What is kept is the posterior, so that training can draw another sample of it each time.

Letters: z channels and h x w values of the VAE's latents; N latent tokens of D values.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.utils import logging

from ..model.packing import patchify
from ..pipeline.records import replaced
from .packs import OnError, is_left_out
from .samples import OversizeError, SampleError

if TYPE_CHECKING:
    from .samples import Picture, SampleBuilder

logger = logging.get_logger(__name__)


def vae_id(vae: AutoencoderKL) -> str:
    """A hash of all that decides what the VAE makes of a picture: weights, dtype, config, tiling."""
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}  # "_": where it came from
    digest = hashlib.sha256(json.dumps([config, vae.use_tiling], sort_keys=True).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


class LatentStore:
    """Moments of pictures on disk, each in a file of its own: `<folder>/<vae_id>/<ab>/<key>.safetensors`.

    A picture of 1024x1024 pixels takes 2 MiB in float32. Files appear whole, so any number of processes may read and
    write at once, also the same key.

    Args:
        folder: of all VAEs; made with the first entry.
        vae_id: see `vae_id`; VAEs never share entries.
    """

    def __init__(self, folder: str | os.PathLike[str], vae_id: str) -> None:
        """See the class."""
        self.folder = Path(folder) / vae_id

    def get(self, key: str) -> Tensor | None:
        """Moments (2z, h, w) as the VAE gave them; None if there is no entry, or a damaged one, which is reported."""
        path = self._path(key)
        try:
            # Read at once: safe_open opens twice, and another process may replace the file in between.
            entry = load(path.read_bytes())
            if not torch.equal(entry["crc32"], _checksum(entry["moments"])):
                raise SafetensorError("its checksum is wrong")
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError) as error:
            logger.warning(f"{path} is damaged ({error}); its picture is encoded again")
            return None
        return entry["moments"]

    def put(self, key: str, moments: Tensor) -> None:
        """Write an entry, in place of a damaged or an earlier one.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        moments = moments.detach().cpu().contiguous()
        content = save({"moments": moments, "crc32": _checksum(moments)})
        with replaced(path) as partial:
            partial.write_bytes(content)

    def lock(self, key: str) -> FileLock:
        """Held while an entry is made, so that no two processes encode the same picture; a few keys share a lock."""
        path = self._path(key).parent
        path.mkdir(parents=True, exist_ok=True)
        return FileLock(path / ".lock")

    def _path(self, key: str) -> Path:
        if not re.fullmatch(r"[0-9a-z][0-9a-z._-]{2,200}", key):
            raise ValueError(f"the key {key!r} is no file name of digits, lower-case letters, '.', '_' and '-'")
        return self.folder / key[:2] / f"{key}.safetensors"


class LatentEncoder:
    """Pictures -> latent tokens, through a store where there is one.

    Each picture is encoded alone: beside others its last bits differ, and then the same data in other packs would
    train another model. (Official training pads the pictures of a pack to the largest, which changes latents visibly.)

    Args:
        vae: on the device and in the dtype to encode with.
        latent_patch_size: side of a token in latents.
        store: filled with what is encoded.

    Raises:
        ValueError: the store belongs to another VAE.
    """

    def __init__(self, vae: AutoencoderKL, latent_patch_size: int, store: LatentStore | None = None) -> None:
        """See the class."""
        if store is not None and store.folder.name != (expected := vae_id(vae)):
            raise ValueError(f"the store {store.folder} is not of this VAE, whose id is {expected}")
        self.vae = vae
        self.latent_patch_size = latent_patch_size
        self.store = store

    @torch.no_grad()
    def moments(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Mean and log variance of the posterior (2z, h, w) of each picture, on the CPU.

        Args:
            pixels: (3, height, width) in [-1, 1], of any sizes.

        Raises:
            ValueError: the VAE's numbers are not finite.
        """
        moments = []
        for picture in pixels:
            # The trainer may call this under its autocast; the result must be that of the cache.
            with torch.autocast(self.vae.device.type, enabled=False):
                posterior = self.vae.encode(picture[None].to(self.vae.device, self.vae.dtype)).latent_dist
            moments.append(posterior.parameters[0].cpu().contiguous())
            if not moments[-1].isfinite().all():
                raise ValueError(
                    f"the VAE makes NaN or infinite latents of a picture of {tuple(picture.shape)} in "
                    f"{self.vae.dtype}; load it in float32 or bfloat16"
                )
        return moments

    def encode(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """Latent tokens (N, D) of each picture, drawn with its own `eps`, float32 on the CPU."""
        moments: dict[str, Tensor] = {}  # the same picture may be in a batch twice
        for picture in pictures:
            if picture.key not in moments:
                moments[picture.key] = self._moments_of(picture)
        return [
            latents_from_moments(moments[picture.key], picture.eps, self.vae.config, self.latent_patch_size)
            for picture in pictures
        ]

    def fill(self, batch: dict[str, Any]) -> None:
        """Write the latents of `batch["pictures"]` into `batch["latents"]` (1, G, D), each at its `start`."""
        pictures: list[Picture] = batch["pictures"]
        for picture, tokens in zip(pictures, self.encode(pictures), strict=True):
            batch["latents"][0, picture.start : picture.start + len(tokens)] = tokens

    def _moments_of(self, picture: Picture) -> Tensor:
        if picture.moments is not None:
            return picture.moments
        if picture.pixels is None:
            raise ValueError(f"the picture {picture.key} has neither pixels nor moments")
        (moments,) = self.moments([picture.pixels])
        if self.store is not None:
            self.store.put(picture.key, moments)
        return moments


def latents_from_moments(
    moments: Tensor, eps: Tensor | None, vae_config: Mapping[str, Any], patch_size: int
) -> Tensor:
    """Latent tokens (N, D) in float32: a sample of the posterior, scaled and shifted as the model expects.

    Computed where `moments` are: the CPU, with and without a store, so that both give the same bits.

    Args:
        moments: (2z, h, w), as the VAE gave them.
        eps: standard normal noise (z, h, w); None takes the mean.
        vae_config: the config of the `AutoencoderKL`: its `scaling_factor` and `shift_factor`.
        patch_size: side of a token in latents.
    """
    posterior = DiagonalGaussianDistribution(moments.float()[None])
    latents = posterior.mean[0] if eps is None else posterior.mean[0] + posterior.std[0] * eps  # (z, h, w)
    return patchify((latents - (vae_config["shift_factor"] or 0.0)) * vae_config["scaling_factor"], patch_size)


def precompute(
    rows: Dataset | IterableDataset,
    builder: SampleBuilder,
    encoder: LatentEncoder,
    *,
    on_error: OnError = "raise",
    num_workers: int = 0,
) -> list[tuple[str, str]]:
    """Fill the encoder's store with every picture that training on `rows` will ask for, each encoded once.

    The processes of an `accelerate launch` share the rows; the store's folder must be one that all of them see. What
    is in the store already is not encoded again, so that a run that was stopped goes on where it was.

    Args:
        rows: with the columns of `load_rows`.
        builder: of the training, with the store; it decides the sizes of the pictures.
        encoder: with the store.
        on_error: "raise" what is wrong with a row, or "skip" it; for rows that are too long, the builder decides.
        num_workers: processes that decode pictures, for each process that encodes.

    Returns:
        (id, reason) of the rows left out by any process.

    Raises:
        SampleError: a row that cannot be used, with `on_error="raise"`.
        OSError: the store cannot be written.
    """
    store = encoder.store
    if store is None or builder.store is None:
        raise ValueError("give the builder and the encoder the LatentStore to fill")
    state = PartialState()
    share = split_dataset_by_node(rows, state.process_index, state.num_processes)
    total = len(share) if isinstance(share, Dataset) else None
    if total is not None:
        share = share.to_iterable_dataset(num_shards=max(1, min(num_workers, total)))
    loader = DataLoader(_Missing(share, builder, on_error), batch_size=None, num_workers=num_workers, collate_fn=tuple)
    encoded = 0
    left_out: list[tuple[str, str]] = []
    with tqdm(loader, "Encoding pictures", total, unit="row", disable=not state.is_main_process) as bar:
        for pictures, failed in bar:
            for picture in pictures:
                with store.lock(picture.key):
                    if store.get(picture.key) is None:
                        encoder.encode([picture])
                        encoded += 1
            if failed is not None:
                left_out.append(failed)
            bar.set_postfix(encoded=encoded, left_out=len(left_out), refresh=False)
    return gather_object(left_out)


class _Missing(torch.utils.data.IterableDataset[tuple[list["Picture"], tuple[str, str] | None]]):
    """Of each row the pictures that the store lacks, or its id and why it is left out; workers share the rows."""

    def __init__(self, rows: IterableDataset, builder: SampleBuilder, on_error: OnError) -> None:
        self.rows, self.builder, self.on_error = rows, builder, on_error

    def __iter__(self) -> Iterator[tuple[list[Picture], tuple[str, str] | None]]:
        for row in self.rows:
            try:
                yield [picture for picture in self.builder.pictures(row) if picture.moments is None], None
            except SampleError as error:
                if not is_left_out(isinstance(error, OversizeError), self.builder, self.on_error):
                    raise
                yield [], (error.id, error.reason)


def _checksum(moments: Tensor) -> Tensor:
    return torch.tensor(zlib.crc32(moments.flatten().view(torch.uint8).numpy().tobytes()))
