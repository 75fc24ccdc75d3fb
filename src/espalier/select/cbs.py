"""Combinatorial Brain Surgeon (Yu et al. 2022): a selection that counts pairs, and a joint update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import SupportsFloat

import numpy as np
import torch
from torch import Tensor

from espalier.curvature.matrix import chunks, columns, matvec, rmatvec
from espalier.select.dual import DualState
from espalier.select.inputs import Array, Count, quota_of
from espalier.select.patterns import Quota
from espalier.select.problem import Problem
from espalier.select.result import Result, finish


@dataclass(frozen=True)
class CBSOptions:
    """starts: randomised magnitude selections, of which the best is improved. chunks: how many chunks of the
    magnitude order are shuffled inside. swaps: at most so many. shortlist: weights per side whose pairs are
    looked at. tolerance: relative decrease that ends the search.
    """

    starts: int = 10
    chunks: int = 200
    swaps: int = 2000
    shortlist: int = 20
    tolerance: float = 1e-7
    seed: int = 0


def cbs(A: Array, w_bar: Array, k: Count, ridge: SupportsFloat, options: CBSOptions | None = None) -> Result:
    """CBS-S chooses the removed set R by ½ w_Rᵀ F w_R, swapping pairs; CBS-U updates the rest jointly.

    >>> cbs(torch.tensor([[1.0, 1.0, 3.0]]), torch.tensor([1.0, -1.0, 1.0]), 1, ridge=0.1).support
    tensor([False, False,  True])

    Here two weights that cancel go together although each alone matters. The selection leaves the other
    weights as they are; the update w ← w̄ − F⁻¹[:, R](F⁻¹[R, R])⁻¹w_R is the minimiser of problem (5) on the
    support, so it is taken from the n × n dual, as is Fw from two products with A: the p × p matrix of the
    published code is never formed. The objective reported is problem (5) without first-order term. With a `Quota` (per
    layer, N:M), the pairs swapped are those of one cell.

    A: [n, p] gradients; w_bar: [p]; k: a number of weights or a quota; ridge: λ > 0. Raises what `chita` raises.
    """
    options = options or CBSOptions()
    problem = Problem.of(A, None, w_bar, ridge)
    quota = quota_of(k, problem.p)
    first = quota.project(problem.w_bar.abs())
    generator = torch.Generator().manual_seed(options.seed)
    best = (_cost(problem, first), first)
    for _ in range(options.starts):
        support = quota.project(_shuffled(problem.w_bar.abs(), options.chunks, generator))
        best = min(best, (_cost(problem, support), support), key=lambda pair: pair[0])
    support, history = _swap_pairs(problem, quota, best[1].clone(), options)
    state = DualState.of(problem, support)
    state.solve()
    return finish(problem, state.weights(), support, history, swaps=len(history) - 1)


def _shuffled(score: Tensor, chunks: int, generator: torch.Generator) -> Tensor:
    """A score whose order is that of `score` but random inside each chunk of the order."""
    order = score.argsort()
    chunk = torch.arange(len(score)) * chunks // len(score)
    out = torch.empty_like(score)
    out[order] = chunk.to(score.dtype) + torch.rand(len(score), generator=generator).to(score.dtype)
    return out


def _removed(problem: Problem, support: Tensor) -> Tensor:
    return torch.where(support, torch.zeros((), dtype=problem.w_bar.dtype), problem.w_bar)


def _cost(problem: Problem, support: Tensor) -> float:
    """n · ½ w_Rᵀ F w_R."""
    gone = _removed(problem, support)
    return float(
        0.5 * matvec(problem.A, gone).double().square().sum() + 0.5 * problem.rho * gone.double().square().sum()
    )


def _swap_pairs(problem: Problem, quota: Quota, support: Tensor, options: CBSOptions) -> tuple[Tensor, list[float]]:
    """Swap the best pair of a shortlist until none lowers the cost.

    With u = A w_R: putting weight i back changes the cost by −wᵢ aᵢᵀu + wᵢ²‖aᵢ‖²/2, removing j by
    wⱼ aⱼᵀu + wⱼ²‖aⱼ‖²/2, and doing both by their sum − wᵢwⱼ aᵢᵀaⱼ (the ridge adds ρw²/2 to each).
    """
    w = problem.w_bar
    squares = torch.cat([a.square().sum(0) for _, a in chunks(problem.A)])
    u = matvec(problem.A, _removed(problem, support))
    value = _cost(problem, support)
    history = [value]
    infinity = torch.full((), torch.inf, dtype=w.dtype)
    wide = options.shortlist * 16  # enough for many swaps before A is read again
    while len(history) <= options.swaps:
        linear = w * rmatvec(problem.A, u)
        own = 0.5 * w.square() * squares
        back = torch.where(support, infinity, -linear + own - 0.5 * problem.rho * w.square())
        away = torch.where(support, linear + own + 0.5 * problem.rho * w.square(), infinity)
        ids = _shortlist(back, away, quota, wide)
        cell = quota.cell_numpy[ids.numpy()]
        before = len(history)
        if not len(ids):
            break
        M = columns(problem.A, ids) * w[ids]
        G = (M.t() @ M).double().numpy()
        h = (M.t() @ u).double().numpy()
        keep = support[ids].numpy().copy()
        ridge = (0.5 * problem.rho * w[ids].square()).double().numpy()
        for _ in range(options.shortlist):
            if len(history) > options.swaps:
                break
            cost = np.where(keep, h + 0.5 * G.diagonal() + ridge, -h + 0.5 * G.diagonal() - ridge)
            back, away = np.where(keep, np.inf, cost), np.where(keep, cost, np.inf)
            if not quota.single:
                back, away = back + _cheapest(away, cell)[cell], away + _cheapest(back, cell)[cell]
            ins, outs = _smallest(back, options.shortlist), _smallest(away, options.shortlist)
            if not len(ins) or not len(outs):
                break
            change = cost[ins][:, None] + cost[outs] - G[np.ix_(ins, outs)]
            change[cell[ins][:, None] != cell[outs]] = np.inf
            i, j = np.unravel_index(int(change.argmin()), change.shape)
            if not change[i, j] < -options.tolerance * abs(value):
                break
            i, j = ins[i], outs[j]
            h += G[j] - G[i]
            keep[i], keep[j] = True, False
            value += float(change.min())
            history.append(value)
        if len(history) == before:
            break
        support[ids] = torch.from_numpy(keep)
        u = matvec(problem.A, _removed(problem, support))
    return support, history


def _shortlist(back: Tensor, away: Tensor, quota: Quota, count: int) -> Tensor:
    """The weights that are cheapest to put back or take away, with the cheapest of the other kind in their cell."""
    if not quota.single:
        bare = back.new_zeros(len(quota.quota))
        partners = [bare.scatter_reduce(0, quota.cell, x, "amin", include_self=False) for x in (away, back)]
        back, away = (x + cheapest[quota.cell] for x, cheapest in zip((back, away), partners, strict=True))
    tops = [cost.topk(min(count, len(cost)), largest=False) for cost in (back, away)]
    return torch.cat([top.indices[torch.isfinite(top.values)] for top in tops])


def _cheapest(cost: np.ndarray, cell: np.ndarray) -> np.ndarray:
    out = np.full(cell.max() + 1, np.inf)
    np.minimum.at(out, cell, cost)
    return out


def _smallest(values: np.ndarray, count: int) -> np.ndarray:
    order = np.argsort(values)[:count]
    return order[np.isfinite(values[order])]
