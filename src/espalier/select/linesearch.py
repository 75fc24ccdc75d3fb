"""The exact line search of CHITA: the best step of one iterative hard-thresholding update.

g(τ) = Q(P(w − τ∇Q(w))) is piecewise quadratic; its pieces end where an index enters or leaves the support.
On an interval of τ each |wᵢ − τgᵢ| has a lower and an upper bound, so most indices are certainly in or
certainly out; only the others can change sides. Intervals are halved until few of those are left, whose
crossings are then enumerated exactly. An interval is skipped when a lower bound of its objective, by the
triangle inequality in the norm ‖(r, √ρ δ)‖ = √(2Q), is above the best step found.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from espalier.select.patterns import Quota

MAX_UNDECIDED = 24


@dataclass(frozen=True)
class Step:
    """τ and Q(τ) of the best step; `exact` says whether it is proven to be the global minimum."""

    tau: float
    objective: float
    exact: bool
    intervals: int


@dataclass
class _Line:
    """The half-line w − τg seen from the current w, in float64. rows: Aᵀ, one row per active weight."""

    rows: np.ndarray
    misfit: np.ndarray  # b − Aw
    w: np.ndarray
    g: np.ndarray
    w_bar: np.ndarray
    rho: float
    rest: float  # ridge cost of the weights that are not active
    cell: np.ndarray
    quota: np.ndarray

    def __post_init__(self) -> None:
        delta = self.w - self.w_bar
        self.coefficients_in = np.stack([delta**2, -2 * self.g * delta, self.g**2], 1)
        self.coefficients_out = self.w_bar**2
        self.norms = np.sqrt(np.einsum("ij,ij->i", self.rows, self.rows, dtype=np.float64) + self.rho)

    def value(self, tau: float | np.ndarray, index: slice | np.ndarray = slice(None)) -> np.ndarray:
        return np.abs(self.w[index] - tau * self.g[index])

    def product(self, values: np.ndarray, index: np.ndarray) -> np.ndarray:
        """values @ rows[index], in the rows' own type: they are too many to convert."""
        return (values.astype(self.rows.dtype) @ self.rows[index]).astype(np.float64)


@dataclass
class _Interval:
    """[low, high] with its certain part: misfit c + τv and ‖δ‖² as a polynomial in τ."""

    low: float
    high: float
    undecided: np.ndarray
    c: np.ndarray
    v: np.ndarray
    ridge: np.ndarray
    slots: np.ndarray  # places per cell that are left to the undecided


def exact_line_search(
    rows: np.ndarray,
    misfit: np.ndarray,
    w: np.ndarray,
    g: np.ndarray,
    w_bar: np.ndarray,
    rho: float,
    quota: Quota,
    rest: float = 0.0,
    max_intervals: int = 400,
) -> Step:
    """Minimise g(τ) = Q(P(w − τg)) over τ ≥ 0.

    >>> from espalier.select.patterns import cardinality
    >>> one = np.ones(1)
    >>> round(exact_line_search(one[None], one, 0 * one, -one, 0 * one, 1.0, cardinality(1, 1)).tau, 6)
    0.5

    rows: [q, n] float, the active columns of A. misfit: b − Aw, float64 [n]. w, g, w_bar: float64 [q]; g is
    the gradient of Q on the active weights. `rest`: (ρ/2)‖w̄‖² over the weights that are not active.
    """
    line = _Line(rows, misfit, w, g, w_bar, rho, rest, quota.cell_numpy, quota.quota.numpy())
    start = 0.5 * float(misfit @ misfit) + 0.5 * rho * float(np.sum((w - w_bar) ** 2)) + rest
    best = (0.0, start)
    size = np.sqrt(_largest_squares(g**2, line))
    if size == 0:
        return Step(0.0, start, True, 0)
    # ‖P(w − τg)‖ ≥ τ‖P(g)‖ − ‖w‖, so beyond `far` the ridge alone exceeds Q(w)
    far = (np.sqrt(2 * start / rho) + np.linalg.norm(w) + np.linalg.norm(w_bar)) / size
    whole = _root(line, far)
    queue: list[tuple[float, int, _Interval]] = []
    count, exact = 0, True
    edges = _first_edges(line, far)
    waiting = [_narrow(line, whole, a, b) for a, b in pairwise(edges)]
    while waiting or queue:
        for interval in waiting:
            count += 1
            best = min(best, _middle(line, interval), key=lambda pair: pair[1])
            heapq.heappush(queue, (_lower_bound(line, interval), count, interval))
        waiting = []
        bound, _, interval = heapq.heappop(queue)
        if bound >= best[1] * (1 - 1e-12):
            break
        narrow = interval.high - interval.low <= 1e-12 * interval.high
        if len(interval.undecided) <= MAX_UNDECIDED or narrow:
            best = min(best, _enumerate(line, interval), key=lambda pair: pair[1])
        elif count >= max_intervals:
            exact = False
            break
        else:
            middle = 0.5 * (interval.low + interval.high)
            waiting = [
                _narrow(line, interval, interval.low, middle),
                _narrow(line, interval, middle, interval.high),
            ]
    return Step(best[0], best[1], exact, count)


def _largest_squares(squares: np.ndarray, line: _Line) -> float:
    if len(line.quota) == 1:
        k = int(line.quota[0])
        return float(np.partition(squares, len(squares) - k)[len(squares) - k :].sum())
    return float(squares[_rank_in_cell(squares, line.cell) < line.quota[line.cell]].sum())


def _rank_in_cell(score: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Rank from 0 of each score within its cell, largest first; rows of a 2-d score are separate."""
    cells = np.broadcast_to(cell, score.shape)
    order = np.lexsort((-score, cells), axis=-1)
    ordered = np.take_along_axis(cells, order, -1)
    place = np.broadcast_to(np.arange(score.shape[-1]), score.shape)
    new = np.ones(score.shape, dtype=bool)
    new[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    start = np.maximum.accumulate(np.where(new, place, 0), axis=-1)
    rank = np.empty(score.shape, dtype=np.int64)
    np.put_along_axis(rank, order, place - start, -1)
    return rank


def _first_edges(line: _Line, far: float) -> np.ndarray:
    inside = line.w != 0
    g = np.where(inside, line.g, 0) if np.any(line.g[inside]) else line.g
    Ag = line.rows.T @ g
    guess = float(g @ g / (Ag @ Ag + line.rho * (g @ g)))
    edges = [t for t in guess * 4.0 ** np.arange(-2, 4) if t < far]
    return np.array([0.0, *edges, far])


def _root(line: _Line, far: float) -> _Interval:
    n = len(line.misfit)
    everything = np.arange(len(line.w))
    return _Interval(0.0, far, everything, line.misfit.copy(), np.zeros(n), np.zeros(3), line.quota.copy())


def _narrow(line: _Line, parent: _Interval, low: float, high: float) -> _Interval:
    """The part [low, high] of an interval: decide what its smaller length lets one decide."""
    some = parent.undecided
    x, g = line.w[some], line.g[some]
    ends = np.abs(x - low * g), np.abs(x - high * g)
    upper = np.maximum(*ends)
    lower = np.where((x - low * g) * (x - high * g) <= 0, 0.0, np.minimum(*ends))
    bar_low, bar_high = _thresholds(lower, upper, line.cell[some], parent.slots)
    inside, outside = lower > bar_high, (upper < bar_low) | (upper == 0)
    c, v, ridge = parent.c, parent.v, parent.ridge
    leaving = some[outside & (x != 0)]
    if len(leaving):
        c = c + line.product(line.w[leaving], leaving)
    if inside.any():
        v = v + line.product(line.g[some[inside]], some[inside])
    ridge = ridge + line.coefficients_in[some[inside]].sum(0)
    ridge[0] += line.coefficients_out[some[outside]].sum()
    taken = np.bincount(line.cell[some[inside]], minlength=len(parent.slots))
    return _Interval(low, high, some[~(inside | outside)], c, v, ridge, parent.slots - taken)


def _thresholds(
    lower: np.ndarray, upper: np.ndarray, cell: np.ndarray, slots: np.ndarray
) -> tuple[np.ndarray | float, np.ndarray | float]:
    """Per weight, bounds of its cell's threshold (the smallest value that is still kept) on the interval."""
    if len(slots) == 1:
        k, m = int(slots[0]), len(lower)
        if k <= 0 or k >= m:
            return (np.inf, np.inf) if k <= 0 else (-np.inf, -np.inf)
        return np.partition(lower, m - k)[m - k], np.partition(upper, m - k)[m - k]
    out = []
    for values in (lower, upper):
        bar = np.full(len(slots), np.inf)
        sizes = np.bincount(cell, minlength=len(slots))
        bar[sizes <= slots] = -np.inf
        last = (_rank_in_cell(values, cell) == slots[cell] - 1) & (sizes > slots)[cell]
        bar[cell[last]] = values[last]
        out.append(bar[cell])
    return out[0], out[1]


def _pieces(line: _Line, interval: _Interval, member: np.ndarray) -> np.ndarray:
    """Coefficients (1, τ, τ²) of Q for each row of memberships of the undecided."""
    some = interval.undecided
    x, g = line.w[some], line.g[some]
    c = interval.c + line.product(~member * x, some)
    v = interval.v + line.product(member * g, some)
    ridge = interval.ridge + member @ line.coefficients_in[some]
    ridge[:, 0] += ~member @ line.coefficients_out[some]
    misfit = np.stack([(c * c).sum(1), 2 * (c * v).sum(1), (v * v).sum(1)], 1)
    out = 0.5 * (misfit + line.rho * ridge)
    out[:, 0] += line.rest
    return out


def _minimum(poly: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[float, float]:
    with np.errstate(divide="ignore", invalid="ignore"):
        tau = np.where(poly[:, 2] > 0, -poly[:, 1] / (2 * poly[:, 2]), low)
    # A piece's minimum may lie at its end, where P may break the tie in favour of the next piece: stay inside
    margin = 1e-9 * (high - low)
    tau = np.clip(tau, low + margin, high - margin)
    value = poly[:, 0] + tau * (poly[:, 1] + tau * poly[:, 2])
    i = int(np.argmin(value))
    return float(tau[i]), float(value[i])


def _members(line: _Line, interval: _Interval, tau: np.ndarray) -> np.ndarray:
    some = interval.undecided
    if not len(some):
        return np.zeros((len(tau), 0), dtype=bool)
    values = np.abs(line.w[some] - tau[:, None] * line.g[some])
    return _rank_in_cell(values, line.cell[some]) < interval.slots[line.cell[some]]


def _middle(line: _Line, interval: _Interval) -> tuple[float, float]:
    """One attainable value of the interval: the objective at its middle."""
    tau = np.array([0.5 * (interval.low + interval.high)])
    poly = _pieces(line, interval, _members(line, interval, tau))
    return _minimum(poly, tau, tau)


def _lower_bound(line: _Line, interval: _Interval) -> float:
    some = interval.undecided
    if len(some) > 4096:  # the bound would be worth nothing yet
        return 0.0
    none = np.zeros((1, len(some)), dtype=bool)
    poly = _pieces(line, interval, none)
    poly[:, 0] -= line.rest
    _, base = _minimum(poly, np.array([interval.low]), np.array([interval.high]))
    reach = np.maximum(line.value(interval.low, some), line.value(interval.high, some)) * line.norms[some]
    places = int(min(interval.slots.sum(), len(some)))
    reach = np.partition(reach, len(reach) - places)[len(reach) - places :].sum() if places else 0.0
    return 0.5 * max(0.0, np.sqrt(2 * max(base, 0.0)) - reach) ** 2 + line.rest


def _enumerate(line: _Line, interval: _Interval) -> tuple[float, float]:
    """The minimum over an interval, from all crossings of the undecided."""
    some = interval.undecided
    x, g = line.w[some], line.g[some]
    i, j = np.triu_indices(len(some), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cuts = np.concatenate([(x[i] - x[j]) / (g[i] - g[j]), (x[i] + x[j]) / (g[i] + g[j])])
    cuts = np.unique(cuts[(cuts > interval.low) & (cuts < interval.high)])
    edges = np.concatenate([[interval.low], cuts, [interval.high]])
    member = _members(line, interval, 0.5 * (edges[1:] + edges[:-1]))
    return _minimum(_pieces(line, interval, member), edges[:-1], edges[1:])
