"""i-SpaSP, its five-step variant and greedy forward selection: oracles, rates, bounds and agreement of
forms."""

import math

import pytest
import torch

from espalier.experiments.ispasp import POWERS, compressible, finite_tail, slope, synthetic_problem
from espalier.select import auxiliary as five
from espalier.select.auxiliary import (
    PAPER,
    AuxiliaryOptions,
    BatchedReconstruction,
    auxiliary,
    auxiliary_layers,
)
from espalier.select.gfs import gfs
from espalier.select.ispasp import ispasp, ispasp_from_data, residual_bound
from espalier.select.refit import Reconstruction, reconstruction, refit

SOLVERS = ["gradient", "pcg", "exact"]


def data(units: int = 30, samples: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(units, units, generator=g, dtype=torch.float64)
    hidden = (mix @ torch.randn(units, samples, generator=g, dtype=torch.float64)).relu()
    return torch.randn(5, units, generator=g, dtype=torch.float64), hidden


def problem(block: int = 1, **kwargs) -> Reconstruction:
    weight, hidden = data(**kwargs)
    return reconstruction(weight, hidden @ hidden.T, mean=hidden.mean(1), block=block)


def data_error(weight, hidden, selection) -> float:
    return float((selection.weights @ hidden[selection.support] - weight @ hidden).square().sum())


# ---------------------------------------------------------------- i-SpaSP


@pytest.mark.parametrize("size", [1, 5, 12, 30])
def test_moment_form_equals_data_form(size):
    weight, hidden = data()
    found = ispasp(problem(), size)
    assert found.support.tolist() == ispasp_from_data(weight, lambda: hidden.split(64, 1), size).tolist()
    assert found.error == pytest.approx(data_error(weight, hidden, found), rel=1e-9, abs=1e-12)
    assert torch.equal(found.weights, weight[:, found.support])


def test_one_iteration_by_hand():
    # h = (3, 2, 1), W1 = (1, 2, 5): y = W1ᵀ Σ W1 h = 12·(1, 2, 5); top-2 = {1, 2}; of these h is largest at 1
    hidden = torch.tensor([[3.0], [2.0], [1.0]])
    found = ispasp(
        reconstruction(torch.tensor([[1.0, 2.0, 5.0]]), hidden @ hidden.T, mean=hidden[:, 0]), 1, iterations=1
    )
    assert found.support.tolist() == [1]


@pytest.mark.parametrize("importance", ["sum", "absolute", "norm"])
@pytest.mark.parametrize("block", [1, 3])
def test_every_importance_and_block(importance, block):
    p = problem(block)
    found = ispasp(p, 5, importance=importance)
    again = ispasp(p, 5, importance=importance, refitted=True)
    assert found.support.tolist() == again.support.tolist()
    assert found.weights.shape == (5, 5 * block)
    assert again.error <= found.error


def test_sums_need_means():
    weight, hidden = data()
    with pytest.raises(ValueError, match="mean"):
        ispasp(reconstruction(weight, hidden @ hidden.T), 3)


@pytest.mark.parametrize("d", [100, 200])
@pytest.mark.parametrize("p", POWERS)
def test_residual_decays_as_the_tail_and_stays_below_the_bound(d, p):
    sizes = sorted({round(4 * 1.25**k) for k in range(12 if d == 100 else 15)} & set(range(4, d // 4 + 1)))
    tail = finite_tail(d, p)
    expected = slope(sizes, [tail[s - 1] for s in sizes], 4, d // 4)
    for seed in range(2):
        task = synthetic_problem(d, p, seed)
        errors = [ispasp(task, s).error for s in sizes]
        assert slope(sizes, errors, 4, d // 4) == pytest.approx(expected, abs=0.2)
        for size, error in zip(sizes, errors, strict=True):
            assert math.sqrt(error) <= residual_bound(task.weight, 1.0, p, size)


def test_synthetic_rows_are_compressible():
    hidden = compressible(50, 20, 0.5, torch.Generator().manual_seed(0))
    rows = hidden.sum(1).sort(descending=True).values
    torch.testing.assert_close(rows, torch.arange(1, 51, dtype=torch.float64) ** -2)
    assert bool((hidden >= 0).all())


# ---------------------------------------------------------------- the five steps


def test_line_search_minimises():
    p = problem()
    kept = torch.zeros(30, dtype=torch.bool)
    kept[[1, 4, 9, 16, 25]] = True
    start = torch.where(kept, p.weight, 0.0)
    moved = five.descend(p, start, kept, 1, AuxiliaryOptions())
    gradient = torch.where(kept, p.product(start) - p.cross, 0.0)
    rate = float(((start - moved) * gradient).sum() / gradient.square().sum())
    torch.testing.assert_close(start - moved, rate * gradient)
    grid = torch.linspace(0, 3 * rate, 3001, dtype=torch.float64)
    values = [p.objective(start - float(eta) * gradient) for eta in grid]
    assert float(grid[min(range(3001), key=values.__getitem__)]) == pytest.approx(rate, abs=1.5 * rate / 1000)
    image = float((gradient @ p.gram * gradient).sum())
    drop = float(gradient.square().sum()) ** 2 / image  # of ‖·‖²; half of it for ½‖·‖²
    assert p.objective(start) - p.objective(moved) == pytest.approx(drop, rel=1e-9)


@pytest.mark.parametrize("options", [PAPER, AuxiliaryOptions(), AuxiliaryOptions(solver="pcg")])
def test_mini_batches_and_moments_agree(options):
    weight, hidden = data()
    batched = BatchedReconstruction(weight, lambda: hidden.split(33, dim=1))
    weights, support = five.run(batched, 8, options)
    found = auxiliary(problem(), 8, options)
    assert found.support.tolist() == support.tolist()
    torch.testing.assert_close(found.weights, weights[:, support], rtol=1e-8, atol=1e-9)
    assert batched.objective(weights) == pytest.approx(problem().objective(weights), rel=1e-9)


def test_the_exact_solver_needs_moments():
    weight, hidden = data()
    with pytest.raises(ValueError, match="second moments"):
        five.run(BatchedReconstruction(weight, lambda: [hidden]), 8, AuxiliaryOptions(solver="exact"))


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("solver", SOLVERS)
def test_training_helps_and_never_beats_the_refit(solver, block):
    p = problem(block)
    found = auxiliary(p, 5, AuxiliaryOptions(solver=solver))
    best = refit(p, found.support)
    assert found.weights.shape == (5, 5 * block)
    assert best.error * (1 - 1e-6) <= found.error < ispasp(p, 5).error
    if solver == "exact":
        torch.testing.assert_close(found.weights, best.weights, rtol=1e-8, atol=1e-8)


def test_enough_conjugate_gradients_are_the_exact_solution():
    p = problem()
    kept = torch.zeros(30, dtype=torch.bool)
    kept[::4] = True
    one = five.descend(p, torch.zeros_like(p.weight), kept, 5, AuxiliaryOptions(solver="pcg", steps=40))
    two = five.descend(p, torch.zeros_like(p.weight), kept, 5, AuxiliaryOptions(solver="exact"))
    torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-8)


def test_all_layers_at_once_equals_one_by_one_where_layers_are_independent():
    tasks = [problem(seed=0), problem(seed=1)]
    options = AuxiliaryOptions(best=False)
    together = auxiliary_layers(lambda weights: tasks, [6, 9], options)
    for task, size, found in zip(tasks, [6, 9], together, strict=True):
        alone = auxiliary(task, size, options)
        assert found.support.tolist() == alone.support.tolist()
        torch.testing.assert_close(found.weights, alone.weights)
    with pytest.raises(ValueError, match="2 layers but 1 sizes"):
        auxiliary_layers(lambda weights: tasks, [6])


# ---------------------------------------------------------------- greedy forward selection


@pytest.mark.parametrize("scale", ["mean", "fit", "one"])
@pytest.mark.parametrize("block", [1, 3])
def test_forward_selection_is_greedy(scale, block):
    p = problem(block)
    rho = p.ridge

    def trial(chosen: list[int]) -> float:
        full = torch.zeros_like(p.weight)
        index = p.column_index(torch.tensor(chosen))
        full[:, index] = p.weight[:, index]
        squared = float((full @ p.gram * full).sum())
        matched = float((full * p.cross).sum())
        alpha = {"mean": p.units / len(chosen), "one": 1.0, "fit": matched / squared}[scale]
        return alpha**2 * squared - 2 * alpha * matched + p.energy + rho * float(p.weight.square().sum())

    chosen: list[int] = []
    for _ in range(4):
        chosen.append(min((j for j in range(p.units) if j not in chosen), key=lambda j: trial([*chosen, j])))
    found = gfs(p, 4, scale=scale)
    assert found.support.tolist() == sorted(chosen)
    alpha = found.weights[0, 0] / p.weight[:, p.column_index(found.support)][0, 0]
    torch.testing.assert_close(found.weights, alpha * p.weight[:, p.column_index(found.support)])


def test_forward_selection_stops():
    p = problem()
    assert len(gfs(p, 30, scale="fit", tolerance=0.5).support) < 30
    assert gfs(p, 30, scale="fit", tolerance=0.5).relative <= 0.5 + 1e-6
    assert len(gfs(p, 30, stop=lambda support, weights: len(support) == 7).support) == 7
    wanted = {3, 8, 11}
    found = gfs(p, 3, loss=lambda support, weights: -len(wanted & set(support.tolist())))
    assert set(found.support.tolist()) == wanted
    assert gfs(p, 5, candidates=4, seed=1).support.tolist() == gfs(p, 5, candidates=4, seed=1).support.tolist()


@pytest.mark.parametrize("size", [0, 31])
@pytest.mark.parametrize("method", [ispasp, auxiliary, gfs])
def test_sizes_out_of_range_are_refused(method, size):
    with pytest.raises(ValueError, match="from 1 to 30"):
        method(problem(), size)
