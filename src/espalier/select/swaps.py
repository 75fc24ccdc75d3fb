"""Problem (5) with few weights: every single exchange looked at, from several starts, all in float64.

A refit is a QR factorisation of [A_S; √ρI] with columns of length 1, so that neither AᵀA nor AAᵀ is formed: it keeps
its digits where columns differ by many orders of magnitude and λ is tiny, which the n × n dual of `dual` does not.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from espalier.select.patterns import Quota
from espalier.select.problem import Problem

SMALL = 256
"""Up to so many weights a problem is solved here."""
LOCAL = 1e-6
"""An exchange that lowers Q by less than this part of it does not count against `info["local"]`."""

TRIES = 8
"""Exchanges tried where the best of them turn out to be worth less than rounding."""


@dataclass(frozen=True)
class Compact:
    """A problem in float64 with at most as many rows as weights: Q(w) = ½‖residual − Aδ‖² + (ρ/2)‖δ‖² + rest."""

    A: np.ndarray
    residual: np.ndarray
    w_bar: np.ndarray
    rho: float
    rest: float

    @classmethod
    def of(cls, problem: Problem) -> Compact:
        """Replace A by the triangle of its QR factorisation where that is smaller."""
        A, residual, rest = problem.A.double().numpy(), problem.residual.numpy(), 0.0
        if problem.n > problem.p:
            Q, A = np.linalg.qr(A)
            turned = Q.T @ residual
            rest = 0.5 * float(np.sum((residual - Q @ turned) ** 2))
            residual = turned
        return cls(A, residual, problem.w_bar.double().numpy(), problem.rho, rest)


@dataclass
class Refit:
    """The best weights on a support, with what judges its exchanges; LinAlgError where they are not unique.

    `inverse`: G⁻¹ = inverse · inverseᵀ for G = A_SᵀA_S + ρI. `misfit`: residual − Aδ.
    """

    compact: Compact
    support: np.ndarray
    value: float = field(init=False)

    def __post_init__(self) -> None:
        c, on = self.compact, self.support
        n, k = len(c.A), int(on.sum())
        a, gone = c.A[:, on], c.w_bar[~on]
        scale = 1 / np.sqrt((a * a).sum(0) + c.rho)
        Q, R = np.linalg.qr(np.concatenate([a * scale, np.diag(np.sqrt(c.rho) * scale)]))
        self.pivot = float(np.abs(R.diagonal()).min(initial=1.0))
        if not self.pivot > 1e-14:
            raise np.linalg.LinAlgError("columns depend on each other and λ is below rounding")
        self.top, self.bottom = Q[:n], Q[n:]
        self.inverse = scale[:, None] * np.linalg.solve(R, np.eye(k))
        target = c.residual + c.A[:, ~on] @ gone
        delta = self.inverse @ (self.top.T @ target)
        self.misfit, self.weights = target - a @ delta, c.w_bar[on] + delta
        ridge = 0.5 * c.rho * float(delta @ delta + gone @ gone)
        self.value = 0.5 * float(self.misfit @ self.misfit) + ridge + c.rest

    def gains(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each weight off the support: shared = Qᵀa, the Schur complement s, and the gradient g of Q."""
        c, off = self.compact, ~self.support
        a = c.A[:, off]
        shared = self.top.T @ a
        s = ((a - self.top @ shared) ** 2).sum(0) + ((self.bottom @ shared) ** 2).sum(0) + c.rho
        return shared, s, -(a.T @ self.misfit) - c.rho * c.w_bar[off]

    def nets(self) -> np.ndarray:
        """By how much every exchange (leaving, entering) lowers Q, all refitted: [k, p − k].

        Entering alone lowers Q by g²/2s with the gradient g and the Schur complement s of the weight; leaving alone
        raises it by x²/(2[G⁻¹]ᵢᵢ). Leaving is counted after entering, which has moved x and G⁻¹.
        """
        shared, s, g = self.gains()
        moved = self.inverse @ shared
        after = self.weights[:, None] + moved * (g / s)
        return g * g / (2 * s) - after**2 / (2 * ((self.inverse**2).sum(1)[:, None] + moved**2 / s))


@dataclass(frozen=True)
class Found:
    """Where a descent ends; `local`: no exchange lowers Q by more than `LOCAL` of it."""

    refit: Refit
    history: list[float]
    local: bool


def best_of_starts(problem: Problem, quota: Quota, support: Tensor | None = None) -> Found:
    """Descend from the support given, or from each of four starts, and keep the best.

    >>> from espalier.select.patterns import cardinality
    >>> problem = Problem.of(torch.tensor([[0.0, 3.0]]), None, torch.tensor([2.0, 1.0]), ridge=0.5)
    >>> best_of_starts(problem, cardinality(1, 2)).refit.support
    array([False,  True])
    """
    compact, room = Compact.of(problem), quota.quota.numpy()
    if support is not None:
        return descend(compact, quota, support.numpy().copy())
    cell, every = quota.cell_numpy, np.ones(problem.p, dtype=bool)
    size, norms = np.abs(compact.w_bar), np.sqrt((compact.A**2).sum(0) + compact.rho)
    starts = [quota.project(torch.from_numpy(score)).numpy() for score in (size, size * norms)]
    starts.append(grown(compact, cell, room, ~every))
    with suppress(np.linalg.LinAlgError):  # all weights together may depend on each other where those that stay do not
        starts.append(shrunk(compact, cell, room, every))
    unique = {start.tobytes(): start for start in starts}
    return min((descend(compact, quota, start) for start in unique.values()), key=lambda found: found.refit.value)


def descend(compact: Compact, quota: Quota, support: np.ndarray) -> Found:
    """Make the best of all exchanges as long as one lowers Q."""
    now = Refit(compact, support)
    history = [now.value]
    cell = quota.cell_numpy
    while True:
        on, off = np.flatnonzero(now.support), np.flatnonzero(~now.support)
        if not len(on) or not len(off):
            return Found(now, history, True)
        nets = np.where(cell[on][:, None] == cell[off], now.nets(), -np.inf)
        after = None
        for flat in np.argsort(nets, axis=None)[: -1 - TRIES : -1]:
            i, j = np.unravel_index(flat, nets.shape)
            if not nets[i, j] > 1e-10 * now.value:
                break
            trial = now.support.copy()
            trial[on[i]], trial[off[j]] = False, True
            after = Refit(compact, trial)
            if after.value < now.value * (1 - 1e-12):
                break
            after = None  # worth less than rounding
        if after is None:
            return Found(now, history, bool(nets.max() <= LOCAL * now.value) and now.pivot > 1e-10)
        now = after
        history.append(now.value)


def shrunk(compact: Compact, cell: np.ndarray, room: np.ndarray, support: np.ndarray) -> np.ndarray:
    """Take out the weight that costs least, all refitted, until each cell holds `room` at most."""
    index, whole = np.flatnonzero(support), Refit(compact, support)
    x, inverse, cell = whole.weights, whole.inverse @ whole.inverse.T, cell[index]
    over = np.maximum(np.bincount(cell, minlength=len(room)) - room, 0)
    stays = np.ones(len(index), dtype=bool)
    for _ in range(int(over.sum())):
        cost = np.where(stays & (over[cell] > 0), x * x / np.where(stays, inverse.diagonal(), 1.0), np.inf)
        i = int(cost.argmin())
        column = inverse[i] / inverse[i, i]
        x = x - column * x[i]
        inverse = inverse - np.outer(column, inverse[i])
        stays[i], over[cell[i]] = False, over[cell[i]] - 1
    out = np.zeros_like(support)
    out[index[stays]] = True
    return out


def grown(compact: Compact, cell: np.ndarray, room: np.ndarray, support: np.ndarray) -> np.ndarray:
    """Bring in the weight that gains most, all refitted, until each cell holds `room`."""
    support = support.copy()
    room = room - np.bincount(cell[support], minlength=len(room))
    while (room > 0).any():
        off = np.flatnonzero(~support)
        _, s, g = Refit(compact, support).gains()
        j = off[int(np.where(room[cell[off]] > 0, g * g / s, -np.inf).argmax())]
        support[j], room[cell[j]] = True, room[cell[j]] - 1
    return support
