"""The dataset's card says what the builder reads, and ships with the package."""

import re
from pathlib import Path

from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard

import echo4o_hf
from echo4o_hf.data.builder import FEATURES, SUBSETS, Echo4oImage
from echo4o_hf.data.card import Sizes, card_configs, card_text

ROOT = Path(__file__).parents[1]
CARD = DatasetCard.load(ROOT / "dataset_card" / "README.md", ignore_metadata_errors=False)


def test_the_card_in_the_repository_is_the_packages() -> None:
    packaged = Path(echo4o_hf.__file__).parent / "data" / "dataset_card.md"
    assert (ROOT / "dataset_card" / "README.md").read_bytes() == packaged.read_bytes()


def test_configs_are_the_builders() -> None:
    assert CARD.data["configs"] == card_configs(SUBSETS)
    names = [config["config_name"] for config in CARD.data["configs"]]
    assert names == [*SUBSETS, "all"] == list(Echo4oImage.builder_configs)


def test_features_are_the_builders() -> None:
    infos = DatasetInfosDict.from_dataset_card_data(CARD.data)
    assert infos.keys() == {*SUBSETS, "all"}
    assert all(info.features == FEATURES and list(info.features) == list(FEATURES) for info in infos.values())


def test_every_field_and_subset_is_explained() -> None:
    fields = re.search(r"^## Fields$(.+?)^## ", CARD.text, re.MULTILINE | re.DOTALL)
    assert fields and re.findall(r"^\| `(\w+)` \|", fields[1], re.MULTILINE) == list(FEATURES)
    assert all(row.count("|") == 5 for row in fields[1].splitlines() if row.startswith("|"))
    assert re.findall(r"^\| `(\w+)` \| [\d ]+ \|", CARD.text, re.MULTILINE) == list(SUBSETS)


def test_no_sizes_before_something_is_built() -> None:
    assert not any("splits" in info or "download_size" in info for info in CARD.data["dataset_info"])


def test_the_card_of_a_copy() -> None:
    sizes = {"multi_reference": Sizes(70_000, 300, 200), "instruction_following": Sizes(40_000, 30, 20)}
    card = DatasetCard(card_text(sizes))
    assert card.data["configs"] == card_configs(list(sizes))
    infos = DatasetInfosDict.from_dataset_card_data(card.data)
    assert {name: info.splits["train"].num_examples for name, info in infos.items()} == {
        "multi_reference": 70_000,
        "instruction_following": 40_000,
        "all": 110_000,
    }
    assert (infos["all"].dataset_size, infos["all"].download_size) == (330, 220)
    assert card.data["size_categories"] == ["100K<n<1M"]
    assert DatasetCard(card_text({"multi_reference": Sizes(999, 3, 2)})).data["size_categories"] == ["n<1K"]
    assert card.text.strip() == CARD.text.strip()
    assert card.data["license"] == "mit"
