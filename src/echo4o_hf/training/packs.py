"""Rows -> packs: which rows are trained on together, in which order, and where a run that was stopped goes on."""

from __future__ import annotations

import bisect
import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from .samples import OversizeError, SampleBuilder, SampleError

OnError = Literal["raise", "skip"]
Row = Mapping[str, Any]
SHOWN = 10  # rows in an error's message
# Of a stream: the window in work, the dataset's position at its start, packs of it that are done.
BEGINNING: dict[str, Any] = {"epoch": 0, "window": 0, "position": None, "done": 0}
EMPTY_EPOCHS = 10  # one worker's shards may be empty, and full ones in the next epoch
# What a builder draws at random does not change lengths: these are left out of the name of the cached ones.
_NOT_MEASURED = (
    "seed",
    "store",
    "text_dropout",
    "vae_dropout",
    "vit_dropout",
    "timestep_shift",
    "sample_posterior",
)


def random_seed(*of: int) -> int:
    """31 bits that depend on these numbers alone."""
    return int.from_bytes(hashlib.blake2b(repr(of).encode(), digest_size=4).digest()) >> 1


def plan_packs(lengths: Sequence[int], max_tokens: int, seed: int, window: int = 1000) -> list[list[int]]:
    """Fill packs of at most `max_tokens` with rows, each of which is in exactly one of them.

    Rows are shuffled, then packed within windows: the longest first, each into the fullest pack that has room (best
    fit decreasing). Packs are shuffled too. At the full size, 30 720 tokens hold seven targets of 4 096 with their
    texts, and mixtures of Echo-4o-Image fill them to 96 % or more; 28 672, seven times 4 096, hold only six, and no
    plan fills them to more than 81 to 92 %.

    Args:
        lengths: Tokens of each row.
        max_tokens: Of a pack.
        seed: The same arguments give the same packs.
        window: Rows that may come together.

    Raises:
        ValueError: a row that is longer than a pack, or has no tokens.
    """
    for row, length in enumerate(lengths):
        if not 0 < length <= max_tokens:
            raise ValueError(f"row {row} has {length} tokens, a pack holds 1 to {max_tokens}")
    random = np.random.default_rng(seed)
    order = random.permutation(len(lengths)).tolist()
    packs: list[list[int]] = []
    for start in range(0, len(order), window):
        packs += _best_fit(order[start : start + window], lengths, max_tokens)
    return [packs[place] for place in random.permutation(len(packs))]


def _best_fit(rows: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of each pack, sorted: free tokens, place in packs
    for row in sorted(rows, key=lambda row: -lengths[row]):
        place = bisect.bisect_left(room, (lengths[row], 0))
        if place == len(room):
            packs.append([])
            room.append((max_tokens, len(packs) - 1))
        free, pack = room.pop(place)
        packs[pack].append(row)
        bisect.insort(room, (free - lengths[row], pack))
    return packs


class EagerPacks(Dataset[tuple[int, list[Row]]]):
    """The packs of a dataset on disk, planned once; item (epoch, index) is (epoch, the rows of that pack).

    Args:
        rows: From `load_rows`.
        builder: Counts the tokens of each row, once: they stay in the cache of `datasets`.
        max_tokens: Of a pack.
        seed: Of the plan.
        on_error: What to do with rows that cannot be used: "raise", or "skip" to leave them out.
        num_proc: Processes that count.

    Attributes:
        packs: Rows of each pack.
        lengths: Tokens of each row; 0 for what is left out.
        left_out: Id and reason of rows that are left out: by `on_error`, or by the builder's oversize="skip".

    Raises:
        ValueError: rows that cannot be used, with on_error="raise"; rows that are too long, with oversize="error"; no
            row at all.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        builder: SampleBuilder,
        max_tokens: int,
        seed: int,
        on_error: OnError = "raise",
        num_proc: int | None = None,
    ) -> None:
        self.rows, self.seed, self.epoch = rows, seed, 0
        measured = _measure(rows, builder, num_proc)
        self.lengths: list[int] = list(measured["tokens"])
        reasons, oversize = list(measured["reason"]), list(measured["oversize"])
        failed = [row for row, reason in enumerate(reasons) if reason]
        ids = rows.select_columns("id")[failed]["id"] if failed else []
        wrong: list[tuple[str, str]] = []
        self.left_out: list[tuple[str, str]] = []
        for id, row in zip(ids, failed, strict=True):
            left_out = is_left_out(oversize[row], builder, on_error)
            (self.left_out if left_out else wrong).append((id, reasons[row]))
        if wrong:
            raise ValueError(_message(wrong))
        usable = [row for row, length in enumerate(self.lengths) if length]
        if not usable:
            raise ValueError(f"none of the {len(rows)} rows can be used; left out: {self.left_out[:SHOWN]}")
        plan = plan_packs([self.lengths[row] for row in usable], max_tokens, seed)
        self.packs = [[usable[place] for place in pack] for pack in plan]

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, place: tuple[int, int]) -> tuple[int, list[Row]]:
        epoch, index = place
        return epoch, self.rows.__getitems__(self.packs[index])

    def set_epoch(self, epoch: int) -> None:
        """What `PackSampler` shows next; accelerate says it here where it does not reach the sampler."""
        self.epoch = epoch


def _measure(rows: datasets.Dataset, builder: SampleBuilder, num_proc: int | None) -> datasets.Dataset:
    """Tokens of each row, or why they cannot be counted."""
    counter = copy.copy(builder)
    for name in _NOT_MEASURED:
        setattr(counter, name, None)
    return rows.map(
        _count_tokens,
        fn_kwargs={"builder": counter},
        remove_columns=rows.column_names,
        features=datasets.Features(
            {"tokens": datasets.Value("int64"), "reason": datasets.Value("string"), "oversize": datasets.Value("bool")}
        ),
        num_proc=num_proc,
        desc="Counting tokens",
    )


def _count_tokens(row: Row, builder: SampleBuilder) -> dict[str, Any]:
    try:
        return {"tokens": builder.num_tokens(row), "reason": "", "oversize": False}
    except SampleError as error:
        return {"tokens": 0, "reason": error.reason, "oversize": isinstance(error, OversizeError)}


def is_left_out(oversize: bool, builder: SampleBuilder, on_error: OnError) -> bool:
    """Whether training goes on without a row that cannot be used."""
    if oversize and builder.oversize != "downscale":
        return builder.oversize == "skip"
    return on_error == "skip"


def _message(wrong: Sequence[tuple[str, str]]) -> str:
    lines = [f"{id}: {reason}" for id, reason in wrong[:SHOWN]]
    more = [f"... and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
    return "\n".join(
        [f"{len(wrong)} rows cannot be used:", *lines, *more, "Repair them, or leave them out with on_error=skip."]
    )


class PackSampler(Sampler[tuple[int, int]]):
    """(epoch, index) of the packs of `EagerPacks`, shuffled anew in each epoch; a function of seed and epoch alone.

    Epochs follow each other without a gap: where `multiple` does not divide the number of packs, the last ones are
    filled from the packs of the next epoch, and that one begins after them. So every optimizer step is whole, no pack
    is left out or repeated, and any number of processes sees the same packs in the same steps.

    Args:
        packs: What to sample; its epoch is this sampler's.
        multiple: Packs of one optimizer step: processes times accumulation steps.
    """

    def __init__(self, packs: EagerPacks, multiple: int = 1) -> None:
        self.packs, self.multiple = packs, multiple

    def __len__(self) -> int:
        return -(-len(self.packs) // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first = self.packs.epoch * len(self)
        epoch, place = divmod(first, len(self.packs))
        count = len(self)
        while count:
            order = np.random.default_rng(random_seed(self.packs.seed, epoch)).permutation(len(self.packs))
            shown = order[place : place + count].tolist()
            yield from ((epoch, index) for index in shown)
            count -= len(shown)
            epoch, place = epoch + 1, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose what is shown next."""
        self.packs.set_epoch(epoch)


class StreamedPacks(IterableDataset[tuple[int, list[Row]]]):
    """Packs of a dataset that is read as it comes, without end: (epoch, the rows of a pack).

    The order of shards is new in each epoch. A window of rows is read, shuffled and packed, then the next. Where a
    worker stopped is the dataset's position at its window's start and the packs done since: `state_dict` after any
    pack gives the same packs from there on. The DataLoader's workers, and the processes, share the shards; a worker
    without a shard has nothing to do.

    Rows that cannot be used go with the next pack, where the collator finds them again and reports them.

    Args:
        rows: From `load_rows`, streaming; never shuffled with a buffer, whose rows no state holds.
        builder: Counts tokens.
        max_tokens: Of a pack.
        seed: Of all orders.
        on_error: What to do with rows that cannot be used: "raise", or "skip" to leave them out.
        shuffle_window: Rows in a window; a worker holds that many in memory, with their encoded images.
        rank: Of this process.
        world: Number of processes.

    Raises:
        SampleError: while iterating: a row that cannot be used and is not left out.
        ValueError: while iterating: an epoch in which no row can be used.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        builder: SampleBuilder,
        max_tokens: int,
        seed: int,
        on_error: OnError = "raise",
        shuffle_window: int = 256,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.rows, self.builder, self.on_error = rows, builder, on_error
        self.settings = {
            "seed": seed,
            "max_tokens": max_tokens,
            "shuffle_window": shuffle_window,
            "rank": rank,
            "world": world,
        }
        self._next = self._state = dict(BEGINNING)

    def state_dict(self) -> dict[str, Any]:
        """Where this process, or this worker of it, goes on."""
        return {"settings": self.settings, **self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration, and that one alone, begin after the pack that was the last before `state_dict`.

        Raises:
            ValueError: the state is of a run whose packs were others.
        """
        if state["settings"] != self.settings:
            raise ValueError(f"cannot go on with {self.settings}: the position was saved with {state['settings']}")
        self._next = self._state = {name: state[name] for name in BEGINNING}

    def __iter__(self) -> Iterator[tuple[int, list[Row]]]:
        self._state, self._next = self._next, dict(BEGINNING)
        return self._packs(**self._state)

    def _packs(
        self, epoch: int, window: int, position: dict[str, Any] | None, done: int
    ) -> Iterator[tuple[int, list[Row]]]:
        packed_epoch = epoch
        failed: list[Row] = []
        for start, rows in self._windows(epoch, window, position):
            epoch = start["epoch"]
            usable, lengths = self._measure(rows, failed)
            if not usable:
                if epoch > packed_epoch + 1:
                    raise ValueError(f"no row of epoch {epoch - 1} can be used, like {failed[0]['id']}")
                continue
            seed = random_seed(self.settings["seed"], epoch, start["window"])
            packs = [
                [usable[place] for place in pack] for pack in plan_packs(lengths, self.settings["max_tokens"], seed)
            ]
            packs[0] += failed  # so they are reported before any position is taken
            for pack in packs[done:]:
                done += 1
                self._state = {**start, "done": done}
                yield epoch, pack
            done, failed, packed_epoch = 0, [], epoch

    def _windows(
        self, epoch: int, window: int, position: dict[str, Any] | None
    ) -> Iterator[tuple[dict[str, Any], list[Row]]]:
        """The windows from that one on: epoch, number in the epoch and position of the dataset at its start; rows."""
        empty_epochs = 0
        # Made here: the number of the epoch lies in memory that a dataset shares with the workers it was sent to.
        part = split_dataset_by_node(self.rows, self.settings["rank"], self.settings["world"])
        worker = get_worker_info()
        if worker is not None and worker.id >= part.num_shards:
            return
        while True:
            part.set_epoch(1 + random_seed(self.settings["seed"], epoch))  # 0 would leave the shards as they are
            part.load_state_dict(position or {})
            iterator, empty_epochs = iter(part), empty_epochs + (position is None)
            while rows := list(islice(iterator, self.settings["shuffle_window"])):
                yield {"epoch": epoch, "window": window, "position": position}, rows
                window, position, empty_epochs = window + 1, part.state_dict(), 0
            if empty_epochs == EMPTY_EPOCHS:
                raise ValueError(f"no rows for process {self.settings['rank']} of {self.settings['world']}")
            epoch, window, position = epoch + 1, 0, None

    def _measure(self, rows: Sequence[Row], failed: list[Row]) -> tuple[list[Row], list[int]]:
        """The rows that can be used, and their tokens; others go to `failed`."""
        usable, lengths = [], []
        for row in rows:
            try:
                lengths.append(self.builder.num_tokens(row))
                usable.append(row)
            except SampleError as error:
                if not is_left_out(isinstance(error, OversizeError), self.builder, self.on_error):
                    raise
                failed.append(row)
        return usable, lengths
