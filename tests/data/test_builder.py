"""`load_dataset("echo-4o-image", ...)`: rows as they were written, whatever the layout, and damage by its name."""

import io
import logging
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import load_dataset
from hub_layout import DAMAGES, SURREAL, Expected, Traps, encode, write_archive, write_hub_layout
from PIL import Image

import echo4o_hf  # noqa: F401  (registers the builder)
from echo4o_hf.data.builder import FEATURES, SUBSETS, Echo4oImage

LAYOUTS = {
    "archives": Traps(),
    "extracted": Traps(extracted=1.0),
    "mixed": Traps(extracted=0.5),
    "plain": Traps(False, False, False, False, False, False),
}


def load(folder: Path, name: str = "all", **options):
    return load_dataset("echo-4o-image", name, data_dir=str(folder), split="train", **options)


def contents(row: dict) -> Expected:
    """A row loaded with decode=False, as the fixture describes it."""
    assert row["id"].startswith(f"{row['subset']}/")
    return Expected(
        row["id"],
        row["task_type"],
        row["category"],
        row["instruction"],
        row["output_image"]["bytes"],
        [image["bytes"] for image in row["input_images"]],
    )


def by_id(rows) -> list[Expected]:
    return sorted(rows, key=lambda row: row.id)


@pytest.fixture(params=LAYOUTS, ids=LAYOUTS)
def layout(request, tmp_path) -> tuple[Path, list[Expected]]:
    folder = tmp_path / "data"
    return folder, write_hub_layout(folder, traps=LAYOUTS[request.param])


def test_eager_rows_in_the_order_of_the_metadata(layout):
    folder, expected = layout
    assert [contents(row) for row in load(folder, decode=False)] == expected
    for subset in SUBSETS:
        rows = load(folder, subset, decode=False)
        assert [contents(row) for row in rows] == [row for row in expected if row.subset == subset]


def test_streaming_gives_the_same_rows(layout):
    folder, expected = layout
    for _ in range(2):  # the second time, what the archives hold is known
        stream = load(folder, streaming=True, decode=False)
        assert by_id(map(contents, stream)) == by_id(expected)


def test_one_subset_given_as_the_folder(tmp_path):
    expected = write_hub_layout(tmp_path)
    for name, subset in zip((hub_folder.name for hub_folder in sorted(tmp_path.iterdir())), sorted(SUBSETS), strict=True):
        rows = load(tmp_path / name, subset, decode=False)
        assert [contents(row) for row in rows] == [row for row in expected if row.subset == subset]


def test_pictures_decode(tmp_path):
    expected = write_hub_layout(tmp_path)
    for dataset in (load(tmp_path), load(tmp_path, streaming=True)):
        assert dataset.features == FEATURES
        rows = {row["id"]: row for row in dataset}
        for row in expected:
            pixels = np.asarray(Image.open(io.BytesIO(row.output)))
            assert (np.asarray(rows[row.id]["output_image"]) == pixels).all()
            assert [image.size for image in rows[row.id]["input_images"]] == [(24, 24)] * len(row.inputs)
