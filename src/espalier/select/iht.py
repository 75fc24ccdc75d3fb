"""CHITA: iterative hard thresholding with the exact line search, an active set, and the exact refit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.curvature.matrix import columns, matvec, rmatvec
from espalier.curvature.watch import Watch, unwatched
from espalier.select.dual import DualState
from espalier.select.linesearch import exact_line_search
from espalier.select.patterns import Quota
from espalier.select.problem import Problem, matvec64
from espalier.select.result import Result, finish


@dataclass(frozen=True)
class IHTOptions:
    """Limits of the paper's solver.

    steps: IHT updates per active set. tolerance: relative decrease below which an active set is done.
    active: size of the first active set, in multiples of k. rounds: how often it may be
    enlarged and the support refitted.
    refit: solve exactly on the support found (the back-solve of the paper's Figure 1).
    """

    steps: int = 50
    tolerance: float = 1e-4
    active: float = 1.5
    rounds: int = 20
    refit: bool = True


def iht(problem: Problem, quota: Quota, options: IHTOptions | None = None, watch: Watch = unwatched) -> Result:
    """Solve problem (5) as CHITA does: w ← P_k(w − τ∇Q(w)) with the best τ ≥ 0, until nothing changes.

    >>> from espalier.select.patterns import cardinality
    >>> problem = Problem.of(torch.eye(2), None, torch.tensor([2.0, 1.0]), ridge=0.5)
    >>> iht(problem, cardinality(1, 2)).weights
    tensor([2., 0.])

    Updates touch only an active set; where it has converged, the gradient over all weights says which
    others would enter, and these join it. The objective never increases: a step that does not lower it ends
    the loop.
    """
    options = options or IHTOptions()
    support = quota.project(problem.w_bar.abs())
    w = torch.where(support, problem.w_bar, torch.zeros((), dtype=problem.w_bar.dtype))
    best, best_value = w, problem.objective(w)
    history, steps, proven = [best_value], 0, 0
    active = support
    for round_ in watch(range(options.rounds), "active sets"):
        g = _gradient(problem, w)
        wanted = _wanted(problem, quota, w, g, grow=options.active if round_ == 0 else 1.0)
        active = active | wanted
        index = active.nonzero().flatten()
        w, values, exact = _on_active_set(problem, quota.restrict(index), w, index, options)
        steps, proven = steps + len(values), proven + exact
        if options.refit:
            state = DualState.of(problem, w != 0)
            state.solve()
            refitted = state.weights()
            value = state.objective
            if not values or value <= values[-1]:
                w, values = refitted, [*values, value]
        if not values or values[-1] >= best_value:
            break
        small = best_value - values[-1] <= options.tolerance * best_value
        best, best_value = w, values[-1]
        history += values
        if small and round_:
            break
    # an index that the update brought to exactly zero may stay: fill the quota
    support = quota.project(torch.where(best != 0, 1 + best.abs() / best.abs().max(), problem.w_bar.abs() * 0))
    return finish(problem, best, support, history, steps=steps, exact_steps=proven)


def _gradient(problem: Problem, w: Tensor) -> Tensor:
    delta = w - problem.w_bar
    misfit = problem.residual - matvec(problem.A, delta).double()
    return problem.rho * delta - rmatvec(problem.A, misfit)


def _wanted(problem: Problem, quota: Quota, w: Tensor, g: Tensor, grow: float) -> Tensor:
    """The indices that a steepest-descent step would keep, `grow` times as many as the quota where asked."""
    Ag = matvec(problem.A, g)
    tau = float(g.square().sum() / (Ag.square().sum() + problem.rho * g.square().sum()).clamp_min(1e-300))
    score = (w - tau * g).abs()
    if grow > 1 and quota.single:
        more = min(problem.p, int(grow * quota.kept))
        chosen = torch.zeros_like(score, dtype=torch.bool)
        chosen[score.topk(more).indices] = True
        return chosen
    return quota.project(score)


def _on_active_set(
    problem: Problem, quota: Quota, w: Tensor, index: Tensor, options: IHTOptions
) -> tuple[Tensor, list[float], int]:
    rows_t = columns(problem.A, index).t().contiguous()
    rows = rows_t.numpy()
    w_bar = problem.w_bar[index].double()
    x = w[index].double()
    misfit = problem.residual - matvec64(problem.A, w - problem.w_bar)
    inactive = torch.ones(problem.p, dtype=torch.bool)
    inactive[index] = False
    rest = 0.5 * problem.rho * float(problem.w_bar[inactive].double().square().sum())
    value = 0.5 * float(misfit.square().sum()) + 0.5 * problem.rho * float((x - w_bar).square().sum()) + rest
    values: list[float] = []
    proven = 0
    for _ in range(options.steps):
        g = problem.rho * (x - w_bar) - (rows_t @ misfit.to(rows_t.dtype)).double()
        step = exact_line_search(rows, misfit.numpy(), x.numpy(), g.numpy(), w_bar.numpy(), problem.rho, quota, rest)
        proven += step.exact
        if step.tau == 0.0:
            break
        moved = x - step.tau * g
        new = torch.where(quota.project(moved.abs()), moved, torch.zeros((), dtype=x.dtype))
        change = (new - x).nonzero().flatten()
        new_misfit = misfit - ((new - x)[change].to(rows_t.dtype) @ rows_t[change]).double()
        new_value = 0.5 * float(new_misfit.square().sum())
        new_value += 0.5 * problem.rho * float((new - w_bar).square().sum()) + rest
        if new_value >= value:
            break
        stable = bool(((new != 0) == (x != 0)).all())
        small = value - new_value <= options.tolerance * value
        x, misfit, value = new, new_misfit, new_value
        values.append(value)
        if small or (stable and options.refit):  # the refit does the rest on a stable support
            break
    out = torch.zeros_like(w)
    out[index] = x.to(w.dtype)
    return out, values, proven
