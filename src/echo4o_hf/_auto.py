"""Registration with transformers' Auto classes, diffusers, datasets and evaluate, without importing any.

transformers has no entry points for models outside of it. Configuration and processors are registered right after the
Auto module has been imported, or at once where that already happened. Models follow when a `BagelConfig` is made,
which every `AutoModel` does first: while Auto modules are imported, what a model needs may be half imported itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def _register_config(auto: ModuleType) -> None:
    from .model.configuration_bagel import BagelConfig

    auto.AutoConfig.register("bagel", BagelConfig, exist_ok=True)


def _register_image_processor(auto: ModuleType) -> None:
    from .model.configuration_bagel import BagelConfig
    from .model.image_processing_bagel import BagelImageProcessor

    auto.AutoImageProcessor.register(BagelConfig, slow_image_processor_class=BagelImageProcessor, exist_ok=True)


def _register_processor(auto: ModuleType) -> None:
    from .model.configuration_bagel import BagelConfig
    from .model.processing_bagel import BagelProcessor

    auto.AutoProcessor.register(BagelConfig, BagelProcessor, exist_ok=True)


def _nothing(auto: ModuleType) -> None:
    """Watched only because configuration_auto is imported halfway through it."""


def _register_pipeline(loading: ModuleType) -> None:
    """`DiffusionPipeline.from_pretrained` looks up a saved pipeline's class as an attribute of diffusers."""
    diffusers = sys.modules["diffusers"]

    def load(diffusers: ModuleType) -> type:
        from .pipeline.pipeline_echo4o import Echo4oPipeline

        return Echo4oPipeline

    diffusers.__class__ = type("DiffusersWithEcho4o", (type(diffusers),), {"Echo4oPipeline": property(load)})


def _register_dataset(loading: ModuleType) -> None:
    """`load_dataset` finds our builders by the names that datasets would look up on the Hub."""
    find = loading.dataset_module_factory

    @wraps(find)
    def dataset_module_factory(path: str, *arguments: Any, **options: Any) -> Any:
        if path not in ("echo-4o-image", "echo4o-miniature") or os.path.isdir(path):
            return find(path, *arguments, **options)
        if path == "echo4o-miniature":
            from .miniature import builder

            return builder.dataset_module(options.get("revision"))
        from .data.builder import dataset_module

        return dataset_module(options.get("revision"), options.get("data_files"))

    loading.dataset_module_factory = dataset_module_factory  # type: ignore[attr-defined]
    if "datasets.inspect" in sys.modules:  # has its own reference
        sys.modules["datasets.inspect"].dataset_module_factory = dataset_module_factory  # type: ignore[attr-defined]


def _register_metrics(loading: ModuleType) -> None:
    """`evaluate.load` finds our metrics by name; a script of that name in the working directory goes first."""
    find = loading.evaluation_module_factory

    @wraps(find)
    def evaluation_module_factory(path: str, *arguments: Any, **options: Any) -> Any:
        if path not in ("geneval_pp", "imagine_bench") or os.path.isfile(os.path.join(path, f"{path}.py")):
            return find(path, *arguments, **options)
        return loading.ImportableModule(f"{__package__}.benchmarks.scripts.{path}", hash=path)

    loading.evaluation_module_factory = evaluation_module_factory  # type: ignore[attr-defined]
    if "evaluate.inspect" in sys.modules:  # has its own reference
        sys.modules["evaluate.inspect"].evaluation_module_factory = evaluation_module_factory  # type: ignore[attr-defined]


_REGISTER: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _nothing,
    "transformers.models.auto.image_processing_auto": _register_image_processor,
    "transformers.models.auto.processing_auto": _register_processor,
    "diffusers.pipelines.pipeline_loading_utils": _register_pipeline,
    "datasets.load": _register_dataset,
    "evaluate.loading": _register_metrics,
}


class _RegisterAfterImport(MetaPathFinder, Loader):
    """Finds nothing itself: lets Python import an Auto module as always, then registers with it."""

    def __init__(self) -> None:
        self.loaders: dict[str, Loader] = {}
        self.imported: list[ModuleType] = []

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _REGISTER or name in self.loaders:
            return None
        sys.meta_path.remove(self)  # or the search below would end here again
        try:
            spec = find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return None
        self.loaders[name] = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loaders[spec.name].create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self.loaders[module.__name__].exec_module(module)
        finally:
            del self.loaders[module.__name__]
        self.imported.append(module)
        while self.imported and not self.loaders:  # else the outermost of the nested imports registers
            ready = self.imported.pop(0)
            _REGISTER[ready.__name__](ready)


def register_when_imported() -> None:
    """Register with the Auto modules that are imported, and with the others as soon as they are."""
    sys.meta_path.insert(0, _RegisterAfterImport())
    for name, register in _REGISTER.items():
        if name in sys.modules:
            register(sys.modules[name])
