"""Problem (5): every solver against plain dense formulas in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.curvature.layout import WeightLayout
from espalier.select import chita, first_order_target, objective
from espalier.select.dual import DualState, refit
from espalier.select.exchange import ExchangeOptions, exchange
from espalier.select.iht import IHTOptions, iht
from espalier.select.linesearch import exact_line_search
from espalier.select.patterns import Quota, cardinality, n_of_m, per_layer
from espalier.select.problem import Problem

SOLVERS = ["exchange", "iht", "magnitude"]


def instance(n, p, seed, ridge=0.05, first_order=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n, p, generator=generator, dtype=torch.float64).to(dtype)
    w_bar = torch.randn(p, generator=generator, dtype=torch.float64).to(dtype)
    b = first_order_target(A, w_bar) if first_order else None
    return Problem.of(A, b, w_bar, ridge), b


def dense_refit(problem, support):
    """Normal equations on the support, in w (not δ)."""
    A, w_bar, rho = problem.A.double(), problem.w_bar.double(), problem.rho
    b = problem.residual + A @ w_bar
    S = support.nonzero().flatten()
    H = A[:, S].t() @ A[:, S] + rho * torch.eye(len(S)).double()
    w = torch.zeros_like(w_bar)
    w[S] = torch.linalg.solve(H, A[:, S].t() @ b + rho * w_bar[S])
    return w


def dense_objective(problem, w):
    A, w_bar = problem.A.double(), problem.w_bar.double()
    b = problem.residual + A @ w_bar
    return float(0.5 * (b - A @ w.double()).square().sum() + 0.5 * problem.rho * (w.double() - w_bar).square().sum())


def best_by_brute_force(problem, k):
    best = math.inf
    for S in itertools.combinations(range(problem.p), k):
        support = torch.zeros(problem.p, dtype=torch.bool)
        support[list(S)] = True
        best = min(best, dense_objective(problem, dense_refit(problem, support)))
    return best


def check(result, problem, b, k):
    assert result.support.dtype == torch.bool
    assert result.kept == k
    assert bool((result.weights[~result.support] == 0).all())
    again = objective(problem.A, b, problem.w_bar, result.weights, problem.ridge)
    assert result.objective == pytest.approx(again, rel=1e-9, abs=1e-12)
    assert list(result.history) == sorted(result.history, reverse=True)
    assert result.history[-1] == pytest.approx(result.objective, rel=1e-6, abs=1e-9)


@given(n=st.integers(1, 12), p=st.integers(1, 30), seed=st.integers(0, 99), order=st.booleans(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_solver_returns_a_valid_result(n, p, seed, order, data):
    k = data.draw(st.integers(1, p))
    problem, b = instance(n, p, seed, first_order=order)
    for solver in SOLVERS:
        result = chita(problem.A, b, problem.w_bar, k, problem.ridge, solver=solver)
        check(result, problem, b, k)
        expected = dense_refit(problem, result.support)
        torch.testing.assert_close(result.weights, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("n", [3, 30])
def test_refit_equals_normal_equations(n, order):
    problem, _ = instance(n, 12, 1, first_order=order)
    support = torch.arange(12) % 3 > 0
    torch.testing.assert_close(refit(problem, support), dense_refit(problem, support))
    state = DualState.of(problem, support)
    state.solve()
    assert state.objective == pytest.approx(dense_objective(problem, dense_refit(problem, support)))


def test_moving_a_dual_state_equals_building_it():
    problem, _ = instance(5, 12, 1, first_order=True)
    state = DualState.of(problem, torch.arange(12) < 6)
    state.add_drop(torch.tensor([7, 9]), torch.tensor([0, 3]))
    fresh = DualState.of(problem, state.support)
    torch.testing.assert_close(state.K, fresh.K)
    torch.testing.assert_close(state.t, fresh.t)
    assert state.support.nonzero().flatten().tolist() == [1, 2, 4, 5, 7, 9]


def test_gap_to_brute_force():
    gaps = {solver: [] for solver in SOLVERS}
    for seed in range(12):
        problem, b = instance(6, 12, seed, first_order=seed % 2 == 0)
        best = best_by_brute_force(problem, 5)
        for solver in SOLVERS:
            value = chita(problem.A, b, problem.w_bar, 5, problem.ridge, solver=solver).objective
            assert value >= best * (1 - 1e-9)
            gaps[solver].append(value / best - 1)
    mean = {solver: sum(gap) / len(gap) for solver, gap in gaps.items()}
    assert mean["exchange"] < 0.06, mean
    assert mean["exchange"] <= mean["iht"] <= mean["magnitude"], mean


@pytest.mark.slow
def test_gap_to_brute_force_of_eighteen_weights():
    problem, b = instance(8, 18, 3)
    best = best_by_brute_force(problem, 4)
    result = chita(problem.A, b, problem.w_bar, 4, problem.ridge)
    assert best * (1 - 1e-9) <= result.objective <= 1.02 * best


def test_exchange_ends_where_no_single_exchange_helps():
    for seed in range(8):
        problem, _ = instance(7, 16, seed)
        result = exchange(problem, cardinality(6, 16), ExchangeOptions(tolerance=0))
        assert result.info["local"] == 1
        for i in result.support.nonzero().flatten().tolist():
            for j in (~result.support).nonzero().flatten().tolist():
                support = result.support.clone()
                support[i], support[j] = False, True
                other = dense_objective(problem, dense_refit(problem, support))
                assert other >= result.objective * (1 - 1e-6)


def test_iht_never_increases_and_uses_proven_steps():
    for seed in range(10):
        problem, b = instance(10, 60, seed, first_order=seed % 2 == 1)
        for refit_too in (True, False):
            result = iht(problem, cardinality(15, 60), IHTOptions(refit=refit_too))
            assert list(result.history) == sorted(result.history, reverse=True)
            assert result.objective == pytest.approx(
                objective(problem.A, b, problem.w_bar, result.weights, problem.ridge)
            )
            assert result.info["exact_steps"] >= result.info["steps"] - 1 - result.info["steps"] // 2


def line(problem, w):
    delta = w - problem.w_bar
    misfit = problem.residual - problem.A @ delta
    g = problem.rho * delta - problem.A.t() @ misfit
    args = problem.A.t().contiguous().numpy(), misfit.numpy(), w.numpy(), g.numpy(), problem.w_bar.numpy()
    return g, args


@given(
    n=st.integers(1, 8),
    p=st.integers(2, 40),
    seed=st.integers(0, 999),
    cells=st.integers(1, 3),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_line_search_equals_a_dense_scan(n, p, seed, cells, data):
    problem, _ = instance(n, p, seed, ridge=0.1, first_order=data.draw(st.booleans()))
    cell = torch.arange(p) % min(cells, p)
    sizes = cell.bincount()
    quota = Quota(cell, torch.tensor([data.draw(st.integers(1, int(s))) for s in sizes]))
    start = torch.where(quota.project(torch.randn(p)), problem.w_bar, torch.zeros(()).double())
    g, args = line(problem, start)
    step = exact_line_search(*args, problem.rho, quota)

    def value(tau):
        moved = start - tau * g
        return dense_objective(problem, torch.where(quota.project(moved.abs()), moved, torch.zeros(()).double()))

    assert step.exact
    assert step.objective == pytest.approx(value(step.tau), rel=1e-6)
    far = 4 * max(step.tau, 1e-3)
    scan = min(value(tau) for tau in [0.0, *torch.linspace(0, far, 400).tolist(), *np.geomspace(1e-6, 1e3, 200)])
    assert step.objective <= scan * (1 + 1e-6)


def test_line_search_on_many_weights():
    problem, _ = instance(20, 4000, 0, ridge=1e-3)
    quota = cardinality(400, 4000)
    start = torch.where(quota.project(problem.w_bar.abs()), problem.w_bar, torch.zeros(()).double())
    g, args = line(problem, start)
    step = exact_line_search(*args, problem.rho, quota)
    assert step.exact
    for tau in np.geomspace(step.tau / 50, step.tau * 50, 200):
        moved = start - tau * g
        w = torch.where(quota.project(moved.abs()), moved, torch.zeros(()).double())
        assert step.objective <= dense_objective(problem, w) * (1 + 1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_patterns_hold(solver):
    layout = WeightLayout(("a", "b"), ((4, 8), (6, 3, 2, 2)))
    problem, b = instance(9, layout.numel, 0)
    for quota in (
        n_of_m(layout, 2, 4),
        n_of_m(layout, 4, 8),
        per_layer(layout, 0.3),
        per_layer(layout, {"a": 0.1, "b": 0.9}),
    ):
        result = chita(problem.A, b, problem.w_bar, quota, problem.ridge, solver=solver)
        check(result, problem, b, quota.kept)
        assert torch.bincount(quota.cell[result.support], minlength=len(quota.quota)).tolist() == quota.quota.tolist()
    masks = chita(problem.A, b, problem.w_bar, n_of_m(layout, 2, 4), problem.ridge, solver=solver).masks(layout)
    assert masks["a"].reshape(4, 2, 4).sum(-1).eq(2).all()
    assert masks["b"].sum(1).eq(2).all()


def test_quota_projection_is_the_best():
    torch.manual_seed(0)
    cell = torch.randint(3, (40,))
    quota = Quota(cell, torch.tensor([2, 0, 5]))
    score = torch.rand(40)
    keep = quota.project(score)
    for c, k in enumerate([2, 0, 5]):
        mine = score[(cell == c) & keep].sort().values
        torch.testing.assert_close(mine, score[cell == c].sort().values[len(score[cell == c]) - k :])


def test_float32_delta_form_keeps_digits():
    problem, _ = instance(40, 3000, 0, ridge=1e-6, first_order=True)
    single = chita(problem.A.float(), None, problem.w_bar.float(), 1500, 1e-6, solver="magnitude")
    double = chita(problem.A, None, problem.w_bar, 1500, 1e-6, solver="magnitude")
    assert single.objective == pytest.approx(double.objective, rel=1e-3)


@pytest.mark.parametrize("kind", ["numpy", "memmap", "bfloat16", "columns"])
def test_any_storage(kind, tmp_path):
    problem, _ = instance(6, 50, 0, dtype=torch.float32)
    A = problem.A
    plain = chita(A, None, problem.w_bar, 10, 0.1)
    if kind == "memmap":
        disk = np.memmap(tmp_path / "A", dtype=np.float32, mode="w+", shape=tuple(A.shape))
        disk[:] = A.numpy()
        A = disk
    else:
        A = {"numpy": A.numpy(), "bfloat16": A.bfloat16(), "columns": A.t().contiguous().t()}[kind]
    result = chita(A, None, problem.w_bar, 10, 0.1)
    assert result.objective == pytest.approx(plain.objective, rel=0.05 if kind == "bfloat16" else 1e-5)


class TestBadInput:
    A, w = torch.ones(2, 4), torch.ones(4)

    @pytest.mark.parametrize("k", [0, 5, -1])
    def test_k(self, k):
        with pytest.raises(ValueError, match=rf"k = {k} weights to keep"):
            chita(self.A, None, self.w, k, 0.1)

    @pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan")])
    def test_ridge(self, ridge):
        with pytest.raises(ValueError, match="singular without a positive"):
            chita(self.A, None, self.w, 2, ridge)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_not_finite(self, bad, dtype):
        A = self.A.to(dtype, copy=True)
        A[1, 2] = bad
        with pytest.raises(ValueError, match="A holds NaN or infinity in row 1"):
            chita(A, None, self.w, 2, 0.1)
        with pytest.raises(ValueError, match="w_bar holds NaN"):
            chita(self.A, None, self.w * bad, 2, 0.1)
        with pytest.raises(ValueError, match="b holds NaN"):
            chita(self.A, torch.tensor([0.0, bad]), self.w, 2, 0.1)

    def test_shapes(self):
        with pytest.raises(ValueError, match="at least one gradient"):
            chita(self.A[:0], None, self.w, 2, 0.1)
        with pytest.raises(ValueError, match="4 columns"):
            chita(self.A, None, self.w[1:], 2, 0.1)
        with pytest.raises(ValueError, match="2 rows"):
            chita(self.A, self.w, self.w, 2, 0.1)
        with pytest.raises(ValueError, match="floating"):
            chita(self.A.long(), None, self.w, 2, 0.1)
        with pytest.raises(ValueError, match="covers 3 weights"):
            chita(self.A, None, self.w, cardinality(2, 3), 0.1)

    def test_quota(self):
        with pytest.raises(ValueError, match="cell 1 has 1 weights"):
            Quota(torch.tensor([0, 0, 1]), torch.tensor([1, 2]))
        with pytest.raises(ValueError, match="at least one weight"):
            Quota(torch.tensor([0, 0]), torch.tensor([0]))
        with pytest.raises(ValueError, match="lie in 2 cells"):
            Quota(torch.tensor([0, 1]), torch.tensor([1]))
        with pytest.raises(ValueError, match="not a pattern"):
            n_of_m(WeightLayout(("a",), ((2, 4),)), 5, 4)
        with pytest.raises(ValueError, match="a: the fraction"):
            per_layer(WeightLayout(("a",), ((2, 4),)), 0.0)
