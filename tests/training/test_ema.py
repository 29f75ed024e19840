"""The moving average of the trained weights."""

import pytest
import torch
from torch import nn

from echo4o_hf.training.ema import WeightAverage


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4)).to(dtype)
    model[0].requires_grad_(False)
    return model


def change(model, step):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)))


def test_the_average_is_exponential_with_a_quick_start():
    model = make_model()
    average = WeightAverage(model, decay=0.5)
    assert set(average.parameters) == {"1.weight", "1.bias"}
    expected = model[1].weight.detach().clone()
    for step in range(1, 20):
        change(model, step)
        average.update()
        decay = 0 if step == 1 else min(0.5, step / (9 + step))
        expected = decay * expected + (1 - decay) * model[1].weight.detach()
    torch.testing.assert_close(average.shadow_params[0], expected, atol=1e-6, rtol=0)


def test_bfloat16_weights_are_averaged_in_float32():
    model = make_model(torch.bfloat16)
    average = WeightAverage(model, decay=0.9999)
    average.optimization_step = 10**6
    with torch.no_grad():
        model[1].weight.fill_(1.0)
        average.shadow_params[0].fill_(0.5)
    for _ in range(10):
        average.update()
    torch.testing.assert_close(average.shadow_params[0], torch.full((4, 2), 1 - 0.5 * 0.9999**10))


def test_the_weights_are_back_afterwards():
    model = make_model()
    average = WeightAverage(model, decay=0.9)
    own, frozen = model[1].weight.detach().clone(), model[0].weight.detach().clone()
    average.shadow_params[0].fill_(7)
    with pytest.raises(KeyboardInterrupt), average.applied():
        assert (model[1].weight == 7).all() and torch.equal(model[0].weight, frozen)
        raise KeyboardInterrupt
    assert torch.equal(model[1].weight, own)


def test_a_saved_average_goes_on_bit_for_bit(tmp_path):
    model = make_model()
    average = WeightAverage(model, decay=0.9)
    for step in range(5):
        change(model, step)
        average.update()
    average.save(tmp_path / "average.safetensors", may_write=False)
    assert not (tmp_path / "average.safetensors").exists()
    average.save(tmp_path / "average.safetensors", may_write=True)
    other = WeightAverage(model, decay=0.9)
    other.load(tmp_path / "average.safetensors")
    for one in (average, other):
        change(model, 5)
        one.update()
    assert all(map(torch.equal, average.shadow_params, other.shadow_params))


def test_an_average_of_other_parameters_is_refused(tmp_path):
    model = make_model()
    WeightAverage(model, decay=0.9).save(tmp_path / "average.safetensors", may_write=True)
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match="other parameters than those trained: 0.bias, 0.weight"):
        WeightAverage(model, decay=0.9).load(tmp_path / "average.safetensors")
