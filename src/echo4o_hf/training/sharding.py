"""What accelerate must know of the model before FSDP2 takes it apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from ..model.modeling_bagel import BagelPositionTable


def bfloat16_policy() -> MixedPrecisionPolicy:
    """Weights are gathered in bfloat16, gradients added up in float32, and activations left as they are.

    Accelerate's own policy would also round what goes into the layers and comes out of the model: noise, timesteps,
    rotary tables, losses per token.
    """
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


@contextmanager
def tables_apart(model: nn.Module, accelerator: Any) -> Iterator[None]:
    """Inside, the position tables, of which each process has its own, are not part of the model's state.

    With cpu_ram_efficient_loading the first process alone has loaded the model, and accelerate gives the others their
    shares of its state; it knows no whole tensors among them.
    """
    tables = [module for module in model.modules() if isinstance(module, BagelPositionTable)]
    for table in tables:
        values: Tensor = table.pos_embed
        values = table.values().to(values.dtype) if values.is_meta else values
        table.register_buffer("pos_embed", broadcast(values.to(accelerator.device)), persistent=False)
    try:
        yield
    finally:
        for table in tables:
            table.register_buffer("pos_embed", table.pos_embed)


def drop_gathered(model: nn.Module) -> None:
    """Let FSDP gather all weights again: what it has gathered last, it would go on with after its shares changed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
