"""The columns of Echo-4o-Image and the options of loading it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets

from .layout import SUBSETS
from .pictures import NamedImage

REPO_ID = "Yejy53/Echo-4o-Image"
REVISION = "main"  # no commit of it could be seen from here; each load keeps to the commit this means at its start


def features(decode: bool = True) -> datasets.Features:
    """The columns; without `decode`, images are {"bytes", "path"} as they were encoded."""
    text = ("id", "subset", "task_type", "category", "instruction")
    images = {"input_images": datasets.List(NamedImage(decode=decode)), "output_image": NamedImage(decode=decode)}
    return datasets.Features({**{name: datasets.Value("string") for name in text}, **images})


FEATURES = features()


@dataclass
class Echo4oImageConfig(datasets.BuilderConfig):
    """Options of `load_dataset`, besides its own.

    Attributes:
        repo_id: Repository on the Hub to read where no `data_dir` is given.
        revision: Branch, tag or commit of it.
        on_error: "raise", or "skip" to leave out what is damaged, named in the log.
        max_pixels: Larger pictures are errors.
        validation_fraction: Share of the rows, chosen by a hash of the id, that form `validation` instead of `train`.
        decode: Images as pictures, or as {"bytes", "path"} with the bytes as they were encoded.
        state: Which files are read; set by the builder, so that other files are not taken for these in the cache.
    """

    repo_id: str = REPO_ID
    revision: str = REVISION
    on_error: str = "raise"
    max_pixels: int = 2**26
    validation_fraction: float = 0.0
    decode: bool = True
    state: str = ""

    def check(self) -> None:
        """Raise a ValueError for an option that makes no sense."""
        if self.data_files is not None:
            raise ValueError("data_files is not used: give the folder that holds the subsets as data_dir")
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {self.on_error!r}")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels must be positive, got {self.max_pixels}")
        if not 0 <= self.validation_fraction <= 1:
            raise ValueError(f"validation_fraction must be between 0 and 1, got {self.validation_fraction}")
        if self.name not in (*SUBSETS, "all"):  # such as "default", as datasets calls no name
            raise ValueError(f"name the subset: load_dataset('echo-4o-image', NAME), one of {', '.join(SUBSETS)}, all")

    def create_config_id(self, config_kwargs: dict[str, Any], custom_features: datasets.Features | None = None) -> str:
        """The cached files do not depend on `decode`, and on the repository only through `state`."""
        kept = {name: value for name, value in config_kwargs.items() if name not in ("decode", "repo_id", "revision")}
        return super().create_config_id(kept, custom_features)
