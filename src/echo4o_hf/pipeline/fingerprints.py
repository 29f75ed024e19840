"""What tells weights from others that have the same name, as after a training that went on."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..model.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, find_adapter

PIECES, PIECE = 64, 2**16  # of each file of a model; all of its 29 GB would take a minute


def adapter_sha256(adapter: str) -> str:
    """SHA-256 of an adapter's two files in a row: `cat adapter_config.json adapter_model.safetensors | sha256sum`.

    Raises:
        OSError: there is no such adapter.
    """
    folder = find_adapter(adapter)
    digest = hashlib.sha256()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        with (folder / name).open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def model_fingerprint(model: str) -> str | None:
    """SHA-256 of the names and sizes of the weights in a folder, and of pieces all over each file.

    None for names that are no folder, and for folders without weights. Training moves nearly all numbers of what it
    trains, so that pieces show it; a change of a few numbers is not seen.
    """
    folder = Path(model)
    if not folder.is_dir():
        return None
    found = [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]
    weights = sorted(path for path in found if not path.parent.name.startswith("checkpoint-"))  # of a training
    digest = hashlib.sha256()
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            for piece in range(PIECES):
                file.seek(size * piece // PIECES)
                digest.update(file.read(PIECE))
    return digest.hexdigest() if weights else None
