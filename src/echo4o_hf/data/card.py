"""The dataset's card with the sizes of what was built.

The text is `dataset_card.md` beside this file, because a wheel holds nothing from outside the package;
dataset_card/README.md in the repository is a link to it, so that there is one text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

from datasets import DatasetInfo, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard

from echo4o_hf.data.builder import FEATURES

_SIZE_CATEGORIES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
)
_NO_FIGURES = re.compile(r"No figures stand here.*?```\n.*?```\n", re.DOTALL)
_COLUMNS = ("rows", "exact", "near", "prompts", "prompts_exact", "prompts_near")


class Sizes(NamedTuple):
    """Sizes of one subset: `num_bytes` in memory, `download_size` on the disk."""

    rows: int
    num_bytes: int
    download_size: int


def card_text(subsets: Mapping[str, Sizes], contamination: Mapping[str, Any] | None = None) -> str:
    """The card of a copy that holds these subsets.

    Args:
        subsets: their names and sizes.
        contamination: "threshold", "ngram" and "counts" of a report of `overlap`, and "dropped": whether the rows
            that it found are left out of the copy.
    """
    card = DatasetCard(resources.files("echo4o_hf.data").joinpath("dataset_card.md").read_text(encoding="utf-8"))
    total = Sizes(*(sum(column) for column in zip(*subsets.values(), strict=True)))
    infos = {name: _dataset_info(sizes) for name, sizes in {**subsets, "all": total}.items()}
    card.data["configs"] = card_configs(list(subsets))
    card.data["dataset_info"] = None
    DatasetInfosDict(infos).to_dataset_card_data(card.data)
    if contamination is not None:
        card.text = _NO_FIGURES.sub(lambda _: _figures(contamination), card.text)
    card.data["size_categories"] = [next(name for limit, name in _SIZE_CATEGORIES if total.rows < limit)]
    return str(card)


def _figures(contamination: Mapping[str, Any]) -> str:
    copy = "of the data that this copy was made from; the rows found are left out of it"
    header = ["benchmark", "subset", "rows", "exact", "near", "prompts", "met exactly", "met nearly"]
    rows = [
        [entry["benchmark"], entry["subset"], *(f"{entry[name]:,}" for name in _COLUMNS)]
        for entry in contamination["counts"]
    ]
    lines = [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows]]
    return (
        f"Figures {copy if contamination['dropped'] else 'of this copy'}, by `echo4o data overlap`: rows whose "
        "instruction is a benchmark's prompt, or near one\n"
        f"(Jaccard similarity of token {contamination['ngram']}-grams of at least {contamination['threshold']}), and "
        "how many of its prompts are met.\n\n" + "\n".join(lines) + "\n"
    )


def card_configs(subsets: Sequence[str]) -> list[dict[str, Any]]:
    """The `configs` of a card: one for each subset, and `all`."""
    paths = {subset: f"{subset}/train-*.parquet" for subset in subsets}
    configs: dict[str, str | list[str]] = {**paths, "all": [*paths.values()]}
    return [{"config_name": name, "data_files": [{"split": "train", "path": path}]} for name, path in configs.items()]


def _dataset_info(sizes: Sizes) -> DatasetInfo:
    return DatasetInfo(
        features=FEATURES,
        splits=SplitDict({"train": SplitInfo("train", sizes.num_bytes, sizes.rows)}),
        download_size=sizes.download_size,
        dataset_size=sizes.num_bytes,
    )
