"""`load_dataset("echo4o-miniature")`: the shapes world with the columns of Echo-4o-Image, drawn on the spot.

A row depends on its subset, its number and the seed alone: not on the other rows, nor on how it is read. The default
is `all`, a mixture to fine-tune on: of eight rows in order, six follow instructions, one is surreal, one is put
together from references. No row asks for what an item of Shapes-140 asks for.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.load import DatasetModule
from PIL import Image

from echo4o_hf.data.config import features
from echo4o_hf.miniature.dataset import draw_instruction, draw_multi_reference, draw_surreal
from echo4o_hf.miniature.world import render

NAME = "echo4o-miniature"
ROWS_PER_SHARD = 250
DRAW = {
    "surreal_fantasy": draw_surreal,
    "multi_reference": draw_multi_reference,
    "instruction_following": draw_instruction,
}
MIXTURE = (*["instruction_following"] * 3, "surreal_fantasy", *["instruction_following"] * 3, "multi_reference")
# A change of these makes cached files stale.
MODULES = ("builder.py", "captions.py", "dataset.py", "items.jsonl", "wording.py", "world.py")


@dataclass
class MiniatureConfig(datasets.BuilderConfig):
    """Options of `load_dataset`, besides its own.

    Attributes:
        rows: How many to draw.
        seed: Of all that is drawn.
        decode: Images as pictures, or as {"bytes", "path"} with the bytes as they were encoded.
    """

    rows: int = 4000
    seed: int = 0
    decode: bool = True

    def check(self) -> None:
        """Raise a ValueError for what makes no sense."""
        if self.name not in (*DRAW, "all"):
            raise ValueError(f"name the subset: one of {', '.join(DRAW)}, all; got {self.name!r}")
        if self.data_files is not None or self.data_dir is not None:
            raise ValueError(f"{NAME} is drawn, not read: it takes neither data_dir nor data_files")
        if self.rows < 1 or self.seed < 0:
            raise ValueError(f"rows must be positive and seed not negative, got rows={self.rows} and seed={self.seed}")

    def create_config_id(self, config_kwargs: dict[str, Any], custom_features: datasets.Features | None = None) -> str:
        """The cached files do not depend on `decode`."""
        kept = {name: value for name, value in config_kwargs.items() if name != "decode"}
        return super().create_config_id(kept, custom_features)


class Echo4oMiniature(datasets.GeneratorBasedBuilder):
    """The three subsets of Echo-4o-Image in pictures of 64x64 pixels."""

    BUILDER_CONFIG_CLASS = MiniatureConfig
    BUILDER_CONFIGS = [MiniatureConfig(name=name) for name in (*DRAW, "all")]
    DEFAULT_CONFIG_NAME = "all"

    def _info(self) -> datasets.DatasetInfo:
        self.config.check()
        return datasets.DatasetInfo(
            description="Flat shapes on a grid, with the columns of Echo-4o-Image.",
            features=features(self.config.decode),
            license="Apache-2.0",
        )

    def _create_builder_config(
        self,
        config_name: str | None = None,
        custom_features: datasets.Features | None = None,
        config_id: str | None = None,
        **options: Any,
    ) -> tuple[MiniatureConfig, str]:
        self._own_features = custom_features
        return super()._create_builder_config(config_name, custom_features, config_id, **options)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        rows = self.config.rows
        shards = [range(start, min(start + ROWS_PER_SHARD, rows)) for start in range(0, rows, ROWS_PER_SHARD)]
        options = {"shards": shards, "name": self.config.name, "seed": self.config.seed}
        return [datasets.SplitGenerator(name="train", gen_kwargs=options)]

    def _generate_examples(self, shards: list[range], name: str, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        for shard in shards:
            for place in shard:
                row = example(*_in_mixture(place), seed) if name == "all" else example(name, place, seed)
                yield row["id"], row

    def _as_dataset(self, split: Any = datasets.Split.TRAIN, in_memory: bool = False) -> datasets.Dataset:
        """The cached files are shared; the columns are as asked for."""
        if self._own_features is None:
            self.info.features = features(self.config.decode)
        return super()._as_dataset(split, in_memory)


def example(subset: str, number: int, seed: int) -> dict[str, Any]:
    """Draw one row of a subset, its images encoded."""
    rng = np.random.default_rng([seed, list(DRAW).index(subset), number])
    sample = DRAW[subset](rng)
    identifier = f"{subset}/{number:05d}"
    inputs = [_encoded(f"{identifier}_{place}", render(scene, rng)) for place, scene in enumerate(sample.references)]
    return {
        "id": identifier,
        "subset": subset,
        "task_type": "multi_reference" if sample.references else "t2i",
        "category": sample.category,
        "instruction": sample.instruction,
        "input_images": inputs,
        "output_image": _encoded(identifier, render(sample.scene, rng)),
    }


def _in_mixture(place: int) -> tuple[str, int]:
    """The subset of a row of `all`, and its number there."""
    rounds, rest = divmod(place, len(MIXTURE))
    subset = MIXTURE[rest]
    return subset, rounds * MIXTURE.count(subset) + MIXTURE[:rest].count(subset)


def _encoded(name: str, image: Image.Image) -> dict[str, Any]:
    data = io.BytesIO()
    image.save(data, "PNG")
    return {"bytes": data.getvalue(), "path": f"{name}.png"}


def dataset_module(revision: str | None) -> DatasetModule:
    """What `datasets.load.dataset_module_factory` gives for the name of this dataset."""
    if revision is not None:
        raise ValueError(f"{NAME} comes with the package and has no revision, got {revision!r}")
    code = b"".join((Path(__file__).parent / name).read_bytes() for name in MODULES)
    return DatasetModule(__name__, hashlib.sha256(code).hexdigest(), {"dataset_name": NAME})
