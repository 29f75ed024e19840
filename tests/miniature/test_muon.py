import pytest
import torch

from echo4o_hf.miniature.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_singular_values_come_near_one(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([0.01, 1.0, 100.0])[:, None, None]
    values = torch.linalg.svdvals(orthogonalised(matrices, 8))
    assert ((0.6 < values) & (values < 1.3)).all()


def test_an_update_is_as_large_as_upstreams():
    torch.manual_seed(0)
    start, gradient = torch.randn(8, 5), torch.randn(8, 5)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    ours.grad, theirs.grad = gradient.clone(), gradient.clone()
    Muon([ours], lr=0.1).step()
    torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=0)  # upstream rounds to bfloat16
