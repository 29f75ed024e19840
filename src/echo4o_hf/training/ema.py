"""The moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback


class WeightAverage(EMAModel):
    """Diffusers' `EMAModel` in float32, saved by the names of the parameters.

    Upstream's keeps the parameters' dtype, in which a decay of 0.9999 is lost if it is bfloat16, and saves whole
    models. Of parameters that are sharded (FSDP2), each process averages its part.

    Args:
        model: its trained parameters are averaged.
        decay: the largest; it is (1 + step) / (10 + step) at first.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        super().__init__(self.parameters.values(), decay=decay)
        self.to(dtype=torch.float32)

    def update(self) -> None:
        """Average in the parameters as they are now: once after each step of the optimizer."""
        self.step(self.parameters.values())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside, and afterwards its own again."""
        self.store(self.parameters.values())
        self.copy_to(self.parameters.values())
        try:
            yield
        finally:
            self.restore(self.parameters.values())

    def save(self, path: Path, may_write: bool) -> None:
        """Save the average; all processes take part, and one writes."""
        tensors = {}
        for name, shadow in zip(self.parameters, self.shadow_params, strict=True):
            whole = shadow.full_tensor() if isinstance(shadow, DTensor) else shadow
            if may_write:
                tensors[name] = whole.cpu().contiguous()
        if may_write:
            save_file(tensors, path, metadata={"optimization_step": str(self.optimization_step)})

    def load(self, path: Path) -> None:
        """Go on from a saved average.

        Raises:
            OSError: there is no such file.
            ValueError: it is of other parameters.
        """
        if not path.exists():
            raise OSError(f"{path} is missing: that run had no ema_decay")
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != self.parameters.keys():
                some = sorted(names ^ self.parameters.keys())[:3]
                raise ValueError(
                    f"{path} is the average of other parameters than those trained: {', '.join(some)} ..."
                )
            for name, shadow in zip(self.parameters, self.shadow_params, strict=True):
                shadow.copy_(_distributed_like(file.get_tensor(name), shadow))
            self.optimization_step = int(file.metadata()["optimization_step"])


class Averaging(TrainerCallback):
    """Averages in the weights after each step of a trainer's optimizer."""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As the class says."""
        self.average.update()


def _distributed_like(tensor: Tensor, like: Tensor) -> Tensor:
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor
