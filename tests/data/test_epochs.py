"""What training does with `datasets` alone: every row once per epoch over ranks and workers, subsets by weight."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from datasets import interleave_datasets, load_dataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

import echo4o_hf  # noqa: F401
from echo4o_hf.data.builder import SUBSETS
from echo4o_hf.miniature import dataset as miniature

ROWS = 13  # of each subset: no multiple of ranks or workers


@pytest.fixture(scope="module")
def hub_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several archives in every subset."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniature, "IMAGES_PER_ARCHIVE", 3)
        miniature.write_dataset(folder, ROWS)
    return folder


def load(hub_layout: Path, name: str, streaming: bool):
    return load_dataset("echo-4o-image", name, data_dir=str(hub_layout), split="train", streaming=streaming)


def seen(dataset, ranks: int, workers: int) -> list[str]:
    """The ids that one epoch shows, over all ranks."""
    ids = []
    for rank in range(ranks):
        part = split_dataset_by_node(dataset, rank, ranks).select_columns(["id"])
        for batch in DataLoader(part, batch_size=2, num_workers=workers):
            ids.extend(batch["id"])
    return ids


@pytest.mark.parametrize("streaming", [False, True], ids=["eager", "streaming"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_row_once_per_epoch(hub_layout: Path, ranks: int, workers: int, streaming: bool) -> None:
    ids = seen(load(hub_layout, "all", streaming), ranks, workers)
    assert len(ids) == ROWS * len(SUBSETS) == len(set(ids))


def test_ranks_may_start_one_after_the_other(hub_layout: Path, tmp_path: Path) -> None:
    """What the first rank learns of the archives, and remembers, changes nothing for the second."""
    folder = shutil.copytree(hub_layout, tmp_path / "never read before")
    ids = []
    for rank in range(2):
        part = split_dataset_by_node(load(folder, "all", streaming=True), rank, 2)
        ids.extend(id for batch in DataLoader(part.select_columns(["id"]), num_workers=2) for id in batch["id"])
    assert len(ids) == ROWS * len(SUBSETS) == len(set(ids))


@pytest.mark.parametrize("streaming", [False, True], ids=["eager", "streaming"])
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (2, 2), (4, 2)])
def test_interleaved_subsets_show_every_row_once(hub_layout: Path, ranks: int, workers: int, streaming: bool) -> None:
    mixed = interleave_datasets(
        [load(hub_layout, name, streaming) for name in SUBSETS],
        probabilities=[0.2, 0.5, 0.3],
        seed=0,
        stopping_strategy="all_exhausted_without_replacement",
    )
    ids = seen(mixed, ranks, workers)
    assert len(ids) == ROWS * len(SUBSETS) == len(set(ids))


@pytest.mark.parametrize("streaming", [False, True], ids=["eager", "streaming"])
def test_interleaving_follows_the_weights(hub_layout: Path, streaming: bool) -> None:
    weights = {"surreal_fantasy": 0.6, "multi_reference": 0.1, "instruction_following": 0.3}
    mixed = interleave_datasets(
        [load(hub_layout, name, streaming).repeat(30) for name in weights],
        probabilities=list(weights.values()),
        seed=0,
    )
    first = [row["subset"] for row, _ in zip(mixed.select_columns(["subset"]), range(300), strict=False)]
    assert len(first) == 300
    for name, weight in weights.items():
        assert Counter(first)[name] / 300 == pytest.approx(weight, abs=0.08)  # three standard deviations
