"""Proximal maps against a numerical minimiser, by perturbation, and against the loop over groups."""

import doctest
import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from espalier.sparsify.prox import (
    Runs,
    box,
    combined,
    group_l21,
    group_l21_in_box,
    group_l21_per_element,
    l1,
    nonnegative,
    shrink_factor,
)

OWNER = torch.tensor([0, 0, 0, 1, 1, 0, 2, 2, 2, 2])
RUNS = Runs.of(OWNER, 3)
FILES = (
    "prox",
    "probability",
    "estimators",
    "hard_concrete",
    "threshold",
    "schedule",
    "grouping",
    "sites",
    "gates",
)
MORE = ("sliced", "proxsgd", "rmda", "bisect", "penalised", "reading", "refusals")
REST = ["models.lenet5", "models.mlp_l0", "experiments.gsparsity"]


@pytest.mark.parametrize("name", [f"sparsify.{name}" for name in FILES + MORE] + REST)
def test_examples_of_the_docstrings(name):
    torch.manual_seed(0)
    assert doctest.testmod(importlib.import_module(f"espalier.{name}")).failed == 0


@pytest.fixture
def b():
    return torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 2


def objective(w, b, mu, tau, sparsity=0.0):
    """r(w) + τ/2 |w - b|², group by group."""
    total = sparsity * w.abs().sum()
    for k in range(3):
        own = k == OWNER
        total = total + float(mu[k]) * w[own].norm() + 0.5 * float(tau[k]) * (w[own] - b[own]).square().sum()
    return total


MU, TAU = (
    torch.tensor([0.7, 2.9, 1.3], dtype=torch.float64),
    torch.tensor([0.8, 1.5, 1.0], dtype=torch.float64),
)
EACH = torch.tensor([0.3, 2.0, 1.0, 0.5, 5.0, 0.02, 1.5, 0.7, 3.0, 0.1], dtype=torch.float64)
CASES = {
    "l1": (lambda b: l1(b, 0.6, TAU[OWNER]), {"mu": 0 * MU, "sparsity": 0.6}, (None, None)),
    "group": (lambda b: group_l21(b, RUNS, MU, TAU), {"mu": MU}, (None, None)),
    "nonnegative": (nonnegative, {"mu": 0 * MU}, (0.0, None)),
    "box": (lambda b: box(b, -0.5, 0.3), {"mu": 0 * MU}, (-0.5, 0.3)),
    "group, nonnegative": (lambda b: combined(b, RUNS, MU, TAU, low=0.0), {"mu": MU}, (0.0, None)),
    "group, nonpositive": (lambda b: combined(b, RUNS, MU, TAU, high=0.0), {"mu": MU}, (None, 0.0)),
    "group, l1": (lambda b: combined(b, RUNS, MU, TAU, 0.4), {"mu": MU, "sparsity": 0.4}, (None, None)),
    "all": (lambda b: combined(b, RUNS, MU, TAU, 0.4, low=0.0), {"mu": MU, "sparsity": 0.4}, (0.0, None)),
    "l1, box": (
        lambda b: combined(b, RUNS, 0.0, TAU, 0.4, low=-0.2, high=0.6),
        {"mu": 0 * MU, "sparsity": 0.4},
        (-0.2, 0.6),
    ),
    "group, box": (lambda b: combined(b, RUNS, MU, TAU, low=-0.5, high=0.3), {"mu": MU}, (-0.5, 0.3)),
    "group, wide box": (lambda b: combined(b, RUNS, MU, TAU, low=-1.5, high=2.0), {"mu": MU}, (-1.5, 2.0)),
    "group, from 0 to 1": (lambda b: combined(b, RUNS, MU, TAU, low=0.0, high=1.0), {"mu": MU}, (0.0, 1.0)),
    "group, at most": (lambda b: combined(b, RUNS, MU, TAU, high=0.4), {"mu": MU}, (None, 0.4)),
    "group, box without 0": (lambda b: combined(b, RUNS, MU, TAU, low=0.1, high=1.0), {"mu": MU}, (0.1, 1.0)),
    "group, l1, box": (
        lambda b: combined(b, RUNS, MU, TAU, 0.4, low=-0.5, high=1.2),
        {"mu": MU, "sparsity": 0.4},
        (-0.5, 1.2),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_no_perturbation_is_better(name, b):
    map_, penalty, (low, high) = CASES[name]
    w = map_(b)
    assert torch.equal(w, box(w, low, high) if (low, high) != (None, None) else w)
    best = objective(w, b, tau=TAU, **penalty)
    draw = torch.Generator().manual_seed(0)
    for scale in (1e-4, 1e-2, 0.1, 1.0):
        for _ in range(60):
            other = w + scale * torch.randn(10, dtype=torch.float64, generator=draw)
            other = box(other, low, high) if (low, high) != (None, None) else other
            assert objective(other, b, tau=TAU, **penalty) >= best - 1e-12


@pytest.mark.parametrize("name", CASES)
def test_equals_a_numerical_minimiser(name, b):
    map_, penalty, (low, high) = CASES[name]
    bounds = None if (low, high) == (None, None) else [(low, high)] * 10

    def value(w):
        return float(objective(torch.from_numpy(w), b, tau=TAU, **penalty))

    start = box(b + 1e-3, low, high).numpy() if bounds else (b + 1e-3).numpy()
    options = {"xtol": 1e-9, "ftol": 1e-14, "maxiter": 100_000}
    found = minimize(value, start, method="Powell", bounds=bounds, options=options)
    closed = map_(b)
    assert value(closed.numpy()) <= found.fun + 1e-9
    np.testing.assert_allclose(closed.numpy(), found.x, atol=2e-4)


def test_published_closed_form_is_no_minimiser(b):
    """Eq. (1b) as printed, with an exponent of -1 and without the bound at zero."""
    norm = RUNS.norm(b)
    printed = b * RUNS.spread(1.0 / (1.0 - MU / (TAU * norm)))
    assert objective(printed, b, MU, TAU) > objective(group_l21(b, RUNS, MU, TAU), b, MU, TAU) + 1e-3


@settings(max_examples=60, deadline=None)
@given(
    owner=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    mu=st.floats(0, 5),
    seed=st.integers(0, 1000),
)
def test_vectorised_equals_the_loop(owner, mu, seed):
    owner = torch.tensor(owner)
    b = torch.randn(len(owner), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    runs, expected = Runs.of(owner, 5), b.clone()
    for k in range(5):
        norm = b[owner == k].norm()
        expected[owner == k] *= max(0.0, 1.0 - mu / float(norm)) if norm > 0 else 1.0
    assert torch.allclose(group_l21(b, runs, mu), expected, atol=1e-12)
    assert torch.allclose(runs.sum(b), torch.stack([b[owner == k].sum() for k in range(5)]), atol=1e-12)
    assert torch.equal(runs.spread(torch.arange(5)), owner)


def test_zero_stays_zero_and_no_penalty_changes_nothing(b):
    assert torch.equal(group_l21(torch.zeros(10), RUNS, 1.0), torch.zeros(10))
    assert torch.equal(group_l21(b, RUNS, 0.0), b)
    assert shrink_factor(torch.zeros(1), 0.0).item() == 1.0
    assert shrink_factor(torch.zeros(1), 1e-9).item() == 0.0


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    strength=st.floats(-2, 2),
    spread=st.floats(0, 2),
    sides=st.sampled_from([(-0.5, 0.3), (0.0, 1.0), (-1.0, 0.0), (None, 0.4), (-2.0, None), (0.1, 0.5), (None, None)]),
)
def test_a_group_norm_in_a_box_meets_its_optimality_conditions(seed, strength, spread, sides):
    """Element by element: the minimiser, given the group's norm, of what is then a parabola, put into the box."""
    make, (low, high) = torch.Generator().manual_seed(seed), sides
    owner = torch.randint(6, (60,), generator=make)
    runs = Runs.of(owner, 6)
    b = torch.randn(60, dtype=torch.float64, generator=make) * 10 ** torch.randn(60, generator=make).double()
    tau = 10 ** (spread * torch.randn(60, dtype=torch.float64, generator=make))
    mu = 10**strength * torch.rand(6, dtype=torch.float64, generator=make)
    mu[0] = 0.0
    w, norms = group_l21_in_box(b, runs, mu, tau, low, high)
    least, most = -np.inf if low is None else low, np.inf if high is None else high
    for k in range(6):
        own, ours = owner == k, w[owner == k]
        moves = b[own].clamp(-np.inf if least < 0 else least, np.inf if most > 0 else most)
        if k and least <= 0.0 and (tau[own] * moves).norm() <= mu[k]:
            assert not ours.any()
            assert norms[k] == 0
            continue
        theta = ours.norm()
        free = b[own] if k == 0 else b[own] * theta / (theta + mu[k] / tau[own])
        torch.testing.assert_close(ours, free.clamp(least, most), rtol=1e-9, atol=1e-12)
        if k:
            torch.testing.assert_close(norms[k], theta, rtol=1e-9, atol=1e-12)


def test_a_box_that_binds_nowhere_changes_nothing(b):
    near, far = group_l21(b, RUNS, MU, TAU), combined(b, RUNS, MU, TAU, low=-100.0, high=100.0)
    torch.testing.assert_close(far, near, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda b: combined(b, RUNS, -1.0),
        lambda b: combined(b, RUNS, torch.tensor([-1.0, 1.0, 1.0])),
        lambda b: combined(b, RUNS, float("nan")),
        lambda b: combined(b, RUNS, 1.0, sparsity=-0.3),
        lambda b: combined(b, RUNS, 1.0, tau=0.0),
        lambda b: combined(b, RUNS, 1.0, tau=torch.tensor([1.0, -1.0, 1.0])),
        lambda b: combined(b, RUNS, 1.0, low=1.0, high=-1.0),
        lambda b: combined(b, RUNS, 0.0, low=1.0, high=-1.0),
        lambda b: box(b, 1.0, -1.0),
        lambda b: l1(b, -1.0),
        lambda b: l1(b, 1.0, float("nan")),
        lambda b: group_l21(b, RUNS, -1.0),
        lambda b: group_l21(b, RUNS, 1.0, -1.0),
    ],
)
def test_wrong_weights_are_refused(b, wrong):
    with pytest.raises(ValueError, match=r"at least 0|positive|at most high"):
        wrong(b)


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0, 2.5, 20.0])
@pytest.mark.parametrize("spread", [1.0, 100.0, 1e4])
def test_a_tau_per_element(b, mu, spread):
    """Against the optimality conditions of a diagonal metric, from mild to badly scaled, and by perturbation."""
    tau, weight = EACH ** (np.log10(spread) + 1), mu * MU
    w, norms = group_l21_per_element(b, RUNS, weight, tau)
    zero = norms == 0
    for start in (norms * 1.1, norms * 0.5 + 0.1, torch.full_like(norms, 50.0)):
        again, same = group_l21_per_element(b, RUNS, weight, tau, start)
        torch.testing.assert_close(again, w, rtol=1e-9, atol=1e-12)
        assert torch.equal(same == 0, zero)
    if mu:
        torch.testing.assert_close(norms, RUNS.norm(w), rtol=1e-9, atol=1e-12)
    pull = tau * (b - w)
    for k in range(3):
        own = k == OWNER
        if bool(zero[k]):
            assert not w[own].any()
            assert (tau * b)[own].norm() <= weight[k]
        else:
            assert weight[k] == 0 or w[own].norm() > 0
            direction = w[own] / w[own].norm() if mu else torch.zeros_like(w[own])
            torch.testing.assert_close(pull[own], weight[k] * direction, rtol=1e-8, atol=1e-10)

    def value(w):
        return float((weight * RUNS.norm(w)).sum() + 0.5 * (tau * (w - b).square()).sum())

    draw = torch.Generator().manual_seed(0)
    for scale in (1e-4, 1e-2, 1.0):
        for _ in range(30):
            other = w + scale * torch.randn(10, dtype=torch.float64, generator=draw)
            assert value(other) >= value(w) - 1e-12


def test_a_tau_per_element_equals_the_closed_form_where_there_is_one(b):
    w, norms = group_l21_per_element(b, RUNS, MU, RUNS.spread(TAU))
    torch.testing.assert_close(w, group_l21(b, RUNS, MU, TAU), rtol=1e-9, atol=1e-12)
    assert torch.equal(norms == 0, shrink_factor(RUNS.norm(b), MU, TAU) == 0)
