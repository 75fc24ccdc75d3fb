"""The default solver: the exact refit of a support, improved by exact exchanges.

From the support of the largest |w̄|, refitted in the n × n dual, weights are exchanged as long as that lowers
Q. With z = w̄ + Aᵀy and leverage hⱼ = aⱼᵀK⁻¹aⱼ (see `dual`), bringing weight j in and refitting everything
lowers Q by exactly ρzⱼ²/(2(1 + hⱼ)); taking weight i out raises it by exactly ρzᵢ²/(2(1 − hᵢ)). Either change
moves z and H = AᵀK⁻¹A by one rank, so a batch of candidates is exchanged one by one, exactly, on their own
small H; only then are K and z brought up to date, with one pass over A.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from espalier.curvature.matrix import columns
from espalier.select.dual import DualState
from espalier.select.patterns import Quota
from espalier.select.problem import Problem
from espalier.select.result import Result, finish


@dataclass(frozen=True)
class ExchangeOptions:
    """candidates: weights per side looked at in one round. rounds: at most so many, each one pass over A.
    tolerance: relative decrease of Q below which a round ends the search.
    """

    candidates: int = 192
    rounds: int = 30
    tolerance: float = 1e-5


def exchange(
    problem: Problem, quota: Quota, options: ExchangeOptions | None = None, support: Tensor | None = None
) -> Result:
    """Solve problem (5) by exact exchanges, from the support given or that of the largest |w̄|.

    >>> from espalier.select.patterns import cardinality
    >>> problem = Problem.of(torch.tensor([[0.0, 3.0]]), None, torch.tensor([2.0, 1.0]), ridge=0.5)
    >>> exchange(problem, cardinality(1, 2)).support
    tensor([False,  True])

    The first entry of `history` is the objective of the refitted start; it never increases. `info["swaps"]`
    counts exchanges; `info["local"]` is 1 where no single exchange of the last candidates lowers Q.
    """
    options = options or ExchangeOptions()
    state = DualState.of(problem, quota.project(problem.w_bar.abs()) if support is None else support)
    state.solve()
    z, history, swaps, local = state.potential(), [state.objective], 0, 0.0
    best = (history[0], state.support.clone(), z)
    for _ in range(options.rounds):
        candidates = _candidates(z.square(), state.support, quota, options.candidates)
        add, drop = _swap(state, z, candidates, quota)
        if not len(add):
            local = 1.0
            break
        swaps += len(add)
        state.add_drop(add, drop)
        state.solve()
        z, value = state.potential(), state.objective
        if value >= best[0]:  # rounding: the exchanges were worth less than it
            break
        small = best[0] - value <= options.tolerance * best[0]
        best = (value, state.support.clone(), z)
        history.append(value)
        if small:
            break
    return finish(problem, best[2], best[1], history, swaps=swaps, rounds=len(history), local=local)


def _candidates(z2: Tensor, support: Tensor, quota: Quota, count: int) -> Tensor:
    """The weights off the support with the largest z², and on it with the smallest, relative to their cell.

    Gains are at most ρz²/2 and costs at least that, so a weight off the support whose z² is below all those
    on it in its cell can be part of no improving exchange.
    """
    infinity = torch.full((), torch.inf, dtype=z2.dtype)
    worst = torch.where(support, z2, infinity)
    prize = torch.where(support, -infinity, z2)
    if quota.single:
        low, high = worst.min(), prize.max()
    else:
        cells = len(quota.quota)
        low = z2.new_full((cells,), torch.inf).scatter_reduce(0, quota.cell, worst, "amin")[quota.cell]
        high = z2.new_full((cells,), -torch.inf).scatter_reduce(0, quota.cell, prize, "amax")[quota.cell]
    gain = torch.where(torch.isfinite(low), prize - low, -infinity).nan_to_num(nan=-torch.inf)
    loss = torch.where(torch.isfinite(high), high - worst, -infinity).nan_to_num(nan=-torch.inf)
    chosen = []
    for score in (gain, loss):
        top = score.topk(min(count, len(score)))
        chosen.append(top.indices[top.values > 0])
    return torch.cat(chosen)


def _swap(state: DualState, z: Tensor, candidates: Tensor, quota: Quota) -> tuple[Tensor, Tensor]:
    """Exchange candidates one by one as long as it pays; the indices that enter and leave."""
    a = columns(state.problem.A, candidates).double()
    half = torch.linalg.solve_triangular(state.factor, a, upper=False)
    H = (half.t() @ half).numpy()
    u = z[candidates].double().numpy().copy()
    inside = state.support[candidates].numpy().copy()
    before = inside.copy()
    cell = quota.cell_numpy[candidates.numpy()]
    cells, cell = np.unique(cell, return_inverse=True)
    pairs = cell[:, None] == cell
    for _ in range(2 * len(candidates)):
        found = _greedy(H, u, inside, cell if len(cells) > 1 else None) or _best_pair(H, u, inside, pairs)
        if found is None:
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


def _best_pair(H: np.ndarray, u: np.ndarray, inside: np.ndarray, pairs: np.ndarray) -> tuple[int, int] | None:
    """The best of all exchanges among the candidates, if any pays."""
    on, off = np.flatnonzero(inside), np.flatnonzero(~inside)
    if not len(on) or not len(off):
        return None
    h = H.diagonal()
    gains = u[off] ** 2 / (1 + h[off])
    costs = _costs_after(H[np.ix_(off, on)], u[on], h[on], u[off][:, None], 1 + h[off][:, None])
    net = np.where(pairs[np.ix_(off, on)], gains[:, None] * (1 - 1e-9) - costs, -np.inf)
    j, i = np.unravel_index(int(np.argmax(net)), net.shape)
    return (int(off[j]), int(on[i])) if net[j, i] > 0 else None


def _costs_after(
    row: np.ndarray, u: np.ndarray, h: np.ndarray, entering: np.ndarray | float, scale: np.ndarray | float
) -> np.ndarray:
    """uᵢ²/(1 − hᵢ) once a weight with the given row of H, potential and 1 + h has entered."""
    after = u - row * (entering / scale)
    return after * after / np.maximum(1 - (h - row * row / scale), 1e-12)
