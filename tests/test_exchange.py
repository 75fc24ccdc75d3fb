"""The default solver where it is hard: scales over many decades, tiny λ, float32; against plain enumeration."""

import itertools
import math

import numpy as np
import pytest
import torch

from espalier.select import cbs, chita, objective
from espalier.select import exchange as module
from espalier.select.dual import DualState
from espalier.select.exchange import ExchangeOptions, exchange
from espalier.select.patterns import Quota, cardinality
from espalier.select.problem import Problem


def scaled(seed, n, p, decades, ridge, dtype=torch.float64, common=0.0):
    """Gaussian columns over so many decades of scale in random order, perhaps with a common part."""
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(n, p, generator=g).double() + common * torch.randn(n, 1, generator=g).double()
    A = A * torch.logspace(decades / 3, -2 * decades / 3, p).double()[torch.randperm(p, generator=g)]
    return Problem.of(A.to(dtype), None, torch.randn(p, generator=g).to(dtype), ridge)


def value(problem, support):
    """The least Q on a support: least squares of stacked rows in float64, which never squares the condition."""
    A, w, rho = problem.A.double().numpy(), problem.w_bar.double().numpy(), problem.rho
    on, off = np.flatnonzero(support), np.flatnonzero(~np.asarray(support))
    M = np.concatenate([A[:, on], math.sqrt(rho) * np.eye(len(on))])
    t = np.concatenate([problem.residual.numpy() + A[:, off] @ w[off], np.zeros(len(on))])
    norms = np.linalg.norm(M, axis=0)
    d = np.linalg.lstsq(M / norms, t, rcond=None)[0] / norms
    return 0.5 * float(np.sum((M @ d - t) ** 2)) + 0.5 * rho * float(np.sum(w[off] ** 2))


def neighbours(support, cell=None):
    """All supports one exchange away, within the cells."""
    support = np.asarray(support)
    for i, j in itertools.product(np.flatnonzero(support), np.flatnonzero(~support)):
        if cell is None or cell[i] == cell[j]:
            other = support.copy()
            other[i], other[j] = False, True
            yield other


def brute_force(problem, k):
    best = math.inf
    for S in itertools.combinations(range(problem.p), k):
        support = np.zeros(problem.p, dtype=bool)
        support[list(S)] = True
        best = min(best, value(problem, support))
    return best


@pytest.mark.parametrize(
    ("decades", "ridge", "common"), [(0, 1e-2, 0), (6, 1e-8, 0), (0, 1e-4, 3), (4, 1e-5, 1)], ids=str
)
def test_few_weights_against_brute_force(decades, ridge, common):
    """Every single exchange is looked at; nineteen of twenty are within 1e-4 of the best of all supports."""
    close = 0
    for seed in range(20):
        g = np.random.default_rng(seed)
        p = int(g.integers(4, 11))
        n, k = int(g.integers(2, 16)), int(g.integers(1, p))
        problem = scaled(seed, n, p, decades, ridge, common=common)
        result = exchange(problem, cardinality(k, p))
        assert result.info["local"] == 1
        assert result.kept == k
        mine = value(problem, result.support)
        assert result.objective == pytest.approx(mine, rel=1e-5)
        assert list(result.history) == sorted(result.history, reverse=True)
        assert mine <= min((value(problem, other) for other in neighbours(result.support)), default=mine) * (1 + 1e-6)
        close += mine <= brute_force(problem, k) * (1 + 1e-4)
    assert close >= 19


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("decades", "ridge"), [(0, 1e-2), (2, 1e-4), (3, 1e-6)])
def test_local_is_true_of_the_dual_search(monkeypatch, decades, ridge, dtype):
    """Where the search by the n × n dual says that no exchange helps, none of all exchanges does."""
    monkeypatch.setattr(module, "SMALL", 0)
    proven = 0
    for seed in range(6):
        problem = scaled(seed, 12, 36, decades, ridge, dtype)
        cell = torch.arange(36) % (1 + seed % 2)
        quota = Quota(cell, torch.full((1 + seed % 2,), 9 // (1 + seed % 2)))
        result = exchange(problem, quota, ExchangeOptions(candidates=4, rounds=100, tolerance=0))
        if result.info["local"]:
            proven += 1
            mine = value(problem, result.support)
            best = min(value(problem, other) for other in neighbours(result.support, cell.numpy()))
            assert mine <= best * (1 + 2e-6)
    assert proven >= 5


def test_few_candidates_end_where_all_exchanges_say(monkeypatch):
    """With one candidate per side the end is checked against all pairs, and the search goes on where one helps."""
    monkeypatch.setattr(module, "SMALL", 0)
    for seed in range(4):
        problem = scaled(seed, 10, 30, 1, 1e-3)
        result = exchange(problem, cardinality(8, 30), ExchangeOptions(candidates=1, rounds=200, tolerance=0))
        assert result.info["local"] == 1
        monkeypatch.setattr(module, "MOST", 1)
        unknown = exchange(problem, cardinality(8, 30), ExchangeOptions(candidates=1, rounds=200, tolerance=0))
        assert unknown.info["local"] == 0
        monkeypatch.setattr(module, "MOST", 3000)


@pytest.mark.parametrize(("p", "n", "k"), [(200, 50, 20), (400, 60, 40)], ids=["all exchanges", "dual"])
def test_never_above_the_other_solvers_on_scaled_columns(p, n, k):
    for seed, (decades, ridge) in enumerate(itertools.product((2, 3, 4), (1e-3, 1e-5, 1e-7))):
        problem = scaled(seed, n, p, decades, ridge, torch.float32)
        A, w = problem.A, problem.w_bar
        ours = objective(A, None, w, chita(A, None, w, k, ridge).weights, ridge)
        for other in (cbs(A, w, k, ridge), chita(A, None, w, k, ridge, solver="iht")):
            assert ours <= objective(A, None, w, other.weights, ridge) * (1 + 1e-6)


def test_a_refit_in_float32_turns_to_float64_where_it_must():
    """λ far below the rounding of A_S A_Sᵀ in float32: K and t are made again, and Q keeps six digits."""
    problem = scaled(0, 40, 80, 3, 1e-9, torch.float32)
    support = torch.arange(80) % 4 == 0
    state = DualState.of(problem, support)
    state.solve()
    assert state.exact
    assert state.objective == pytest.approx(value(problem, support), rel=1e-4)
    plain = scaled(0, 40, 80, 0, 1e-2, torch.float32)
    state = DualState.of(plain, support)
    state.solve()
    assert not state.exact
    assert state.objective == pytest.approx(value(plain, support), rel=1e-5)


def test_no_support_is_below_the_bound_that_decides_on_other_starts():
    """(ρ/2)‖w̄ off the largest‖² is a lower bound of Q, so that nothing is missed where the start is close to it."""
    for seed in range(6):
        problem = scaled(seed, 6, 9, 2, 1e-1)
        off = problem.w_bar.abs().sort().values[:5].square().sum()
        assert 0.5 * problem.rho * float(off) <= brute_force(problem, 4)
