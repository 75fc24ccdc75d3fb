"""Proximal maps: ``argmin_w  r(w) + τ/2 |w - b|²``, pure and vectorised over a flat view.

With ``b = w - v/τ`` this is the subproblem (1a) of GSparsity; Eq. (1b) there is misprinted. The closed form
for ``r = Σ μ_k |w_k|`` is ``ŵ_k = max(0, 1 - μ_k / (τ |b_k|)) b_k``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

PIECE = 4096  # elements that are added up one after the other: in single precision a long such sum loses its end


@dataclass(frozen=True, eq=False)
class Runs:
    """Groups over a flat vector, as runs of neighbouring elements that share a group.

    ``length`` and ``group``: int64 [runs]; ``count``: number of groups. A group may have many runs.

    >>> runs = Runs.of(torch.tensor([0, 0, 1, 0]), count=2)
    >>> runs.sum(torch.tensor([1.0, 2.0, 4.0, 8.0])).tolist()
    [11.0, 4.0]
    """

    length: Tensor
    group: Tensor
    count: int
    total: int

    @classmethod
    def of(cls, owner: Tensor, count: int) -> "Runs":
        """From the group of every element: int64 [elements], all in 0 … count - 1."""
        group, length = torch.unique_consecutive(owner, return_counts=True)
        return cls(length, group, count, len(owner))

    def sum(self, x: Tensor) -> Tensor:
        """One sum per group [count], of a flat vector, as precise for large groups as for small ones."""
        length, group = self._pieces
        per_piece = torch.segment_reduce(x, "sum", lengths=length, unsafe=True).double()
        total = torch.zeros(self.count, dtype=torch.float64, device=x.device)
        return total.index_add_(0, group, per_piece).to(x.dtype)

    def norm(self, x: Tensor) -> Tensor:
        """The Euclidean norm of every group."""
        return self.sum(x * x).sqrt()

    def spread(self, per_group: Tensor) -> Tensor:
        """Each element's group's value [elements]."""
        return per_group.index_select(0, self.owner)

    @cached_property
    def _pieces(self) -> tuple[Tensor, Tensor]:
        """Length and group of the runs, long ones cut into pieces."""
        if not bool((self.length > PIECE).any()):
            return self.length, self.group
        count = (self.length + PIECE - 1) // PIECE
        run = torch.repeat_interleave(count)
        nth = torch.arange(len(run), device=run.device) - (count.cumsum(0) - count)[run]
        return (self.length[run] - nth * PIECE).clamp_max(PIECE), self.group[run]

    @cached_property
    def owner(self) -> Tensor:
        """The group of every element, int64 [elements]."""
        return torch.repeat_interleave(self.group, self.length, output_size=self.total)


def soft_threshold(b: Tensor, bound: Tensor | float) -> Tensor:
    """``b`` moved towards zero by ``bound``, which is not looked at; :func:`l1` is the map that checks it."""
    if isinstance(bound, Tensor):
        return b - torch.maximum(torch.minimum(b, bound), -bound)
    return b - b.clamp(-bound, bound)


def l1(b: Tensor, mu: Tensor | float, tau: Tensor | float = 1.0) -> Tensor:
    """``r = μ |w|₁``: soft thresholding. ValueError unless μ >= 0 and τ > 0.

    >>> l1(torch.tensor([-2.0, 0.5, 3.0]), mu=1.0).tolist()
    [-1.0, 0.0, 2.0]
    """
    _check(mu=mu, tau=tau)
    return soft_threshold(b, mu / tau)


def box(b: Tensor, low: Tensor | float | None = None, high: Tensor | float | None = None) -> Tensor:
    """``r`` = 0 for ``low <= w <= high``, else infinite; ``low=0`` alone means nonnegative.

    The bounds are numbers, or tensors that broadcast against ``b``. ValueError where low > high.
    """
    if low is None and high is None:
        return b
    if isinstance(low, float | int) and isinstance(high, float | int) and not low <= high:
        raise ValueError(f"low={low}, high={high}: low is at most high.")
    return _clamped(b, low, high)


def nonnegative(b: Tensor) -> Tensor:
    """``r`` = 0 for ``w >= 0``, else infinite."""
    return b.clamp_min(0.0)


def _clamped(b: Tensor, low: Tensor | float | None, high: Tensor | float | None) -> Tensor:
    if isinstance(low, Tensor) or isinstance(high, Tensor):  # torch takes no mixture of the two kinds
        low, high = (x if x is None or isinstance(x, Tensor) else b.new_tensor(x) for x in (low, high))
    return b.clamp(low, high)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _check(tau: Tensor | float = 1.0, **weights: Tensor | float) -> None:
    """Weights of penalties are at least 0, τ is positive. An accelerator's tensors would have to be waited for."""
    for name, value in weights.items():
        if not _all(value, lambda x: x >= 0.0):
            raise ValueError(f"{name}={value}: the weight of a penalty is a number, at least 0.")
    if not _all(tau, lambda x: x > 0.0):
        raise ValueError(f"tau={tau}: positive.")


def _all(value: Tensor | float, holds: Callable[[Any], Any]) -> bool:
    if isinstance(value, Tensor):
        return value.device.type != "cpu" or bool(holds(value).all())
    return bool(holds(value))


def shrink_factor(norm: Tensor, mu: Tensor | float, tau: Tensor | float = 1.0) -> Tensor:
    """``max(0, 1 - μ_k / (τ_k |b_k|))`` per group; 0 where the group is already zero and μ is not."""
    tiny = torch.finfo(norm.dtype).tiny
    return (1.0 - mu / (tau * norm).clamp_min(tiny)).clamp_min(0.0)


def group_l21(b: Tensor, runs: Runs, mu: Tensor | float, tau: Tensor | float = 1.0) -> Tensor:
    """``r = Σ μ_k |w_k|₂`` over groups; μ and τ are one number each, or one per group. ValueError unless μ >= 0, τ > 0.

    >>> b, runs = torch.tensor([3.0, 4.0, 0.1]), Runs.of(torch.tensor([0, 0, 1]), 2)
    >>> group_l21(b, runs, mu=2.5).tolist()
    [1.5, 2.0, 0.0]
    """
    _check(mu=mu, tau=tau)
    return b * runs.spread(shrink_factor(runs.norm(b), mu, tau))


def group_l21_per_element(
    b: Tensor, runs: Runs, mu: Tensor, tau: Tensor, start: Tensor | None = None, iterations: int = 16
) -> tuple[Tensor, Tensor]:
    """``argmin_w Σ μ_k |w_k|₂ + 1/2 Σ_j τ_j (w_j - b_j)²`` with a τ per element; and the norms ``|w_k|``.

    >>> b, runs = torch.tensor([3.0, 4.0, 0.1]), Runs.of(torch.tensor([0, 0, 1]), 2)
    >>> w, norms = group_l21_per_element(b, runs, torch.tensor([2.5, 2.5]), torch.ones(3))
    >>> [round(x, 4) for x in (*w.tolist(), *norms.tolist())]
    [1.5, 2.0, 0.0, 2.5, 0.0]

    ``mu`` [groups], ``tau`` [elements], positive. There is no closed form, but one equation per group: w_k is zero
    where ``|τ_k b_k| <= μ_k``, else ``w_j = b_j θ / (θ + μ_k / τ_j)`` where θ = ``|w_k|`` solves
    ``Σ_j (b_j / (θ + μ_k / τ_j))² = 1``. The reciprocal of the sum's root is concave in θ, so that Newton's first step
    from anywhere (``start`` [groups], the norms of a similar problem) lands left of the solution and all others rise
    to it; at most ``iterations`` are made, for all groups at once. The norm returned for a group with μ = 0 is 1.
    """
    free = mu == 0
    zero = (runs.norm(tau * b) <= mu) & ~free
    shift = runs.spread(mu) / tau
    tiny, precise = torch.finfo(b.dtype).tiny, torch.finfo(b.dtype).eps
    theta = torch.zeros_like(mu) if start is None else start
    for _ in range(iterations):
        share = 1.0 / (runs.spread(theta) + shift).clamp_min(tiny)
        squares = (b * share).square_()
        total, slope = runs.sum(squares), runs.sum(squares.mul_(share))
        rise = total * (total.sqrt() - 1.0) / slope.clamp_min(tiny)
        theta = torch.where(zero | free, 1.0, (theta + rise).clamp_min(0.0))
        if b.device.type == "cpu" and bool((rise.abs() <= 4 * precise * theta)[~zero & ~free].all()):
            break  # on a GPU the host would have to wait for the answer
    wide = runs.spread(theta)
    stays = (~zero).to(b.dtype)
    return b * (wide / (wide + shift)) * runs.spread(stays), theta * stays


def group_l21_in_box(
    b: Tensor,
    runs: Runs,
    mu: Tensor,
    tau: Tensor | float,
    low: Tensor | float | None,
    high: Tensor | float | None,
    start: Tensor | None = None,
    iterations: int = 48,
) -> tuple[Tensor, Tensor]:
    """``argmin_w Σ μ_k |w_k|₂ + 1/2 Σ_j τ_j (w_j - b_j)²`` for ``low <= w <= high``; and the norms ``|w_k|``.

    >>> b, runs = torch.tensor([3.0, 4.0, 0.1]), Runs.of(torch.tensor([0, 0, 1]), 2)
    >>> w, norms = group_l21_in_box(b, runs, torch.tensor([2.5, 2.5]), 1.0, 0.0, 1.6)
    >>> [round(x, 4) for x in (*w.tolist(), *norms.tolist())]
    [1.3724, 1.6, 0.0, 2.1079, 0.0]

    ``mu`` [groups]; ``tau``, ``low`` and ``high`` are numbers or one per element. As |w| is the least of
    ``|w|² / 2θ + θ/2`` over θ > 0, the elements of a group part for a given θ: ``w_j`` is ``b_j θ / (θ + μ_k / τ_j)``,
    put into the box, and θ = ``|w_k|`` is the one root of ``Σ_j (w_j / θ)² = 1``, whose left side falls. It is sought
    by Newton's method on the sum's root's reciprocal, concave between the θ at which an element meets its bound,
    from ``start`` [groups] (norms of a similar problem), within a bracket that is halved where a step leaves it and
    in every fourth; at most ``iterations`` steps, for all groups at once. w_k is zero where ``|τ_k b_k| <= μ_k``,
    without the elements that the box keeps from moving off zero towards b. The norm returned for a group with μ = 0
    is 1, or 0 where w_k is.
    """
    tiny, precise = torch.finfo(b.dtype).tiny, torch.finfo(b.dtype).eps
    low, high = (torch.zeros_like(b) + side for side in _sides(low, high))
    free, widest = mu == 0, b.clamp(low, high)
    far = float("inf")
    moves = b.clamp(torch.where(low < 0, -far, low), torch.where(high > 0, far, high))
    moves = torch.where((low > 0) | (high < 0), far, moves)  # cannot be zero
    zero = (runs.norm(tau * moves) <= mu) & ~free
    settled = zero | free
    shift = runs.spread(mu) / tau
    above, below = runs.norm(widest), torch.zeros_like(mu)
    there = above > 0
    theta = below.clone() if start is None else torch.minimum(start, above)
    for i in range(iterations):
        wide = runs.spread(theta).clamp_min(tiny)
        share = 1.0 / (wide + shift).clamp_min(tiny)
        unbounded = b * share
        each = unbounded.clamp(low / wide, high / wide)
        squares = each.square()
        total = runs.sum(squares)
        slope = runs.sum(squares * torch.where(each == unbounded, share, 1.0 / wide))
        above, below = torch.where(total < 1.0, theta, above), torch.where(total < 1.0, below, theta)
        off = total.sqrt() - 1.0
        rise = total * off / slope.clamp_min(tiny)
        newton = theta + rise
        arrived = settled | (off.abs() <= 16 * precise) | (above - below <= 4 * precise * above)
        inside = torch.minimum(torch.maximum(newton, below), above)
        good = (newton - inside).abs() <= (8 * precise * above if i % 4 < 3 else -1.0)  # now and then halved anyway
        theta = torch.where(arrived, theta, torch.where(good, inside, 0.5 * (below + above)))
        if b.device.type == "cpu" and bool(arrived.all()):
            break  # on a GPU the host would have to wait for the answer
    theta = torch.where(free, 1.0, theta)
    wide = runs.spread(theta)
    found = (b * (wide / (wide + shift).clamp_min(tiny))).clamp(low, high)
    stays = (~zero & (~free | there)).to(b.dtype)
    return torch.where(runs.spread(zero), 0.0, found), theta * stays


def _sides(low: Tensor | float | None, high: Tensor | float | None) -> tuple[Tensor | float, Tensor | float]:
    return -float("inf") if low is None else low, float("inf") if high is None else high


def is_cone(low: float | None, high: float | None) -> bool:
    """Whether a box is all numbers, those of one sign, or 0 alone: then the maps may follow one another.

    >>> is_cone(0.0, None), is_cone(0.0, 1.0)
    (True, False)
    """
    return low in (None, 0.0, -float("inf")) and high in (None, 0.0, float("inf"))


@dataclass(frozen=True, eq=False)
class Boxed:
    """The groups whose box is no cone: ``at``, the places of their elements; ``groups``, their numbers; their runs."""

    at: Tensor
    groups: Tensor
    runs: Runs

    @classmethod
    def of(cls, runs: Runs, boxed: Tensor) -> "Boxed":
        """Of ``boxed``, bool [groups]. The host waits for the device: make it once."""
        at = runs.spread(boxed).nonzero().flatten()
        place = boxed.long().cumsum(0) - 1
        groups = boxed.nonzero().flatten()
        return cls(at, groups, Runs.of(place[runs.owner[at]], len(groups)))

    def of_each(self, value: Tensor | float | None) -> Tensor | float | None:
        """Their elements' part of one number per element, or the number for all."""
        return value[self.at] if isinstance(value, Tensor) else value


def combined_(
    b: Tensor,
    runs: Runs,
    mu: Tensor,
    tau: Tensor | float,
    sparsity: Tensor | float,
    low: Tensor | float | None,
    high: Tensor | float | None,
    boxed: Boxed | None,
) -> Tensor:
    """:func:`combined` in place and without checks; returns a number per group [groups], 0 where it became zero.

    ``mu`` and a tensor ``tau`` have one number per group, other tensors one per element; ``boxed``: the
    groups whose box is no cone, None for none.
    """
    if isinstance(sparsity, Tensor) or sparsity:
        b.copy_(soft_threshold(b, sparsity / (runs.spread(tau) if isinstance(tau, Tensor) else tau)))
    inner = None if boxed is None else b[boxed.at]
    if low is not None or high is not None:
        b.copy_(_clamped(b, low, high))
    norm = runs.norm(b)
    factor = shrink_factor(norm, mu, tau)
    b.mul_(runs.spread(factor))
    factor.mul_(norm > 0)
    if boxed is not None and inner is not None:
        weight = mu[boxed.groups]
        each = tau[boxed.groups] if isinstance(tau, Tensor) else tau
        start = (boxed.runs.norm(inner) - weight / each).clamp_min(0.0)
        metric = boxed.runs.spread(each) if isinstance(each, Tensor) else each
        sides = boxed.of_each(low), boxed.of_each(high)
        b[boxed.at], factor[boxed.groups] = group_l21_in_box(inner, boxed.runs, weight, metric, *sides, start)
    return factor


def combined(
    b: Tensor,
    runs: Runs,
    mu: Tensor | float = 0.0,
    tau: Tensor | float = 1.0,
    sparsity: float = 0.0,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    """``r = Σ μ_k |w_k|₂ + sparsity |w|₁``, within a box; ``mu`` and ``tau`` are one number each, or one per group.

    >>> b, runs = torch.tensor([3.0, 4.0, 0.6]), Runs.of(torch.tensor([0, 0, 1]), 2)
    >>> combined(b, runs, mu=0.5, sparsity=0.2, low=0.0, high=1.0).tolist()
    [1.0, 1.0, 0.0]

    In a box that is a cone (all numbers, or those of one sign) the sum's map is the maps in turn: L1, the box, the
    groups. In any other box L1 comes first still, then :func:`group_l21_in_box`.
    Raises ValueError unless μ and ``sparsity`` are at least 0, τ is positive and low <= high; tensors on an
    accelerator are not looked at, since the host would have to wait for them.
    """
    _check(tau, mu=mu, sparsity=sparsity)
    box(b, low, high)
    weight = torch.zeros(runs.count, dtype=b.dtype, device=b.device) + mu
    metric = tau.expand(runs.count) if isinstance(tau, Tensor) else tau
    w = b.clone()
    boxed = None if is_cone(low, high) else Boxed.of(runs, torch.ones(runs.count, dtype=torch.bool, device=b.device))
    combined_(w, runs, weight, metric, sparsity, low, high, boxed)
    return w
