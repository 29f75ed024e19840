"""Checkpoints that are whole or not there, and the newest of them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The underscore keeps what is unfinished out of uploads to the Hub (`Trainer._push_from_checkpoint` ignores `_*`).
_UNFINISHED = "_{name}.partial"


@dataclass(frozen=True)
class Run:
    """What decides which data the steps of a run stand for.

    Attributes:
        processes: that train together.
        accumulation: packs of each process in a step.
        seed: of the orders.
        packs: of an epoch; None for a stream.
        workers: that read for a process of a stream; None without a stream.
    """

    processes: int
    accumulation: int
    seed: int
    packs: int | None
    workers: int | None


def check_run(checkpoint: Path, then: Run, now: Run, must_go_on: bool) -> None:
    """Say what holds when a run goes on from a checkpoint that another one wrote.

    Args:
        checkpoint: for the message.
        then: the run that wrote it.
        now: the run that goes on.
        must_go_on: the data must go on too, not only the training.

    Raises:
        ValueError: the data cannot go on where they stopped.
    """
    if then == now:
        return
    about = f"{checkpoint} was written by {_described(then)}; this is {_described(now)}"
    if not must_go_on:
        logger.warning(f"{about}. Training goes on, the data start anew.")
        return
    way_out = "or begin the data anew with ignore_data_skip=true"
    if (then.packs is None) != (now.packs is None):
        raise ValueError(f"{about}. Set streaming as it was, {way_out}.")
    if now.packs is None and (then.processes, then.workers) != (now.processes, now.workers):
        raise ValueError(
            f"{about}: the position in a stream is that of its processes and workers. Keep both, {way_out}."
        )
    product = then.processes * then.accumulation
    if now.packs is not None and product != now.processes * now.accumulation:
        raise ValueError(
            f"{about}: its steps stand for other data. Keep processes * gradient_accumulation_steps at {product}, "
            f"{way_out}."
        )
    if (then.packs, then.seed) != (now.packs, now.seed):
        logger.warning(f"{about}. The data are others: rows that were seen may come again in this epoch.")
    else:
        logger.warning(
            f"{about}. No row is left out or repeated, but the weights will not be the same to the last bit."
        )


def _described(run: Run) -> str:
    data = f"{run.packs} packs" if run.workers is None else f"a stream with {run.workers} workers"
    return f"{run.processes} processes x {run.accumulation} accumulation steps of {data}, seed {run.seed}"


def newest_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The checkpoint of the most steps in a folder; None if there is none.

    Folders without the trainer's state, such as a copy that was broken off, do not count.
    """
    steps = {}
    for state in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}"):
        if match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", state.parent.name):
            steps[int(match[1])] = state.parent
    return steps[max(steps)] if steps else None


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str:
    """A sentence that says where to go on from."""
    newest = newest_checkpoint(output_dir)
    return "No checkpoint was written." if newest is None else f"The last good checkpoint is {newest}."


def remove_unfinished(output_dir: str | os.PathLike[str]) -> None:
    """Remove what a process that was killed while it saved has left."""
    for folder in Path(output_dir).glob(_UNFINISHED.format(name="*")):
        shutil.rmtree(folder)


def keep_newest(output_dir: str | os.PathLike[str], limit: int | None) -> None:
    """Remove the oldest checkpoints beyond `limit`; upstream's rotation, killed halfway, would leave half of one."""
    if limit is not None and limit > 0:
        for folder in sort_checkpoints(os.fspath(output_dir), use_mtime=True)[:-limit]:
            _remove(Path(folder))


@contextmanager
def whole_folder(folder: Path, barrier: Callable[[], None], may_move: bool) -> Iterator[Path]:
    """A place to write a checkpoint in, under its own name; it appears as `folder` once it is on the disk.

    Args:
        folder: of the checkpoint; if there is one, it is replaced.
        barrier: waits for all processes, each of which may write.
        may_move: True in the one process that puts the folder in its place.

    Raises:
        OSError: it cannot be written, as on a full disk; nothing of it is left.
    """

    def move(place: Path) -> None:
        if folder.exists():
            _remove(folder)
        os.replace(place / folder.name, folder)
        _sync_folder(folder.parent)

    place = folder.with_name(_UNFINISHED.format(name=folder.name))
    with _moved(place, folder, folder.parent, barrier, move if may_move else None):
        yield place


@contextmanager
def whole_files(folder: Path, output_dir: Path, barrier: Callable[[], None], may_move: bool) -> Iterator[Path]:
    """A place to write files in; each appears in `folder`, beside others, once all are on the disk.

    Args:
        folder: made if need be.
        output_dir: where the checkpoints are, for the message of an error.
        barrier: waits for all processes, each of which may write.
        may_move: True in the one process that puts the files in their place.

    Raises:
        OSError: they cannot be written, as on a full disk; nothing of them is left.
    """

    def move(place: Path) -> None:
        for path in sorted(place.rglob("*")):
            target = folder / path.relative_to(place)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                os.replace(path, target)
        _sync_folder(folder)

    place = folder / _UNFINISHED.format(name="files")
    with _moved(place, folder, output_dir, barrier, move if may_move else None):
        yield place


@contextmanager
def _moved(
    place: Path, what: Path, output_dir: Path, barrier: Callable[[], None], move: Callable[[Path], None] | None
) -> Iterator[Path]:
    """An empty folder; `move` takes what was written into it when it is on the disk."""
    if move is not None:
        shutil.rmtree(place, ignore_errors=True)
    barrier()
    place.mkdir(parents=True, exist_ok=True)
    try:
        yield place
        _sync(place)
        barrier()
        if move is not None:
            move(place)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for full disks
        free = shutil.disk_usage(place.parent).free / 2**20
        cause = f"{what} cannot be written, with {free:.1f} MiB free there: {error}"
        raise OSError(f"{cause}. {last_checkpoint(output_dir)}") from error
    finally:
        if move is not None:  # others may still write
            shutil.rmtree(place, ignore_errors=True)
    barrier()


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that no part of it is left under its name."""
    doomed = folder.with_name(_UNFINISHED.format(name=f"{folder.name}.removed"))
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def _sync(folder: Path) -> None:
    """Wait until all files below a folder are on the disk."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            _sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
