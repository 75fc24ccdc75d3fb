"""Gradient estimators against exact enumeration over all gates."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from espalier.errors import TrainingError
from espalier.sparsify import Gates, input_gates
from espalier.sparsify.estimators import draw, gradient
from espalier.sparsify.hard_concrete import HardConcrete
from espalier.sparsify.penalty import expected_l0, expected_l1, expected_l2
from espalier.sparsify.probability import HardSigmoid, Sigmoid, draw_phi
from espalier.sparsify.threshold import checked_threshold, histogram_threshold

V, DRAWS = 6, 400_000
FUNCTIONS = {
    "sigmoid": Sigmoid(1.0),
    "scaled": Sigmoid(7.0),
    "hard": HardSigmoid(2.0),
    "hard, k = 7": HardSigmoid(7.0),
}


def network() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)
    shapes = ((8, 3), (V, 3), (1, V), (8, 1))
    x, first, second, y = (torch.randn(s, generator=make, dtype=torch.float64) for s in shapes)
    return x, first, second, y


def loss(z: Tensor) -> Tensor:
    """Mean squared error of a small network whose V hidden units are gated: [..., V] → [...]."""
    x, first, second, y = network()
    hidden = torch.tanh(x @ first.T)  # [8, V]
    out = torch.einsum("nv,v,...v->...n", hidden, second[0], z)
    return (out - y[:, 0]).square().mean(-1)


def phi_for(g) -> Tensor:
    pi = torch.tensor([0.3, 0.45, 0.5, 0.6, 0.75, 0.9], dtype=torch.float64)
    return g.inverse(pi)


def exact(g, phi: Tensor) -> Tensor:
    """d/dφ of the expectation over all 2^V gates."""
    phi = phi.clone().requires_grad_()
    pi = g(phi)
    z = torch.tensor(list(itertools.product((0.0, 1.0), repeat=V)), dtype=torch.float64)
    weight = torch.where(z > 0, pi, 1 - pi).prod(-1)
    (gradient_,) = torch.autograd.grad((weight * loss(z)).sum(), phi)
    return gradient_


def samples(name: str, g, phi: Tensor, reference: bool = False, draws: int = DRAWS) -> tuple[Tensor, Tensor]:
    """Mean and standard error of single-draw estimates, and their variance."""
    u = torch.rand((draws, V), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z, partner = draw(phi, g, u)
    f, other = loss(z), loss(partner)
    from espalier.sparsify.estimators import ESTIMATORS

    slope = torch.full_like(phi, g.k) if reference else g.logit_slope(phi)
    each = ESTIMATORS[name](f, other, u, g(phi)) * slope
    mean = gradient(name, f, other, u, phi, g, reference)
    assert torch.allclose(mean, each.mean(0))
    return mean, each.var(0)


@pytest.mark.parametrize("g", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("name", ["ar", "arm", "disarm"])
def test_unbiased(name, g):
    phi = phi_for(g)
    mean, variance = samples(name, g, phi)
    error = (mean - exact(g, phi)) / (variance / DRAWS).sqrt()
    assert error.abs().max() < 4.5, error


@pytest.mark.parametrize("g", FUNCTIONS.values(), ids=FUNCTIONS)
def test_variance_falls(g):
    phi = phi_for(g)
    ar, arm, disarm = (samples(name, g, phi, draws=50_000)[1] for name in ("ar", "arm", "disarm"))
    assert arm.sum() < ar.sum()
    assert (disarm < arm).all()


def test_the_papers_factor_is_biased_for_a_hard_sigmoid():
    g = HardSigmoid(2.0)
    phi = phi_for(g)
    mean, variance = samples("arm", g, phi, reference=True)
    assert ((mean - exact(g, phi)) / (variance / DRAWS).sqrt()).abs().max() > 20
    same, _ = samples("arm", Sigmoid(7.0), phi_for(Sigmoid(7.0)), reference=True)
    assert torch.allclose(same, samples("arm", Sigmoid(7.0), phi_for(Sigmoid(7.0)))[0])


def test_hard_concrete_is_biased():
    """Its gradient is of a smoothed objective, not of the expectation over binary gates of the same
    openness.
    """
    gate = HardConcrete()
    pi = torch.tensor([0.3, 0.45, 0.5, 0.6, 0.75, 0.9], dtype=torch.float64)
    shift = float(torch.logit(gate.open_probability(torch.zeros(1, dtype=torch.float64))))
    log_alpha = (torch.logit(pi) - shift).requires_grad_()
    u = torch.rand((50_000, V), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    f = loss(gate.sample(log_alpha, u))
    (mean,) = torch.autograd.grad(f.mean(), log_alpha)
    blocks = [torch.autograd.grad(loss(gate.sample(log_alpha, p)).mean(), log_alpha)[0] for p in u.split(1000)]
    error = torch.stack(blocks).std(0) / len(blocks) ** 0.5
    true = exact(Sigmoid(1.0), torch.logit(pi))
    assert ((mean - true) / error).abs().max() > 20


def test_saturated_gates_get_no_gradient():
    g = HardSigmoid()
    phi = torch.tensor([-1.0, 0.1, 1.0], dtype=torch.float64)
    u = torch.rand((100, 3), dtype=torch.float64)
    z, partner = draw(phi, g, u)
    estimate = gradient("arm", z.sum(-1), partner.sum(-1), u, phi, g)
    assert estimate[0] == 0
    assert estimate[2] == 0
    assert torch.isfinite(estimate).all()


def test_one_draw_per_example_is_averaged():
    """A draw for each example, with each example's own loss: the mean over examples is unbiased for the mean
    loss.
    """
    g, phi = Sigmoid(7.0), phi_for(Sigmoid(7.0))
    u = torch.rand((DRAWS, V), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    z, partner = draw(phi, g, u)
    x, first, second, y = network()
    rows = torch.arange(DRAWS) % 8

    def own(gates: Tensor) -> Tensor:
        return ((torch.tanh(x @ first.T)[rows] * gates) @ second[0] - y[rows, 0]).square()

    estimate = gradient("arm", own(z), own(partner), u, phi, g)
    each = (own(partner) - own(z)).unsqueeze(-1) * (u - 0.5) * 7.0
    assert ((estimate - exact(g, phi)) / (each.var(0) / DRAWS).sqrt()).abs().max() < 4.5


def test_expected_norms_by_enumeration():
    pi = torch.tensor([0.2, 0.9, 0.5], dtype=torch.float64)
    theta = torch.tensor([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.1]], dtype=torch.float64)
    size = torch.tensor([2.0, 2.0, 2.0], dtype=torch.float64)
    l0 = l1 = l2 = 0.0
    for z in itertools.product((0.0, 1.0), repeat=3):
        gates = torch.tensor(z, dtype=torch.float64)
        weight = float(torch.where(gates > 0, pi, 1 - pi).prod())
        gated = theta * gates.unsqueeze(1)
        l0 += weight * float((gated != 0).sum())
        l1 += weight * float(gated.abs().sum())
        l2 += weight * float(gated.square().sum())
    assert float(expected_l0(pi, size)) == pytest.approx(l0)
    assert float(expected_l1(pi.unsqueeze(1), theta)) == pytest.approx(l1)
    assert float(expected_l2(pi.unsqueeze(1), theta)) == pytest.approx(l2)


def test_hard_concrete_open_probability_and_zero():
    gate, log_alpha = HardConcrete(), torch.tensor([-3.0, -1.0, 0.0, 2.0], dtype=torch.float64)
    u = torch.rand((200_000, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = (gate.sample(log_alpha, u) > 0).double().mean(0)
    assert torch.allclose(share, gate.open_probability(log_alpha), atol=5e-3)
    assert gate.expected(torch.tensor(-2.3979)).item() == 0.0
    assert gate.expected(torch.tensor(-2.3978)).item() > 0.0


@pytest.mark.parametrize("g", FUNCTIONS.values(), ids=FUNCTIONS)
def test_g_is_antithetic_and_inverse(g):
    phi = torch.linspace(-3, 3, 41, dtype=torch.float64)
    assert torch.allclose(g(-phi), 1 - g(phi), atol=1e-12)
    pi = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    assert torch.allclose(g(g.inverse(pi)), pi)
    inside = g.inverse(pi).requires_grad_()
    (slope,) = torch.autograd.grad(g(inside).sum(), inside)
    assert torch.allclose(slope / (pi * (1 - pi)), g.logit_slope(inside.detach()))


def test_initial_probabilities():
    g = Sigmoid(7.0)
    pi = g(draw_phi(g, torch.full((5000,), 0.8), torch.Generator().manual_seed(0)))
    assert pi.mean().item() == pytest.approx(0.8, abs=1e-3)
    assert pi.std().item() == pytest.approx(0.01 * 0.16, rel=0.1)


def test_threshold_splits_the_two_spikes():
    low, high = torch.rand(300) * 0.2, 0.7 + 0.3 * torch.rand(100)
    assert 0.19 < histogram_threshold(torch.cat([low, high])) < 0.71
    assert histogram_threshold(torch.full((5,), 0.3)) == 0.5


def test_cut_at_any_threshold():
    for value in (0, 0.0, 0.5, 0.999, "histogram"):
        assert checked_threshold(value) == value


@pytest.mark.parametrize("make", [Sigmoid, HardSigmoid])
@pytest.mark.parametrize("k", [0.0, -1.0, float("nan"), float("inf")])
def test_a_slope_is_positive(make, k):
    with pytest.raises(TrainingError, match="k, the slope of g, is above 0"):
        make(k)


@pytest.mark.parametrize("initial", [0.3, 0.5, 0.8])
def test_how_open_hard_concrete_gates_start(initial):
    """``initial`` is σ(log α), as the authors draw it; gates are open more often, as the docstring's formula says."""
    gate, log_alpha = HardConcrete(), torch.logit(torch.tensor(initial, dtype=torch.float64))
    u = torch.rand(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    open_share = (gate.sample(log_alpha, u) > 0).double().mean()
    formula = torch.sigmoid(log_alpha - gate.beta * math.log(-gate.gamma / gate.zeta))
    assert open_share.item() == pytest.approx(formula.item(), abs=3e-3)
    model = nn.Sequential(nn.Linear(4, 3000), nn.ReLU(), nn.Linear(3000, 2))
    gates = Gates(model, [input_gates(model, "2", producer="0")], estimator="hc", initial=initial)
    assert gates.phi.sigmoid().mean().item() == pytest.approx(initial, abs=1e-3)
    assert gates.probabilities().mean().item() == pytest.approx(formula.item(), abs=1e-3)


def test_norms_of_hard_concrete_gates_are_bounds():
    """L0 is exact; L1 and L2 with P(z != 0) lie above the expectations over the gates' own values."""
    gate, log_alpha = HardConcrete(), torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0], dtype=torch.float64)
    theta = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0], dtype=torch.float64)
    u = torch.rand((200_000, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gated, pi = gate.sample(log_alpha, u) * theta, gate.open_probability(log_alpha)
    assert float(expected_l0(pi)) == pytest.approx(float((gated != 0).sum(-1).double().mean()), abs=0.01)
    assert float(expected_l1(pi, theta)) > float(gated.abs().sum(-1).mean()) + 0.3
    assert float(expected_l2(pi, theta)) > float(gated.square().sum(-1).mean()) + 0.3
