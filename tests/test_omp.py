"""Forward and backward greedy selection against solutions from scratch and brute force, in float64."""

from itertools import combinations

import pytest
import torch

from espalier.select import sweep
from espalier.select.backward import backward, backward_path
from espalier.select.omp import omp, omp_path
from espalier.select.refit import Reconstruction, reconstruction, refit
from espalier.select.sweep import Sweep

BLOCKS = [1, 3]


OUTPUTS = [4, 90]  # with many outputs the residual is not kept, only its second moment


def problem(
    units: int, block: int = 1, seed: int = 0, paired: bool = False, samples: int = 300, outputs: int = 4
) -> Reconstruction:
    g = torch.Generator().manual_seed(seed)
    d = units * block
    mix = torch.randn(d, d, generator=g, dtype=torch.float64) / d**0.5 + torch.eye(d)
    dense = (mix @ torch.randn(d, samples, generator=g, dtype=torch.float64)).relu()
    weight = torch.randn(outputs, d, generator=g, dtype=torch.float64)
    if not paired:
        return reconstruction(weight, dense @ dense.T, block=block)
    hidden = dense + 0.3 * torch.randn(d, samples, generator=g, dtype=torch.float64)
    out = weight @ dense
    return reconstruction(
        weight, hidden @ hidden.T, cross=out @ hidden.T, energy=float(out.square().sum()), block=block
    )


def objective(p: Reconstruction, support) -> float:
    selection = refit(p, torch.as_tensor(list(support)))
    full = torch.zeros_like(p.weight)
    full[:, p.column_index(selection.support)] = selection.weights
    return p.objective(full)


def brute(p: Reconstruction, size: int) -> float:
    return min(objective(p, s) for s in combinations(range(p.units), size))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_forward_path_equals_solving_again(block, paired, outputs):
    p = problem(9, block, paired=paired, outputs=outputs)
    path = omp_path(p)
    kept: list[int] = []
    for step in range(p.units):
        trials = {j: objective(p, [*kept, j]) for j in range(p.units) if j not in kept}
        best = min(trials, key=trials.__getitem__)
        assert int(path.order[step]) == best
        kept.append(best)
        assert float(path.errors[step + 1]) == pytest.approx(trials[best], rel=1e-8, abs=1e-10 * p.energy)
    assert float(path.errors[0]) == pytest.approx(p.objective(torch.zeros_like(p.weight)), rel=1e-10)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_backward_path_equals_solving_again(block, paired, outputs):
    p = problem(9, block, paired=paired, outputs=outputs)
    path = backward_path(p)
    kept = list(range(p.units))
    for size in range(p.units - 1, 0, -1):
        trials = {j: objective(p, [k for k in kept if k != j]) for j in kept}
        worst = min(trials, key=trials.__getitem__)
        assert int(path.order[size]) == worst
        kept.remove(worst)
        assert float(path.errors[size]) == pytest.approx(trials[worst], rel=1e-8, abs=1e-10 * p.energy)


@pytest.fixture
def short_panels(monkeypatch):
    """Delayed updates applied every 128 columns, as at large sizes; counts how often rows are measured."""
    measured = []
    original = Sweep._measure
    monkeypatch.setattr(sweep, "_PENDING", 1)
    monkeypatch.setattr(Sweep, "_measure", lambda self, rows: (measured.append(1), original(self, rows))[1])
    return measured


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_backward_with_delayed_updates_and_shrinking_equals_the_plain_loop(outputs, short_panels):
    p = problem(220, samples=800, outputs=outputs)
    path = backward_path(p, 20)
    inverse, weights, kept, errors = torch.linalg.inv(p.gram), p.weight.clone(), list(range(p.units)), [0.0]
    for _ in range(200):
        cost = weights.square().sum(0) / inverse.diagonal()
        j = min(kept, key=lambda unit: float(cost[unit]))
        errors.append(errors[-1] + float(cost[j]))
        weights = weights - torch.outer(weights[:, j], inverse[j]) / inverse[j, j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0
        kept.remove(j)
    assert path.support(20).tolist() == kept
    torch.testing.assert_close(path.errors[20:].flip(0), torch.tensor(errors, dtype=torch.float64), rtol=1e-7, atol=0)
    assert bool(path.errors[:20].isinf().all())


@pytest.mark.parametrize("criterion", ["gain", "correlation"])
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_forward_with_delayed_updates_and_shrinking_equals_the_plain_loop(outputs, criterion, short_panels):
    p = problem(220, samples=800, outputs=outputs)
    path = omp_path(p, 180, criterion=criterion)
    schur, residual, chosen, gains = p.gram.clone(), p.cross.clone(), [], []
    for _ in range(180):
        gain = residual.square().sum(0) / schur.diagonal()
        score = gain if criterion == "gain" else residual.square().sum(0) / p.gram.diagonal()
        j = max((unit for unit in range(220) if unit not in chosen), key=lambda unit: float(score[unit]))
        gains.append(float(gain[j]))
        residual = residual - torch.outer(residual[:, j], schur[j]) / schur[j, j]
        schur = schur - torch.outer(schur[:, j], schur[j]) / schur[j, j]
        schur[j, j] = 1.0
        chosen.append(j)
    assert path.order.tolist() == chosen
    torch.testing.assert_close(-path.errors.diff(), torch.tensor(gains, dtype=torch.float64), rtol=1e-6, atol=0)
    assert float(path.errors[180]) == pytest.approx(objective(p, chosen), rel=1e-8)


def test_badly_scaled_rows_are_measured_anew_where_rounding_could_decide(short_panels):
    g = torch.Generator().manual_seed(0)
    scale = torch.arange(1, 61, dtype=torch.float64) ** -3
    hidden = scale[:, None] * torch.rand(60, 400, generator=g, dtype=torch.float64)
    weight = torch.randn(90, 60, generator=g, dtype=torch.float64)
    p = reconstruction(weight, hidden @ hidden.T, ridge=1e-15)
    path, kept = omp_path(p, 40), []
    assert len(short_panels) > 1
    for size in range(40):
        trials = {j: objective(p, [*kept, j]) for j in range(60) if j not in kept}
        kept.append(min(trials, key=trials.__getitem__))
        assert int(path.order[size]) == kept[-1]
        assert float(path.errors[size + 1]) == pytest.approx(trials[kept[-1]], rel=1e-6)
    back = backward_path(p)
    for size in (10, 30, 50):
        assert float(back.errors[size]) == pytest.approx(objective(p, back.support(size).tolist()), rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("paired", [False, True])
def test_both_ends_agree_with_brute_force(seed, paired):
    p = problem(10, seed=seed, paired=paired)
    forward, back = omp_path(p).errors, backward_path(p).errors
    assert float(forward[1]) == pytest.approx(brute(p, 1), rel=1e-9)
    assert float(back[9]) == pytest.approx(brute(p, 9), rel=1e-9, abs=1e-9 * p.energy)
    for size in range(2, 9):
        best = brute(p, size)
        for errors in (forward, back):
            assert best * (1 - 1e-9) <= float(errors[size]) <= 1.5 * best


def test_orthogonal_rows_make_greedy_optimal():
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 12, generator=g, dtype=torch.float64)
    p = reconstruction(weight, torch.diag(torch.rand(12, generator=g, dtype=torch.float64) + 0.1))
    for size in (3, 6, 9):
        assert float(omp_path(p).errors[size]) == pytest.approx(brute(p, size), rel=1e-9)
        assert float(backward_path(p).errors[size]) == pytest.approx(brute(p, size), rel=1e-9)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("path", [omp_path, backward_path])
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_error_never_rises_along_the_path(path, paired, outputs):
    errors = path(problem(40, 2, paired=paired, outputs=outputs)).errors
    assert bool((errors.diff() <= 0).all())


def test_everything_kept_is_the_dense_layer():
    p = problem(12)
    for selection in (omp(p), backward(p, 12)):
        torch.testing.assert_close(selection.weights, p.weight, rtol=1e-9, atol=1e-9)
        assert selection.relative < 1e-18


def test_refit_is_least_squares():
    g = torch.Generator().manual_seed(3)
    hidden = torch.rand(7, 50, generator=g, dtype=torch.float64)
    weight = torch.randn(3, 7, generator=g, dtype=torch.float64)
    mean = hidden.mean(1)
    support = torch.tensor([4, 1, 6])
    p = reconstruction(weight, hidden @ hidden.T, mean=mean, count=50, centred=True, ridge=0.0)
    found = refit(p, support)
    rows = torch.cat([hidden[[1, 4, 6]], torch.ones(1, 50)])
    oracle = torch.linalg.lstsq(rows.T, (weight @ hidden).T).solution.T
    torch.testing.assert_close(found.weights, oracle[:, :3], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.bias, oracle[:, 3], rtol=1e-9, atol=1e-9)
    assert found.error == pytest.approx(float((oracle @ rows - weight @ hidden).square().sum()), rel=1e-9)
    assert found.support.tolist() == [1, 4, 6]


def test_refit_ridge_is_extra_data():
    p = problem(8)
    support = torch.tensor([0, 3, 5])
    extra = p.ridge**0.5 * torch.eye(8, dtype=torch.float64)
    rows = torch.cat([torch.linalg.cholesky(p.gram - p.ridge * torch.eye(8)).T, extra])
    oracle = torch.linalg.lstsq(rows[:, support], rows @ p.weight.T).solution.T
    torch.testing.assert_close(refit(p, support).weights, oracle, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_rank_deficient_moment_is_solved_and_backward_without_ridge_is_refused(outputs):
    g = torch.Generator().manual_seed(0)
    hidden = torch.rand(20, 6, generator=g, dtype=torch.float64)
    weight = torch.randn(outputs, 20, generator=g, dtype=torch.float64)
    p = reconstruction(weight, hidden @ hidden.T)
    assert omp(p, 8).relative < 1e-4
    assert backward(p, 8).relative < 1e-4
    bare = reconstruction(weight, hidden @ hidden.T, ridge=0.0)
    assert omp(bare, 10).relative < 1e-10
    with pytest.raises(ValueError, match="ridge"):
        backward(bare, 8)


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_dead_units_go_first_and_are_named(outputs):
    g = torch.Generator().manual_seed(0)
    hidden = torch.rand(10, 60, generator=g, dtype=torch.float64)
    hidden[[2, 7]] = 0
    p = reconstruction(torch.randn(outputs, 10, generator=g, dtype=torch.float64), hidden @ hidden.T)
    assert p.dead.tolist() == [2, 7]
    for path in (omp_path(p), backward_path(p)):
        assert set(path.order[-2:].tolist()) == {2, 7}


@pytest.mark.parametrize("size", [0, -1, 13])
def test_sizes_out_of_range_are_refused(size):
    p = problem(12)
    for call in (omp, backward):
        with pytest.raises(ValueError, match=r"from 1 to 12"):
            call(p, size)
    with pytest.raises(ValueError, match="path holds sizes"):
        omp_path(p, 4).support(5)


def test_bad_matrices_are_refused():
    weight, gram = torch.ones(2, 4), torch.eye(4)
    with pytest.raises(ValueError, match=r"must be \[4, 4\]"):
        reconstruction(weight, torch.eye(3))
    with pytest.raises(ValueError, match="blocks of 3"):
        reconstruction(weight, gram, block=3)
    with pytest.raises(ValueError, match="together"):
        reconstruction(weight, gram, cross=weight)
    with pytest.raises(ValueError, match="cross moment must be"):
        reconstruction(weight, gram, cross=torch.ones(2, 3), energy=1.0)
    with pytest.raises(ValueError, match="NaN"):
        reconstruction(weight, gram * torch.nan)
    with pytest.raises(ValueError, match="activation is zero"):
        reconstruction(weight, gram * 0)
    with pytest.raises(ValueError, match="ridge"):
        reconstruction(weight, gram, ridge=-1)
    with pytest.raises(ValueError, match="centring"):
        reconstruction(weight, gram, centred=True)
    with pytest.raises(ValueError, match="criterion"):
        omp_path(problem(4), criterion="other")


def test_classical_criterion_also_gives_a_path():
    p = problem(20)
    path = omp_path(p, 10, criterion="correlation")
    assert bool((path.errors.diff() <= 0).all())
    assert float(path.errors[10]) == pytest.approx(objective(p, path.order.tolist()), rel=1e-8)
