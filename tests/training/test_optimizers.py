"""Muon beside another optimizer."""

import copy

import pytest
import torch
from torch import nn

from echo4o_hf.training.optimizers import MuonBeside, layer_matrices


class Layered(nn.Module):
    """An embedding, two layers with norms, a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2))
        self.head = nn.Linear(4, 5)

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class Model(nn.Module):
    """Holds it under a name, as the parts of a model are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.text = Layered()


def split(model):
    matrices = layer_matrices(model)
    rest = [parameter for parameter in model.parameters() if all(parameter is not matrix for matrix in matrices)]
    return matrices, rest


def make(model):
    matrices, rest = split(model)
    groups = [{"params": rest[:2], "weight_decay": 0.1}, {"params": rest[2:], "weight_decay": 0.0}]
    return MuonBeside(matrices, torch.optim.AdamW(groups, lr=0.01), learning_rate=0.01, weight_decay=0.1)


def train(model, optimizers, steps, schedulers=()):
    for step in range(steps):
        loss = model.text(torch.arange(5).roll(step)).pow(2).sum()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()


def same(one, other):
    return all(map(torch.equal, one.parameters(), other.parameters()))


def test_which_matrices():
    model = Model()
    names = {name for name, p in model.named_parameters() if any(p is matrix for matrix in layer_matrices(model))}
    assert names == {"text.layers.0.0.weight", "text.layers.1.0.weight"}
    model.text.layers[0].requires_grad_(False)
    assert len(layer_matrices(model)) == 1


def test_both_step_as_they_would_alone():
    model = Model()
    alone = copy.deepcopy(model)
    matrices, rest = split(alone)
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": rest[:2], "weight_decay": 0.1}, {"params": rest[2:], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.01)
    train(model, [make(model)], 3)
    train(alone, [muon, adamw], 3)
    assert same(model, alone) and not same(model, Model())


def test_a_schedule_reaches_both():
    model = Model()
    optimizer = make(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    train(model, [optimizer], 2, [scheduler])
    assert same(model, Model())
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [0.0] * 3


def test_a_saved_state_goes_on_bit_for_bit(tmp_path):
    model = Model()
    optimizer = make(model)
    train(model, [optimizer], 3)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = Model()
    other.load_state_dict(weights)
    resumed = make(other)
    resumed.load_state_dict(state)
    assert state["param_groups"][0]["params"] == [0, 1] and len(state["state"]) == len(list(model.parameters()))
    assert len(resumed.state) == len(optimizer.state) == len(list(model.parameters()))
    schedulers = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: 0.5) for one in (optimizer, resumed)]
    train(model, [optimizer], 3, schedulers[:1])
    train(other, [resumed], 3, schedulers[1:])
    assert same(model, other)


def test_parameters_can_be_exchanged():  # as FSDP2 does, in the groups
    model, other = Model(), Model()
    optimizer = make(model)
    new = dict(zip(model.parameters(), other.parameters(), strict=True))
    for group in optimizer.param_groups:
        group["params"] = [new[parameter] for parameter in group["params"]]
    train(other, [optimizer], 1)
    assert not same(other, model) and same(model, Model())


def test_what_it_refuses():
    model = Model()
    with pytest.raises(ValueError, match="no matrix inside a layer is trained"):
        MuonBeside([], torch.optim.AdamW(model.parameters()), learning_rate=0.01, weight_decay=0)
    with pytest.raises(ValueError, match="closure"):
        make(model).step(lambda: 0)
