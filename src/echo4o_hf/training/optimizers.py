"""Muon for the matrices of the layers, beside any optimizer of `transformers.Trainer` for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def layer_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trained matrices inside layers, factors of adapters among them: what Muon is for.

    Embeddings, heads, norms and biases are not (Jordan, "Muon", 2024).
    """
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.ndim == 2 and ".layers." in name
    ]


class MuonBeside(torch.optim.Optimizer):
    """`torch.optim.Muon` and another optimizer as one, which is what `Trainer` takes.

    Args:
        matrices: for Muon; its steps are scaled so that AdamW's learning rate and weight decay fit it
            (arXiv 2502.16982).
        rest: the optimizer of all other parameters.
        learning_rate: of Muon.
        weight_decay: of Muon.

    Raises:
        ValueError: there are no matrices.
    """

    def __init__(
        self, matrices: list[nn.Parameter], rest: torch.optim.Optimizer, learning_rate: float, weight_decay: float
    ) -> None:
        if not matrices:
            raise ValueError("muon: true, but no matrix inside a layer is trained")
        muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.parts = (muon, rest)
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict[str, Any]]:
        # The very dicts of the parts: what a scheduler or FSDP changes in them, the parts see.
        return [group for part in self.parts for group in part.param_groups]

    @property  # type: ignore[override]
    def state(self) -> dict[Any, Any]:
        """The states of both."""
        return {parameter: state for part in self.parts for parameter, state in part.state.items()}

    @state.setter
    def state(self, value: Any) -> None:
        """Set by the base class; the parts have their own."""

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of both."""
        if closure is not None:
            raise ValueError("MuonBeside.step takes no closure")
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Both as one, in the form of every optimizer: the parameters of the second are numbered on."""
        states: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for part in self.parts:
            first = sum(len(group["params"]) for group in groups)
            saved = part.state_dict()
            states |= {first + number: state for number, state in saved["state"].items()}
            groups += [
                {**group, "params": [first + number for number in group["params"]]} for group in saved["param_groups"]
            ]
        return {"state": states, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`; parameters may be named in any way, as FSDP2 does by their names."""
        groups = list(state_dict["param_groups"])
        for part in self.parts:
            own, groups = groups[: len(part.param_groups)], groups[len(part.param_groups) :]
            names = [name for group in own for name in group["params"]]
            states = {name: state_dict["state"][name] for name in names if name in state_dict["state"]}
            part.load_state_dict({"state": states, "param_groups": own})
        self.param_groups = self._groups()
