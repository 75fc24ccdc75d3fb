"""L1 penalties and boxes in ProxSGD, RMDA and RAMDA: each step against a loop over groups with a scalar root finder."""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from test_proxsgd import backward, net, perceptron, train
from torch import nn

from espalier.sparsify import RAMDA, RMDA, ProxSGD, layer_groups, named_groups

pytestmark = pytest.mark.filterwarnings("ignore:.*bound to be zeroed")
BOXES = [(None, None), (0.0, None), (-0.05, 0.08), (0.0, 0.1), (None, 0.03)]


def limit(b, tau, sparsity, low, high):
    """A group is zero where the norm of this is at most its weight: the pull on what may move off zero."""
    pull = np.sign(b) * np.maximum(np.abs(tau * b) - sparsity, 0.0)
    return np.clip(pull, 0.0 if low == 0 else -np.inf, 0.0 if high == 0 else np.inf)


def minimiser(b, tau, mu, sparsity, low, high):
    """Of μ |w| + sparsity |w|₁ + Σ τ_j/2 (w_j - b_j)² in the box, for one group: the norm by Brent's method."""
    if mu > 0 and np.linalg.norm(limit(b, tau, sparsity, low, high)) <= mu:
        return 0.0 * b
    low, high = -np.inf if low is None else low, np.inf if high is None else high
    b = np.sign(b) * np.maximum(np.abs(b) - sparsity / tau, 0.0)

    def at(theta):
        return np.clip(b * theta / (theta + mu / tau), low, high)

    widest = np.clip(b, low, high)
    most = np.linalg.norm(widest)
    if mu == 0 or np.linalg.norm(at(most)) >= most:
        return widest if mu == 0 else at(most)
    return at(brentq(lambda x: np.linalg.norm(at(x)) / x - 1.0, 1e-13 * most, most, xtol=1e-300, rtol=1e-14))


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("sparsity", [0.0, 0.01])
@pytest.mark.parametrize("kind", [ProxSGD, RMDA, RAMDA])
def test_a_step_equals_the_loop_over_groups(kind, sparsity, box):
    model = net()
    opt = kind(layer_groups(model, ["0", "3"]), mu=0.0, lr=0.1, sparsity=sparsity, low=box[0], high=box[1])
    opt.param_groups[0]["rho" if kind is ProxSGD else "c"] = 1.0
    backward(model)
    before = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
    g = torch.cat([p.grad.flatten() for p in model.parameters()]).numpy()
    strength, v = (1.0, g) if kind is ProxSGD else (0.1, 0.1 * g)  # α_1 = s_1 = lr √1
    tau = np.cbrt(0.1 * g**2) + 1e-6 if kind is RAMDA else np.ones_like(g)
    b, owner, count = before - v / tau, opt.runs.owner.numpy(), len(opt.grouping)
    pulls = [np.linalg.norm(limit(b, tau, strength * sparsity, *box)[owner == k]) for k in range(count)]
    opt.mu = float(np.median(pulls)) / strength * 1.001
    opt.step()
    expected, zero = before.copy(), []
    for k in range(opt.runs.count):
        own = owner == k
        hat = minimiser(b[own], tau[own], opt.mu * strength if k < count else 0.0, strength * sparsity, *box)
        expected[own] = before[own] + 0.1 * (hat - before[own]) if kind is ProxSGD else hat
        if k < count and not hat.any():
            zero.append(opt.grouping.names[k])
    after = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
    np.testing.assert_allclose(after, expected, rtol=1e-9, atol=1e-12)
    assert opt.zero_groups() == zero
    assert 0 < len(zero) < count


@pytest.mark.parametrize("tau", [1.0, "adaptive"])
@pytest.mark.parametrize("kind", [ProxSGD, RMDA, RAMDA])
def test_a_box_for_some_parameters_leaves_the_others_alone(kind, tau):
    def stepped(boxed):
        model = net()
        params = [{"params": list(model[at].parameters())} for at in (0, 1, 3, 5)]
        for at in boxed:
            params[at] |= {"low": -0.05, "high": 0.08}
        more = {"tau": tau} if kind is ProxSGD else {}
        opt = kind(layer_groups(model, ["0", "3"]), mu=0.01, lr=0.1, params=params, **more)
        for _ in range(2):
            for k, p in enumerate(model.parameters()):
                p.grad = torch.sin(torch.arange(p.numel(), dtype=p.dtype) + k).view(p.shape)
            opt.step()
        return [torch.cat([p.detach().flatten() for p in group["params"]]) for group in opt.param_groups]

    nowhere, everywhere, some = stepped([]), stepped([0, 1, 2, 3]), stepped([0, 3])
    for at, expected in enumerate((everywhere, nowhere, nowhere, everywhere)):
        torch.testing.assert_close(some[at], expected[at], rtol=1e-10, atol=1e-13)
    assert not torch.allclose(nowhere[0], everywhere[0])


class Mixture(nn.Module):
    """Operations weighted by scalars, as GSparsity has them for operations without parameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.scalars = nn.ParameterList([nn.Parameter(torch.tensor(0.5)) for _ in range(4)])
        self.last = nn.Linear(6, 1)

    def forward(self, x):
        kinds = (x, x.relu(), 0.0 * x, -x)
        return self.last(sum(s * k for s, k in zip(self.scalars, kinds, strict=True)))


@pytest.mark.parametrize("kind", [ProxSGD, RMDA, RAMDA])
def test_scalars_stay_between_0_and_1(kind):
    model = Mixture().double()
    groups = named_groups(model, {f"scalar {i}": [f"scalars.{i}"] for i in range(4)})
    params = [{"params": model.scalars.parameters(), "low": 0.0, "high": 1.0}, {"params": model.last.parameters()}]
    opt = kind(groups, mu=0.02, lr=0.2, params=params)
    train(model, opt, 200)
    scalars = torch.stack([s.detach() for s in model.scalars])
    assert (scalars >= 0).all()
    assert (scalars <= 1).all()
    assert "scalar 0" not in opt.zero_groups()
    assert "scalar 2" in opt.zero_groups()  # what adds nothing
    assert bool((model.last.weight.detach() > 1.0).any()) or bool((model.last.weight.detach() < 0.0).any())


def test_a_box_without_a_group_penalty_clips():
    model = perceptron()
    opt = ProxSGD(layer_groups(model, ["0"]), mu=0.0, lr=1.0, rho=1.0, low=-0.1, high=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, opt, 1)
    for p, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), (was - p.grad).clamp(-0.1, 0.1))


def test_penalties_of_their_own_for_groups_of_parameters():
    model = perceptron()
    params = [{"params": model[0].parameters(), "sparsity": 0.05}, {"params": model[2].parameters()}]
    opt = ProxSGD(layer_groups(model, ["0"]), mu=0.0, lr=1.0, rho=1.0, params=params)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, opt, 1)
    for p, was, weight in zip(model.parameters(), before, (0.05, 0.05, 0.0, 0.0), strict=True):
        torch.testing.assert_close(p.detach(), nn.functional.softshrink(was - p.grad, weight))
    penalty = 0.05 * sum(p.detach().abs().sum() for p in model[0].parameters())
    torch.testing.assert_close(opt.objective(), penalty)
