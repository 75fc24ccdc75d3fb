"""Proximal maps: ``argmin_w  r(w) + τ/2 |w - b|²``, pure and vectorised over a flat view.

With ``b = w - v/τ`` this is the subproblem (1a) of GSparsity; Eq. (1b) there is misprinted. The closed form
for ``r = Σ μ_k |w_k|`` is ``ŵ_k = max(0, 1 - μ_k / (τ |b_k|)) b_k``.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


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
        """One sum per group [count], of a flat vector."""
        per_run = torch.segment_reduce(x, "sum", lengths=self.length, unsafe=True)
        return torch.zeros(self.count, dtype=x.dtype, device=x.device).index_add_(0, self.group, per_run)

    def norm(self, x: Tensor) -> Tensor:
        """The Euclidean norm of every group."""
        return self.sum(x * x).sqrt()

    def spread(self, per_group: Tensor) -> Tensor:
        """Each element's group's value [elements]."""
        return per_group.index_select(0, self.owner)

    @cached_property
    def owner(self) -> Tensor:
        """The group of every element, int64 [elements]."""
        return torch.repeat_interleave(self.group, self.length, output_size=self.total)


def l1(b: Tensor, mu: Tensor | float, tau: Tensor | float = 1.0) -> Tensor:
    """``r = μ |w|₁``: soft thresholding.

    >>> l1(torch.tensor([-2.0, 0.5, 3.0]), mu=1.0).tolist()
    [-1.0, 0.0, 2.0]
    """
    bound = mu / tau
    return (
        b - torch.maximum(torch.minimum(b, bound), -bound) if isinstance(bound, Tensor) else b - b.clamp(-bound, bound)
    )


def box(b: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """``r`` = 0 for ``low <= w <= high``, else infinite; ``low=0`` alone means nonnegative."""
    return b.clamp(low, high)


def nonnegative(b: Tensor) -> Tensor:
    """``r`` = 0 for ``w >= 0``, else infinite."""
    return b.clamp_min(0.0)


def shrink_factor(norm: Tensor, mu: Tensor | float, tau: Tensor | float = 1.0) -> Tensor:
    """``max(0, 1 - μ_k / (τ_k |b_k|))`` per group; 0 where the group is already zero and μ is not."""
    tiny = torch.finfo(norm.dtype).tiny
    return (1.0 - mu / (tau * norm).clamp_min(tiny)).clamp_min(0.0)


def group_l21(b: Tensor, runs: Runs, mu: Tensor | float, tau: Tensor | float = 1.0) -> Tensor:
    """``r = Σ μ_k |w_k|₂`` over groups; μ and τ are one number each, or one per group.

    >>> b, runs = torch.tensor([3.0, 4.0, 0.1]), Runs.of(torch.tensor([0, 0, 1]), 2)
    >>> group_l21(b, runs, mu=2.5).tolist()
    [1.5, 2.0, 0.0]
    """
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


def combined(
    b: Tensor,
    runs: Runs,
    mu: Tensor | float = 0.0,
    tau: Tensor | float = 1.0,
    sparsity: float = 0.0,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    """``r = Σ μ_k |w_k|₂ + sparsity |w|₁``, within a box.

    The sum's map is the maps in turn: L1, the box, the groups. That holds for L1 with any box, for L1 with
    groups, and for all three where the box is ``[0, ∞)`` or ``(-∞, 0]``, a cone; a group norm in any other
    box has no closed form and raises ValueError. ``tau`` is one number, or one per group.
    """
    grouped = isinstance(mu, Tensor) or mu > 0
    cone = (low, high) in ((None, None), (0.0, None), (None, 0.0))
    if grouped and not cone:
        raise ValueError("a group norm within a box has no closed form: bound one side at 0, or use L1 instead.")
    if sparsity:
        b = l1(b, sparsity, runs.spread(tau) if isinstance(tau, Tensor) and tau.ndim else tau)
    if low is not None or high is not None:
        b = box(b, low, high)
    return group_l21(b, runs, mu, tau) if grouped else b
