"""Packs: plans, epochs on any number of processes, and going on exactly after any pack."""

import io
import json
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import echo4o_hf  # noqa: F401
from echo4o_hf.miniature.training import SHARED, miniature_config
from echo4o_hf.model.processing_bagel import BagelProcessor
from echo4o_hf.training.collator import PackCollator
from echo4o_hf.training.packs import EagerPacks, PackSampler, StreamedPacks, plan_packs
from echo4o_hf.training.samples import OversizeError, SampleBuilder, SampleError
from echo4o_hf.training.sizes import training_sizes


class Words:
    """Counts words, as a builder that draws nothing."""

    def __init__(self, max_tokens: int = 20, oversize: str = "downscale") -> None:
        self.max_tokens, self.oversize = max_tokens, oversize

    def num_tokens(self, row) -> int:
        count = len(row["instruction"].split())
        if not count:
            raise SampleError(row["id"], "empty text")
        if count > self.max_tokens:
            raise OversizeError(row["id"], f"{count} words")
        return count


def texts(count: int, seed: int = 0, name: str = "r") -> dict:
    lengths = np.random.default_rng(seed).integers(1, 12, count)
    return {"id": [f"{name}{i}" for i in range(count)], "instruction": ["word " * int(n) for n in lengths]}


def stream(count: int, shards: int = 5, seed: int = 0, name: str = "r") -> datasets.IterableDataset:
    return datasets.Dataset.from_dict(texts(count, seed, name)).to_iterable_dataset(shards)


def ids(batch) -> list[str]:
    ((epoch, rows),) = batch
    return [f"{epoch}:{row['id']}" for row in rows]


# ------------------------------------------------------------------------------------------------------------- plans


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 120), st.integers(0, 9), st.integers(1, 60))
def test_each_row_is_in_one_pack_and_no_pack_is_over(lengths, max_tokens, seed, window) -> None:
    packs = plan_packs(lengths, max_tokens, seed, window)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[row] for row in pack) <= max_tokens for pack in packs)
    assert packs == plan_packs(lengths, max_tokens, seed, window)


def test_another_seed_packs_others_together() -> None:
    lengths = realistic(200)
    together = [{frozenset(pack) for pack in plan_packs(lengths, 30_720, seed)} for seed in (0, 1)]
    assert together[0] != together[1]


def test_rows_far_apart_in_the_shuffled_order_never_come_together() -> None:
    packs = plan_packs([1] * 100, 100, seed=0, window=10)
    assert sorted(map(len, packs)) == [10] * 10


@pytest.mark.parametrize("length", [0, -1, 101])
def test_a_row_that_fits_no_pack_is_an_error(length: int) -> None:
    with pytest.raises(ValueError, match=f"row 1 has {length} tokens, a pack holds 1 to 100"):
        plan_packs([5, length], 100, seed=0)


def realistic(count: int) -> list[int]:
    """Echo-4o-Image at full size: 38 surreal, 73 of 1 to 4 references, 68 instructions of each 179."""
    random = np.random.default_rng(0)
    kinds = random.choice(3, count, p=np.array([38, 73, 68]) / 179)
    texts = np.stack(
        [random.integers(24, 204, count), random.integers(15, 100, count), random.integers(15, 120, count)]
    )
    references = np.where(kinds == 1, random.integers(1, 5, count), 0)
    return (4096 + texts[kinds, np.arange(count)] + 5470 * references).tolist()


@pytest.mark.parametrize("window", [256, 1000])
def test_packs_are_full_and_quickly_planned(window: int) -> None:
    lengths = realistic(20_000)
    start = time.process_time()
    packs = plan_packs(lengths, 30_720, seed=0, window=window)
    assert time.process_time() - start < 2  # measured: 0.2
    assert sum(lengths) / (30_720 * len(packs)) > 0.96


# -------------------------------------------------------------------------------------------------------------- eager


def eager(count: int = 60, **options) -> EagerPacks:
    return EagerPacks(datasets.Dataset.from_dict(texts(count)), Words(), 20, seed=3, **options)


def test_a_pack_of_rows() -> None:
    packs = eager()
    assert len(packs) == len(packs.packs)
    epoch, rows = packs[7, 1]
    assert epoch == 7
    assert rows == [packs.rows[row] for row in packs.packs[1]]
    assert sum(Words().num_tokens(row) for row in rows) == sum(packs.lengths[row] for row in packs.packs[1]) <= 20


@pytest.mark.parametrize("multiple", [1, 3, 8])
def test_every_pack_once_per_epoch_without_gaps(multiple: int) -> None:
    packs = eager()
    sampler = PackSampler(packs, multiple)
    seen = []
    for epoch in range(2 * len(packs)):
        sampler.set_epoch(epoch)
        shown = list(sampler)
        assert shown == list(sampler)
        assert len(shown) == len(sampler)
        assert len(shown) % multiple == 0
        seen += shown
    whole = len(seen) // len(packs)
    assert seen[: whole * len(packs)] == sorted(seen[: whole * len(packs)], key=lambda place: place[0])
    assert set(Counter(seen[: whole * len(packs)]).values()) == {1}
    orders = {tuple(index for epoch, index in seen if epoch == number) for number in range(whole)}
    assert len(orders) == whole


def steps(packs: EagerPacks, processes: int, accumulation: int, epochs: range, skip: int = 0, workers: int = 0):
    """The packs of each optimizer step, as accelerate gives them to each process, after skipping in the first."""
    shown = [[] for _ in range(processes)]
    for rank in range(processes):
        sampler = PackSampler(packs, processes * accumulation)
        loader = DataLoader(packs, sampler=sampler, batch_size=1, collate_fn=ids, num_workers=workers)
        loader = prepare_data_loader(loader, num_processes=processes, process_index=rank, put_on_device=False)
        for epoch in epochs:
            here = skip_first_batches(loader, skip * accumulation) if epoch == epochs[0] else loader
            packs.set_epoch(0)  # as a new process
            here.set_epoch(epoch)
            batches = list(here)
            shown[rank] += [batches[start : start + accumulation] for start in range(0, len(batches), accumulation)]
    return [sorted(pack for rank in range(processes) for pack in shown[rank][step]) for step in range(len(shown[0]))]


def test_any_number_of_processes_sees_the_same_packs_in_a_step() -> None:
    packs = eager()
    alone = steps(packs, 1, 4, range(3))
    assert len(packs) % 4
    assert alone == steps(packs, 2, 2, range(3)) == steps(packs, 4, 1, range(3))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("epoch", [0, 1])
def test_skipping_as_trainer_does_reads_no_rows(processes: int, epoch: int, monkeypatch) -> None:
    packs = eager()
    whole = steps(packs, processes, 2, range(epoch, epoch + 2))
    read = []
    get = EagerPacks.__getitem__
    monkeypatch.setattr(EagerPacks, "__getitem__", lambda self, place: (read.append(place), get(self, place))[1])
    assert steps(packs, processes, 2, range(epoch, epoch + 2), skip=3) == whole[3:]
    assert len(read) == sum(len(whole[3:]) * [2 * processes])


def test_workers_change_nothing() -> None:
    packs = eager()
    assert steps(packs, 1, 1, range(2)) == steps(packs, 1, 1, range(2), workers=2)


BAD = {"id": ["ok", "empty", "long", "fine"], "instruction": ["a b", "", "word " * 30, "c"]}


@pytest.mark.parametrize(
    ("on_error", "oversize", "left_out"),
    [("skip", "downscale", ["empty", "long"]), ("skip", "skip", ["empty", "long"])],
)
def test_rows_left_out_are_listed(on_error: str, oversize: str, left_out: list[str]) -> None:
    packs = EagerPacks(datasets.Dataset.from_dict(BAD), Words(oversize=oversize), 20, 0, on_error)
    assert [id for id, _ in packs.left_out] == left_out
    assert sorted(row["id"] for index in range(len(packs)) for row in packs[0, index][1]) == ["fine", "ok"]


@pytest.mark.parametrize(
    ("on_error", "oversize", "named", "not_named"),
    [
        ("raise", "downscale", ["empty: empty text", "long: 30 words"], []),
        ("raise", "skip", ["empty: empty text"], ["long"]),
        ("skip", "error", ["long: 30 words"], ["empty"]),
    ],
)
def test_rows_that_stop_training_are_named(on_error, oversize, named, not_named) -> None:
    with pytest.raises(ValueError, match="cannot be used") as error:
        EagerPacks(datasets.Dataset.from_dict(BAD), Words(oversize=oversize), 20, 0, on_error)
    assert all(line in str(error.value) for line in named)
    assert not any(f"{id}: " in str(error.value) for id in not_named)


def test_nothing_left_is_an_error() -> None:
    rows = datasets.Dataset.from_dict({"id": ["a"], "instruction": [""]})
    with pytest.raises(ValueError, match="none of the 1 rows can be used"):
        EagerPacks(rows, Words(), 20, 0, "skip")


@pytest.fixture(scope="module")
def make_builder():
    """Function (options) -> the real builder, of the miniature's sizes."""
    processor = BagelProcessor.from_pretrained(SHARED / "processor")
    config = miniature_config(processor)
    sizes = training_sizes(processor, config)

    def make(**options) -> SampleBuilder:
        return SampleBuilder(processor, config, {}, sizes=sizes, **{"max_tokens": 300, **options})

    return make


@pytest.fixture(scope="module")
def miniature_rows(tmp_path_factory) -> Callable[[], datasets.Dataset]:
    cache = tmp_path_factory.mktemp("cache")
    arguments = {"split": "train", "rows": 40, "decode": False, "cache_dir": cache}
    return lambda: datasets.load_dataset("echo4o-miniature", **arguments)


def test_packs_of_real_samples(make_builder, miniature_rows) -> None:
    builder = make_builder()
    packs = EagerPacks(miniature_rows().add_column("answer", [None] * 40), builder, 300, seed=0)
    for index in range(len(packs)):
        samples = [builder.build(row, epoch=0) for row in packs[0, index][1]]
        assert sum(map(builder.num_tokens, packs[0, index][1])) <= 300
        assert len(samples) == len(packs.packs[index])
    assert sum(packs.lengths) / (300 * len(packs)) > 0.8


def test_lengths_are_counted_once(make_builder, miniature_rows, monkeypatch) -> None:
    rows = miniature_rows().add_column("answer", [None] * 40)
    first = EagerPacks(rows, make_builder(), 300, seed=0)
    counted = []
    count = SampleBuilder.num_tokens
    monkeypatch.setattr(SampleBuilder, "num_tokens", lambda self, row: counted.append(row) or count(self, row))
    rows = miniature_rows().add_column("answer", [None] * 40)
    again = EagerPacks(rows, make_builder(seed=5, text_dropout=0.5), 300, seed=0)
    assert (again.packs, again.lengths, counted) == (first.packs, first.lengths, [])
    EagerPacks(rows, make_builder(max_tokens=299), 300, seed=0)
    assert len(counted) == 40


# ---------------------------------------------------------------------------------------------------------- streaming


def streamed(rows=None, **options) -> StreamedPacks:
    options = {"builder": Words(), "max_tokens": 20, "seed": 1, "shuffle_window": 7, **options}
    return StreamedPacks(stream(40) if rows is None else rows, **options)


def mixture(weights: bool = True, strategy: str = "all_exhausted") -> datasets.IterableDataset:
    parts = [stream(23, 4, 1, "a"), stream(11, 3, 2, "b"), stream(5, 3, 3, "c")]
    return datasets.interleave_datasets(
        parts, probabilities=[0.2, 0.5, 0.3] if weights else None, seed=0, stopping_strategy=strategy
    )


def generated(shards: list[int]):
    for shard in shards:
        for place in range(9):
            yield {"id": f"g{shard}.{place}", "instruction": "word " * (1 + (shard + place) % 11)}


def from_generator() -> datasets.IterableDataset:
    rows = datasets.IterableDataset.from_generator(generated, gen_kwargs={"shards": list(range(4))})
    return rows.map(upper)


def upper(row: dict) -> dict:
    return {"id": row["id"].upper()}


DATA = {
    "arrow": lambda: stream(40),
    "generator": from_generator,
    "weights": mixture,
    "alternating": lambda: mixture(False, "all_exhausted_without_replacement"),
    "generators": lambda: datasets.interleave_datasets(
        [from_generator(), from_generator()], probabilities=[0.3, 0.7], seed=5, stopping_strategy="all_exhausted"
    ),
}


def loader_of(packs: StreamedPacks, workers: int) -> StatefulDataLoader:
    return StatefulDataLoader(packs, batch_size=1, collate_fn=ids, num_workers=workers)


@pytest.mark.parametrize("kind", ["arrow", "generator", "alternating"])
@pytest.mark.parametrize(("workers", "world"), [(0, 1), (2, 1), (0, 2), (2, 2), (0, 3)])
def test_every_row_once_per_epoch(kind: str, workers: int, world: int) -> None:
    seen = [
        id
        for rank in range(world)
        for pack in islice(loader_of(streamed(DATA[kind](), rank=rank, world=world), workers), 40)
        for id in pack
    ]
    count = Counter(id for id in seen if id.startswith(("0:", "1:")))
    assert set(count.values()) == {1}
    assert len(count) == 2 * len(list(DATA[kind]()))


def test_packs_hold_what_fits_and_differ_between_epochs() -> None:
    packs = list(islice(streamed(), 80))
    assert all(sum(Words().num_tokens(row) for row in rows) <= 20 for _, rows in packs)
    orders = [[row["id"] for epoch, rows in packs if epoch == number for row in rows] for number in range(3)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    first_shards = {frozenset(int(id[1:]) // 8 for id in order[:7]) for order in orders}
    assert len(first_shards) > 1
    other = [[row["id"] for row in rows] for _, rows in islice(streamed(seed=2), 80)]
    assert other != [[row["id"] for row in rows] for _, rows in packs]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", DATA)
def test_goes_on_after_any_pack(kind: str, workers: int) -> None:
    total = 50
    loader = loader_of(streamed(DATA[kind]()), workers)
    whole, states = [], []
    for pack in islice(loader, total):
        whole.append(pack)
        states.append(loader.state_dict())
    assert max(id.split(":")[0] for pack in whole for id in pack) >= "1"  # epochs inside
    for cut in range(0, total - 5, 1 if workers == 0 else 7):
        loader = loader_of(streamed(DATA[kind]()), workers)
        loader.load_state_dict(torch_round_trip(states[cut]))
        assert list(islice(loader, 5)) == whole[cut + 1 : cut + 6], f"after pack {cut}"


def torch_round_trip(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("world", [2, 3])
def test_each_process_goes_on(world: int) -> None:
    for rank in range(world):
        loader = loader_of(streamed(mixture(), rank=rank, world=world), 0)
        iterator = iter(loader)
        for _ in range(13):
            next(iterator)
        state = loader.state_dict()
        rest = list(islice(iterator, 20))
        again = loader_of(streamed(mixture(), rank=rank, world=world), 0)
        again.load_state_dict(state)
        assert list(islice(again, 20)) == rest


def test_goes_on_twice() -> None:
    whole = list(islice(loader_of(streamed(), 0), 30))
    state, seen = None, []
    while len(seen) < 30:
        loader = loader_of(streamed(), 0)
        if state:
            loader.load_state_dict(state)
        seen += islice(loader, 3)
        state = loader.state_dict()
    assert seen == whole


def test_a_position_is_for_one_iteration() -> None:
    packs = streamed()
    whole = [[row["id"] for row in rows] for _, rows in islice(packs, 8)]
    state = packs.state_dict()
    assert [[row["id"] for row in rows] for _, rows in islice(packs, 8)] == whole
    packs.load_state_dict(state)
    assert [row["id"] for row in next(iter(packs))[1]] not in whole
    assert [[row["id"] for row in rows] for _, rows in islice(packs, 8)] == whole


@pytest.mark.parametrize("workers", [3, 4])
def test_workers_without_a_shard_do_nothing(workers: int) -> None:
    def make() -> StatefulDataLoader:
        return loader_of(streamed(stream(20, shards=2)), workers)

    loader = make()
    whole, states = [], []
    for pack in islice(loader, 24):
        whole.append(pack)
        states.append(loader.state_dict())
    count = Counter(id for pack in whole for id in pack if id[0] == "0")
    assert len(count) == 20
    assert set(count.values()) == {1}
    for cut in (0, 1, 2, 3, 10):
        loader = make()
        loader.load_state_dict(states[cut])
        assert list(islice(loader, 6)) == whole[cut + 1 : cut + 7], f"after pack {cut}"


def test_a_state_is_plain_and_of_one_run() -> None:
    packs = streamed()
    next(iter(packs))
    state = json.loads(json.dumps(packs.state_dict()))
    streamed().load_state_dict(state)
    with pytest.raises(ValueError, match=r"'shuffle_window': 8.*'shuffle_window': 7"):
        streamed(shuffle_window=8).load_state_dict(state)


def with_bad() -> datasets.IterableDataset:
    rows = texts(40)
    for place in (0, 3, *range(16, 40)):
        rows["instruction"][place] = "" if place % 2 else "word " * 30
    return datasets.Dataset.from_dict(rows).to_iterable_dataset(5)


def test_rows_that_cannot_be_used_come_along_once_per_epoch() -> None:
    seen: Counter[str] = Counter()
    for epoch, rows in streamed(with_bad(), on_error="skip"):  # those at an epoch's end come with the next one
        seen.update(row["id"] for row in rows)
        if epoch == 2:
            break
    bad = {f"r{place}" for place in (0, 3, *range(16, 40))}
    assert {seen[id] for id in bad} <= {2, 3}
    assert len({id for id in seen if seen[id] == 2} - bad) >= 14 - len(rows)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_collator_reports_streamed_rows_that_cannot_be_used(make_builder, miniature_rows, workers: int) -> None:
    rows = miniature_rows().add_column("answer", [None] * 39 + ["both"])
    builder = make_builder()
    packs = StreamedPacks(rows.to_iterable_dataset(), builder, 300, 0, on_error="skip", shuffle_window=16)
    loader = StatefulDataLoader(packs, collate_fn=PackCollator(builder, on_error="skip"), num_workers=workers)
    left_out = [item for batch in islice(loader, 10) for item in batch["left_out"]]
    assert left_out[0] == (rows[39]["id"], "must have an output_image or an answer, not both")


def test_goes_on_where_whole_windows_cannot_be_used() -> None:
    loader = loader_of(streamed(with_bad(), on_error="skip", shuffle_window=4), 0)
    whole, states = [], []
    for pack in islice(loader, 40):
        whole.append(pack)
        states.append(loader.state_dict())
    for cut in range(30):
        again = loader_of(streamed(with_bad(), on_error="skip", shuffle_window=4), 0)
        again.load_state_dict(states[cut])
        assert list(islice(again, 9)) == whole[cut + 1 : cut + 10]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_cannot_be_used_is_named(workers: int) -> None:
    with pytest.raises(SampleError, match="words|empty text"):
        list(islice(loader_of(streamed(with_bad()), workers), 30))


def test_oversize_rows_are_left_out_alone() -> None:
    rows = datasets.Dataset.from_dict(BAD).select([0, 2, 3]).to_iterable_dataset()
    seen = {id for pack in islice(loader_of(streamed(rows, builder=Words(oversize="skip")), 0), 3) for id in pack}
    assert {"0:ok", "0:long", "0:fine"} <= seen
    with pytest.raises(SampleError, match="long"):
        next(iter(streamed(rows, builder=Words(oversize="error"), on_error="skip")))


def test_nothing_to_stream_is_an_error() -> None:
    bad = datasets.Dataset.from_dict({"id": ["a"], "instruction": [""]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="no row of epoch 1 can be used, like a"):
        next(iter(streamed(bad, on_error="skip")))
    with pytest.raises(ValueError, match="no rows for process 1 of 2"):
        next(iter(streamed(stream(1, 1), rank=1, world=2)))
