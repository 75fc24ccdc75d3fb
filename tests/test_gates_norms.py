"""Expected norms of layers with gates on one side or on both (Eqs. 15 to 18), against all values of the gates."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from espalier.sparsify import Gates, input_gates, output_gates


def dense() -> tuple[nn.Module, list, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    sites = [
        input_gates(model, "2", producer="0", name="in"),
        output_gates(model, "2", consumers=["4"], name="out"),
        input_gates(model, "4", producer="2", name="last"),
    ]
    return model, sites, {"2.weight": model[2].weight, "4.weight": model[4].weight}


def convolutions() -> tuple[nn.Module, list, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 2)).double()
    sites = [
        input_gates(model, "2", producer="0", name="in"),
        output_gates(model, "2", name="out"),
        output_gates(model, "0", consumers=["2"], name="last"),
    ]
    return model, sites, {"2.weight": model[2].weight, "0.weight": model[0].weight}


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("make", [dense, convolutions])
def test_expected_norms_are_those_of_all_draws(make, order):
    model, sites, weights = make()
    gates = Gates(model, sites, initial={"in": 0.3, "out": 0.6, "last": 0.8}).double()
    pi, wanted = gates.probabilities().detach(), 0.0
    first, second = weights.values()
    for bits in itertools.product([0.0, 1.0], repeat=len(pi)):
        z = torch.tensor(bits, dtype=torch.float64)
        inside, out, last = z.split(gates.counts)
        shape = [-1, *[1] * (first.ndim - 1)]
        one = first * inside.view(1, -1, *shape[2:]) * out.view(shape)
        two = second * (last.view(1, -1) if make is dense else last.view(shape))
        norm = sum(t.abs().pow(order).sum() for t in (one, two))
        wanted = wanted + torch.where(z > 0, pi, 1 - pi).prod() * norm
    torch.testing.assert_close(gates.expected_norm(pi, order), wanted.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("make", [dense, convolutions])
@pytest.mark.parametrize("l1", [0.0, 0.2])
def test_the_penaltys_gradient_is_autograds(make, l1):
    """The fast one, added to gradients that are there already, times a loss's scale."""
    model, sites, _ = make()
    gates = Gates(model, sites, lam=0.1, weight_decay=0.7, l1=l1, initial={"in": 0.3, "out": 0.6, "last": 0.8}).double()
    own = list(model.parameters())
    true = torch.autograd.grad(gates.penalty(), [gates.phi, *own], materialize_grads=True)
    there = [torch.randn_like(p) for p in own]
    for p, grad in zip(own, there, strict=True):
        p.grad = grad.clone()
    of_pi = gates._shrink(gates.probabilities().detach(), torch.tensor(4.0, dtype=torch.float64))
    (of_phi,) = torch.autograd.grad(gates.probabilities(), gates.phi, of_pi)
    torch.testing.assert_close(of_phi, true[0], rtol=1e-6, atol=0)
    for p, grad, wanted in zip(own, there, true[1:], strict=True):
        torch.testing.assert_close(p.grad, grad + 4 * wanted, rtol=1e-6, atol=1e-9)
