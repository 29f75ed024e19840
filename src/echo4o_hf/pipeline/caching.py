"""Step caching: the velocities of some updates are forecast from earlier ones instead of evaluated by the model.

The forecast is TaylorSeer's (arXiv 2503.06923) in its lite mode, the model's output as a whole: diffusers' config and
arithmetic, without its hooks. A hook acts on every call of a module, and the layers here also read prompts and write
texts; it counts its own calls, so that branches of guidance that begin at different updates would fall out of step.
diffusers' other caches do not serve: FirstBlockCache and SeaCache decide from the values of a whole batch, so that its
images would change each other, and like MagCache stand in for layers of one or two outputs, where these have four;
FasterCache and PyramidAttentionBroadcast know only diffusers' own attention, TextKVCache one other model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from diffusers import TaylorSeerCacheConfig
from diffusers.hooks.taylorseer_cache import TaylorSeerState
from torch import Tensor

Row = tuple[str, int]  # the branch of guidance and the image


class StepCache:
    """The velocities of one call of the pipeline, with a state for each branch of each image.

    The config alone says at which updates all rows are evaluated; besides, all rows of an image are where one of them
    begins. So images of a batch do not change each other. A row that leaves, as guidance ends, takes its state along.
    """

    def __init__(self, config: TaylorSeerCacheConfig) -> None:
        """See `StepCacheMixin.enable_cache`."""
        self.config = config
        self._step = -1
        self._states: dict[Row, TaylorSeerState] = {}

    def __call__(self, rows: Sequence[Row], evaluate: Callable[[], Tensor]) -> Tensor:
        """The velocities of the next update (rows, N, D), forecast or from `evaluate`."""
        self._step += 1
        is_due = is_evaluated(self._step, self.config)
        begins = {image for branch, image in rows if (branch, image) not in self._states}
        self._states = {row: self._states.get(row) or self._new_state() for row in rows}
        for state in self._states.values():
            state.current_step = self._step
        if not is_due and not begins:
            return torch.stack([state.predict()[0] for state in self._states.values()])

        velocities = []
        for (row, state), velocity in zip(self._states.items(), evaluate(), strict=True):
            if is_due or row[1] in begins:
                state.update((velocity,))
                velocities.append(velocity)
            else:
                velocities.append(state.predict()[0])
        return torch.stack(velocities)

    def _new_state(self) -> TaylorSeerState:
        return TaylorSeerState(self.config.taylor_factors_dtype, self.config.max_order)


class StepCacheMixin:
    """`enable_cache` and `disable_cache`, as diffusers' models have them."""

    _cache_config: TaylorSeerCacheConfig | None = None

    def enable_cache(self, config: TaylorSeerCacheConfig) -> None:
        """Forecast the velocities of some updates: faster, and near the exact pictures instead of equal to them.

        Prompts and texts are read and written as before, and so is training. Every call begins anew.

        Args:
            config: evaluated are the updates before `disable_cache_before_step`, then one of `cache_interval`, and all
                from `disable_cache_after_step` on; `max_order` 0 repeats the last velocity, 1 continues its change.
                Velocities are small: float32 for `taylor_factors_dtype` costs nothing. `use_lite_mode` is always on.

        Raises:
            ValueError: another cache of diffusers, or settings that cannot work.
        """
        check_config(config)
        self._cache_config = replace(config)

    def disable_cache(self) -> None:
        """Evaluate all updates again."""
        self._cache_config = None

    def _new_step_cache(self) -> StepCache | None:
        """For one call."""
        return None if self._cache_config is None else StepCache(self._cache_config)


def is_evaluated(step: int, config: TaylorSeerCacheConfig) -> bool:
    """Whether the model is evaluated at an update, counted from 0: the rule of diffusers' `TaylorSeerCacheHook`."""
    before, after = config.disable_cache_before_step, config.disable_cache_after_step
    if step < before or (after is not None and step >= after):
        return True
    return (step - before - 1) % config.cache_interval == 0


def check_config(config: TaylorSeerCacheConfig) -> None:
    """Raise a ValueError if a config cannot be followed."""
    if not isinstance(config, TaylorSeerCacheConfig):
        raise ValueError(
            f"enable_cache takes diffusers' TaylorSeerCacheConfig, not {type(config).__name__}: diffusers' other "
            "caches do not fit this model"
        )
    minima = {"cache_interval": 1, "disable_cache_before_step": 0, "disable_cache_after_step": 0, "max_order": 0}
    for name, minimum in minima.items():
        value = getattr(config, name)
        if value is None and name == "disable_cache_after_step":
            continue
        if not isinstance(value, int) or value < minimum:
            raise ValueError(f"{name}={value!r} must be a whole number and at least {minimum}")
    dtype = config.taylor_factors_dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"taylor_factors_dtype={dtype!r} must be a floating-point dtype such as torch.float32")
    for name in ("skip_predict_identifiers", "cache_identifiers"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name} must be None: the velocity is forecast, not the outputs of modules")
