"""The default solver: the exact refit of a support, improved by exact exchanges.

From the support of the largest |w̄|, refitted in the n × n dual, weights are exchanged as long as that lowers
Q. With z = w̄ + Aᵀy and leverage hⱼ = aⱼᵀK⁻¹aⱼ (see `dual`), bringing weight j in and refitting everything
lowers Q by exactly ρzⱼ²/(2(1 + hⱼ)); taking weight i out raises it by exactly ρzᵢ²/(2(1 − hᵢ)). Either change
moves z and H = AᵀK⁻¹A by one rank, so a batch of candidates is exchanged one by one, exactly, on their own
small H; only then are K and z brought up to date, with one pass over A. An exchange of i for j lowers Q by at most
ρ(zⱼ² − zᵢ²)/2, so that few pairs must be looked at to know that none does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from espalier.curvature.matrix import chunks, columns, working_dtype
from espalier.curvature.watch import Watch, unwatched
from espalier.select.dual import TRUSTED, DualState
from espalier.select.patterns import Quota
from espalier.select.problem import Problem, largest_square, too_small
from espalier.select.result import Result, finish
from espalier.select.swaps import LOCAL, SMALL, best_of_starts

AFFORDABLE = 1 << 30
"""Multiplications that a round may spend on the leverage of every weight."""
MOST = 3000
"""Weights among which all exchanges are looked at to prove that none helps."""
LOOSE = 1.5
"""Other starts are tried where Q is that many times a bound below it: none can win more."""


@dataclass(frozen=True)
class ExchangeOptions:
    """candidates: weights per side looked at in one round. rounds: at most so many, each one pass over A; 0 only refits
    the support of the largest |w̄|. tolerance: relative decrease of Q below which a round ends the search.

    A problem of at most 256 weights needs none of them: there all exchanges are looked at (`espalier.select.swaps`).
    """

    candidates: int = 192
    rounds: int = 30
    tolerance: float = 1e-5


def exchange(
    problem: Problem,
    quota: Quota,
    options: ExchangeOptions | None = None,
    support: Tensor | None = None,
    watch: Watch = unwatched,
) -> Result:
    """Solve problem (5) by exact exchanges, from the support given or that of the largest |w̄|.

    >>> from espalier.select.patterns import cardinality
    >>> problem = Problem.of(torch.tensor([[0.0, 3.0]]), None, torch.tensor([2.0, 1.0]), ridge=0.5)
    >>> exchange(problem, cardinality(1, 2)).support
    tensor([False,  True])

    Where another support may do much better, that of the largest |w̄ⱼ|·√([F]ⱼⱼ) is a start too, and for at most 256
    weights those of greedy elimination and selection; the better one counts. The first entry of `history` is the
    objective of the refitted start; it never increases. `info["swaps"]` counts exchanges; `info["local"]` is 1 where it
    was proven that no exchange of one weight for another of its cell lowers Q by more than 1e-6 of it, and 0 where the
    search ended before.
    """
    options = options or ExchangeOptions()
    if problem.p <= SMALL and options.rounds:
        return _small(problem, quota, support)
    state = _start(problem, quota, support, others=options.rounds > 0)
    z, history, swaps, local = state.potential(), [state.objective], 0, False
    for _ in watch(range(options.rounds), "rounds of exchanges"):
        add, drop = _swap(state, _candidates(state, z, quota, options.candidates), quota)
        if not len(add):
            found = best_exchange(state, z, quota)
            if found is None or found[0] <= LOCAL * history[-1]:
                local = found is not None and state.rounding(torch.float64) < TRUSTED
                break
            _, add, drop = found
        moved = state.copy()
        moved.add_drop(add, drop)
        moved.solve()
        if moved.objective >= history[-1]:  # rounding: the exchanges were worth less than it
            break
        swaps += len(add)
        state, z = moved, moved.potential()
        history.append(state.objective)
        if history[-2] - history[-1] <= options.tolerance * history[-2]:
            break
    weights, counts = z.to(problem.w_bar.dtype), {"swaps": swaps, "rounds": len(history), "local": float(local)}
    return finish(problem, weights, state.support, history, **counts)


def _small(problem: Problem, quota: Quota, support: Tensor | None) -> Result:
    try:
        found = best_of_starts(problem, quota, support)
    except np.linalg.LinAlgError as error:
        raise ValueError(too_small(problem, largest_square(problem.A))) from error
    kept = torch.from_numpy(found.refit.support)
    weights = torch.zeros_like(problem.w_bar)
    weights[kept] = torch.from_numpy(found.refit.weights).to(weights.dtype)
    swaps = len(found.history) - 1
    return finish(problem, weights, kept, found.history, swaps=swaps, rounds=swaps + 1, local=float(found.local))


def _start(problem: Problem, quota: Quota, support: Tensor | None, others: bool) -> DualState:
    """The refitted start: the support given, that of the largest |w̄|, or a better one where much may be won."""
    size = problem.w_bar.abs()
    state = DualState.of(problem, quota.project(size) if support is None else support)
    state.solve()
    # no support leaves less of w̄ out than that of the largest; what the residual costs is not for exchanges to win
    left = problem.w_bar[~state.support].double().square().sum() + problem.residual @ state.solution(problem.residual)
    if support is not None or not others or state.objective <= LOOSE * 0.5 * problem.rho * float(left):
        return state
    norms = torch.cat([a.square().sum(0) for _, a in chunks(problem.A)])
    other = DualState.of(problem, quota.project(size * (norms + problem.rho).sqrt()))
    other.solve()
    return min(state, other, key=lambda one: one.objective)


def _candidates(state: DualState, z: Tensor, quota: Quota, count: int) -> Tensor:
    """The weights off the support that gain most, and on it those that cost least, relative to their cell.

    Judged by z² alone where the leverages would take too long: gains are at most ρz²/2 and costs at least that.
    """
    eligible, z2 = _eligible(state.support, z.square(), quota), z.square()
    prize, worst = z2, z2
    if state.problem.n**2 * state.problem.p <= AFFORDABLE:
        h = leverages(state).to(z2.dtype)
        prize, worst = z2 / (1 + h), z2 / (1 - h).clamp_min(torch.finfo(z2.dtype).eps)
    prize, worst = torch.where(state.support, -torch.inf, prize), torch.where(state.support, worst, torch.inf)
    low, high = _extremes(prize, worst, quota)
    chosen = []
    for score in (prize - low, high - worst):
        top = torch.where(eligible, score, -torch.inf).topk(min(count, len(score)))
        chosen.append(top.indices[top.values > -torch.inf])
    return torch.cat(chosen)


def _extremes(prize: Tensor, worst: Tensor, quota: Quota) -> tuple[Tensor, Tensor]:
    """The smallest `worst` and the largest `prize` in the cell of each weight (in all, where there is one cell)."""
    if quota.single:
        return worst.min(), prize.max()
    bare = prize.new_zeros(len(quota.quota))
    low = bare.scatter_reduce(0, quota.cell, worst, "amin", include_self=False)
    high = bare.scatter_reduce(0, quota.cell, prize, "amax", include_self=False)
    return low[quota.cell], high[quota.cell]


def _eligible(support: Tensor, z2: Tensor, quota: Quota) -> Tensor:
    """The weights that can be part of an improving exchange, bool [p].

    Off the support z² is above the smallest of those on it in the same cell, on it below the largest of those off it.
    """
    prize, worst = torch.where(support, -torch.inf, z2), torch.where(support, z2, torch.inf)
    low, high = _extremes(prize, worst, quota)
    return torch.where(support, z2 < high, z2 > low)


def leverages(state: DualState) -> Tensor:
    """hⱼ = aⱼᵀK⁻¹aⱼ of every weight, [p]; n²p operations."""
    dtype = torch.float64 if state.exact else working_dtype(state.problem.A)
    factor = state.factor.to(dtype)
    parts = [torch.linalg.solve_triangular(factor, a.to(dtype), upper=False) for _, a in chunks(state.problem.A)]
    return torch.cat([half.square().sum(0) for half in parts])


def best_exchange(state: DualState, z: Tensor, quota: Quota) -> tuple[float, Tensor, Tensor] | None:
    """By how much the best of all single exchanges lowers Q, what enters and what leaves; None: too many to look at."""
    index = _eligible(state.support, z.square(), quota).nonzero().flatten()
    inside = state.support[index].numpy()
    if len(index) > MOST:
        return None
    none = index[:0]
    if not len(index):
        return -torch.inf, none, none
    H, u, cell = _small_system(state, index, quota)
    net, j, i = _best_pair(H, u, inside, cell[:, None] == cell)
    return 0.5 * state.problem.rho * net, index[j : j + 1], index[i : i + 1]


def _small_system(state: DualState, index: Tensor, quota: Quota) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """H and z of some weights in float64, and their cells."""
    a = columns(state.problem.A, index).double()
    half = torch.linalg.solve_triangular(state.factor, a, upper=False)
    u = state.problem.w_bar[index].double() + a.t() @ state.y
    return (half.t() @ half).numpy(), u.numpy(), quota.cell_numpy[index.numpy()]


def _swap(state: DualState, candidates: Tensor, quota: Quota) -> tuple[Tensor, Tensor]:
    """Exchange candidates one by one as long as it pays; the indices that enter and leave."""
    H, u, cell = _small_system(state, candidates, quota)
    inside = state.support[candidates].numpy().copy()
    before = inside.copy()
    cells, cell = np.unique(cell, return_inverse=True)
    pairs = cell[:, None] == cell
    for _ in range(2 * len(candidates)):
        found = _greedy(H, u, inside, cell if len(cells) > 1 else None)
        if found is None:
            net, *found = _best_pair(H, u, inside, pairs)
            if not net > 0:
                break
        j, i = found
        for index, sign in ((j, 1.0), (i, -1.0)):
            row, scale = H[index].copy(), 1 + sign * H[index, index]
            u -= sign * row * (u[index] / scale)
            H -= np.outer(row, row * (sign / scale))
            inside[index] = sign > 0
    changed = torch.from_numpy(inside != before)
    entered = torch.from_numpy(inside)
    return candidates[changed & entered], candidates[changed & ~entered]


def _greedy(H: np.ndarray, u: np.ndarray, inside: np.ndarray, cell: np.ndarray | None) -> tuple[int, int] | None:
    """The best addition and then the best removal after it, if they pay: cheap, and nearly always enough."""
    h = H.diagonal()
    gains = np.where(inside, -np.inf, u * u / (1 + h))
    rank = gains
    if cell is not None:  # less what it would cost to leave in the same cell, before interactions
        cheapest = np.full(cell.max() + 1, np.inf)
        np.minimum.at(cheapest, cell[inside], (u * u / np.maximum(1 - h, 1e-12))[inside])
        rank = gains - cheapest[cell]
    j = int(np.argmax(rank))
    if inside[j]:
        return None
    costs = _costs_after(H[j], u, h, u[j], 1 + h[j])
    costs = np.where(inside if cell is None else inside & (cell == cell[j]), costs, np.inf)
    i = int(np.argmin(costs))
    return (j, i) if costs[i] < gains[j] * (1 - 1e-9) else None


def _best_pair(H: np.ndarray, u: np.ndarray, inside: np.ndarray, pairs: np.ndarray) -> tuple[float, int, int]:
    """What the best of all exchanges among the candidates gains more than it costs, what enters and what leaves."""
    on, off = np.flatnonzero(inside), np.flatnonzero(~inside)
    if not len(on) or not len(off):
        return -np.inf, 0, 0
    h = H.diagonal()
    gains = u[off] ** 2 / (1 + h[off])
    costs = _costs_after(H[np.ix_(off, on)], u[on], h[on], u[off][:, None], 1 + h[off][:, None])
    net = np.where(pairs[np.ix_(off, on)], gains[:, None] * (1 - 1e-9) - costs, -np.inf)
    j, i = np.unravel_index(int(np.argmax(net)), net.shape)
    return float(net[j, i]), int(off[j]), int(on[i])


def _costs_after(
    row: np.ndarray, u: np.ndarray, h: np.ndarray, entering: np.ndarray | float, scale: np.ndarray | float
) -> np.ndarray:
    """uᵢ²/(1 − hᵢ) once a weight with the given row of H, potential and 1 + h has entered."""
    after = u - row * (entering / scale)
    return after * after / np.maximum(1 - (h - row * row / scale), 1e-12)
