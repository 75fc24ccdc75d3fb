"""Large groups in single precision: sums, norms, τ and steps as exact as for small ones."""

import warnings

import pytest
import torch
from torch import nn

from espalier.sparsify import RMDA, ProxSGD, named_groups
from espalier.sparsify.prox import Runs

SHAPES = [(512, 512, 3, 3), (30522, 768)]  # a convolution, an embedding


class Weight(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.w = nn.Parameter(0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("length", [[2_359_296], [4096, 4097, 1, 20_000_000, 12_288], [3, 20_000_001, 1, 5000]])
def test_sums_of_long_runs(length):
    group = torch.arange(len(length)) % 3
    runs = Runs(torch.tensor(length), group, 3, sum(length))
    x = torch.randn(runs.total, generator=torch.Generator().manual_seed(1))
    norm, ones = runs.norm(x).double(), runs.sum(torch.ones(runs.total))
    parts = x.double().split(length)
    for k in range(3):
        mine = [part for part, g in zip(parts, group.tolist(), strict=True) if g == k]
        exact = sum(float(part.square().sum()) for part in mine) ** 0.5
        assert float(norm[k]) == pytest.approx(exact, rel=1e-6)
        assert float(ones[k]) == pytest.approx(sum(len(part) for part in mine), rel=1e-7)


def test_sums_of_many_short_runs():
    """Two groups that take turns: as many runs as elements."""
    runs = Runs.of(torch.arange(36_000_000) % 2, 2)
    assert runs.sum(torch.ones(runs.total)).tolist() == [18_000_000.0, 18_000_000.0]


@pytest.mark.parametrize("length", [[5, 4096, 7], [4097, 3], [10_000, 4096, 8192, 1]])
def test_cutting_runs_changes_no_sum(length):
    runs = Runs(torch.tensor(length), torch.arange(len(length)), len(length), sum(length))
    x = torch.randn(runs.total, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    exact = torch.stack([part.sum() for part in x.split(length)])
    torch.testing.assert_close(runs.sum(x), exact, rtol=1e-12, atol=1e-12)
    assert [len(x) for x in runs._pieces] == [sum(-(-n // 4096) for n in length)] * 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [ProxSGD, RMDA])
def test_a_step_of_a_large_group_shrinks_it_by_its_factor(shape, kind):
    model = Weight(shape)
    before = model.w.detach().double()
    mu = 0.985 * float(before.norm())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is not bound to be zeroed
        more = {"rho": 1.0} if kind is ProxSGD else {"momentum": 1.0}
        opt = kind(named_groups(model, {"w": ["w"]}), mu, lr=1.0, **more)
    model.w.grad = torch.zeros_like(model.w)
    opt.step()
    assert opt.zero_groups() == []
    factor = float(model.w.detach().double().norm() / before.norm())
    assert factor == pytest.approx(1 - mu / float(before.norm()), rel=1e-4)
    # an error of the norm is 66 times as large in the factor, 0.015


@pytest.mark.parametrize("shape", SHAPES)
def test_the_adaptive_tau_of_a_large_group(shape):
    model = Weight(shape)
    opt = ProxSGD(named_groups(model, {"w": ["w"]}), mu=0.0, lr=1.0, rho=1.0, tau="adaptive")
    g = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    model.w.grad, before = g, model.w.detach().double()
    opt.step()
    tau = float(g.double().abs().mean())  # of the first step
    moved = float((before - model.w.detach().double()).norm())
    assert moved == pytest.approx(float(g.double().norm()) / tau, rel=1e-5)


def test_gradients_go_through_cut_runs():
    runs = Runs(torch.tensor([9000, 5]), torch.tensor([0, 1]), 2, 9005)
    x = torch.randn(9005, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    runs.norm(x).sum().backward()
    y = x.detach().clone().requires_grad_()
    (y[:9000].norm() + y[9000:].norm()).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-14)
