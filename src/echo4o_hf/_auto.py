"""Registration with transformers' Auto classes, without importing transformers.

transformers has no entry points for models outside of it. Each Auto module is registered with right after it has been
imported, or at once where that already happened.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def _register_config(auto: ModuleType) -> None:
    from .model.configuration_bagel import BagelConfig

    auto.AutoConfig.register("bagel", BagelConfig, exist_ok=True)


def _register_model(auto: ModuleType) -> None:
    from .model.configuration_bagel import BagelConfig
    from .model.modeling_bagel import BagelForConditionalGeneration

    for auto_class in (auto.AutoModel, auto.AutoModelForImageTextToText, auto.AutoModelForMultimodalLM):
        auto_class.register(BagelConfig, BagelForConditionalGeneration, exist_ok=True)


def _register_image_processor(auto: ModuleType) -> None:
    from .model.configuration_bagel import BagelConfig
    from .model.image_processing_bagel import BagelImageProcessor

    auto.AutoImageProcessor.register(BagelConfig, slow_image_processor_class=BagelImageProcessor, exist_ok=True)


def _register_processor(auto: ModuleType) -> None:
    from .model.configuration_bagel import BagelConfig
    from .model.processing_bagel import BagelProcessor

    auto.AutoProcessor.register(BagelConfig, BagelProcessor, exist_ok=True)


_REGISTER: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
    "transformers.models.auto.image_processing_auto": _register_image_processor,
    "transformers.models.auto.processing_auto": _register_processor,
}


class _RegisterAfterImport(MetaPathFinder, Loader):
    """Finds nothing itself: lets Python import an Auto module as always, then registers with it."""

    def __init__(self) -> None:
        self.importing: dict[str, Loader] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _REGISTER or name in self.importing:
            return None
        sys.meta_path.remove(self)  # or the search below would end here again
        try:
            spec = find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return None
        self.importing[name] = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.importing[spec.name].create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        loader = self.importing.pop(module.__name__)
        loader.exec_module(module)
        _REGISTER[module.__name__](module)


def register_when_imported() -> None:
    """Register with the Auto modules that are imported, and with the others as soon as they are."""
    sys.meta_path.insert(0, _RegisterAfterImport())
    for name, register in _REGISTER.items():
        if name in sys.modules:
            register(sys.modules[name])
