"""Which supports are allowed: a quota of weights in each cell of a partition.

One constraint covers a global budget (one cell), per-layer budgets (a cell per tensor) and N:M patterns
(a cell per M neighbours). Blocks and whole structures are the groups of `structured`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from espalier.curvature.layout import WeightLayout


@dataclass(frozen=True)
class Quota:
    """At most quota[c] of the weights whose cell is c.

    >>> Quota(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1])).project(torch.tensor([1.0, 2.0, 5.0, 4.0]))
    tensor([False,  True,  True, False])

    cell: int64 [p], the cell of each weight, counted from 0. quota: int64 [cells].
    """

    cell: Tensor
    quota: Tensor

    def __post_init__(self) -> None:
        sizes = torch.bincount(self.cell, minlength=len(self.quota))
        if len(sizes) > len(self.quota):
            raise ValueError(f"weights lie in {len(sizes)} cells, but quota has {len(self.quota)} entries")
        if bool((self.quota < 0).any()) or bool((self.quota > sizes).any()):
            bad = int(((self.quota < 0) | (self.quota > sizes)).nonzero()[0])
            raise ValueError(
                f"cell {bad} has {int(sizes[bad])} weights; its quota {int(self.quota[bad])} is out of range"
            )
        if int(self.quota.sum()) < 1:
            raise ValueError("k = 0: at least one weight must stay")

    @property
    def kept(self) -> int:
        """Number of weights that stay, k."""
        return int(self.quota.sum())

    @property
    def single(self) -> bool:
        """Whether this is one global budget."""
        return len(self.quota) == 1

    @cached_property
    def cell_numpy(self) -> np.ndarray:
        """The cells as an array, for the solvers' inner loops."""
        return self.cell.numpy()

    def project(self, score: Tensor) -> Tensor:
        """The allowed support, bool [p], with the largest total score."""
        keep = torch.zeros(len(score), dtype=torch.bool)
        if self.single:
            keep[score.topk(int(self.quota[0])).indices] = True
            return keep
        order = score.argsort(descending=True, stable=True)
        order = order[self.cell[order].argsort(stable=True)]
        cells = self.cell[order]
        start = torch.cumsum(torch.bincount(self.cell, minlength=len(self.quota)), 0)
        start = torch.cat([start.new_zeros(1), start[:-1]])
        rank = torch.arange(len(order)) - start[cells]
        keep[order[rank < self.quota[cells]]] = True
        return keep

    def among(self, mine: Tensor) -> Quota:
        """The same quotas for the weights that `mine`, bool [p], names in this order; all others stay.

        >>> Quota(torch.tensor([0, 0]), torch.tensor([1])).among(torch.tensor([True, False, True])).kept
        2
        """
        cell = torch.full(mine.shape, len(self.quota))
        cell[mine] = self.cell
        return Quota(cell, torch.cat([self.quota, (~mine).sum().view(1)]))

    def restrict(self, index: Tensor) -> Quota:
        """The same quotas over a subset of the weights (which must still be able to fill them)."""
        return Quota(self.cell[index], self.quota)


def count_of(fraction: float, total: int) -> int:
    """How many of `total` weights a fraction allows: rounded down, but not for the last digit of a float.

    >>> int(0.29 * 100), count_of(0.29, 100)
    (28, 29)
    """
    return int(fraction * total * (1 + 1e-12) + 1e-9)


def cardinality(k: int, p: int) -> Quota:
    """At most k of all p weights.

    >>> cardinality(2, 4).project(torch.tensor([3.0, 1.0, 2.0, 0.0]))
    tensor([ True, False,  True, False])
    """
    if not 1 <= k <= p:
        raise ValueError(f"k = {k} weights to keep, but it must lie between 1 and p = {p}")
    return Quota(torch.zeros(p, dtype=torch.int64), torch.tensor([k]))


def per_layer(layout: WeightLayout, keep: float | Mapping[str, float]) -> Quota:
    """A budget for each tensor: one fraction for all, or one per parameter name; each keeps a weight."""
    fractions = [keep if isinstance(keep, int | float) else keep[name] for name in layout.names]
    for name, fraction in zip(layout.names, fractions, strict=True):
        if not 0 < fraction <= 1:
            raise ValueError(f"{name}: the fraction of weights to keep is {fraction}, but must lie in (0, 1]")
    quota = [max(1, count_of(f, size)) for f, size in zip(fractions, layout.sizes, strict=True)]
    return Quota(layout.tensor_index(), torch.tensor(quota))


def n_of_m(layout: WeightLayout, n: int, m: int) -> Quota:
    """Keep n of every m neighbours along the input dimension, per output and kernel position.

    >>> layout = WeightLayout(("w",), ((1, 4),))
    >>> n_of_m(layout, 2, 4).project(torch.tensor([1.0, 4.0, 3.0, 2.0]))
    tensor([False,  True,  True, False])

    The last neighbours of a row whose length m does not divide keep min(n, their number).
    """
    if not 1 <= n <= m:
        raise ValueError(f"{n}:{m} is not a pattern: n must lie between 1 and m")
    cells, first = [], 0
    for shape in layout.shapes:
        outputs, inputs = shape[0], shape[1]
        positions = int(np.prod(shape[2:], dtype=np.int64))
        per_row = -(-inputs // m)
        o, i, s = np.ogrid[:outputs, :inputs, :positions]
        cells.append((first + (o * positions + s) * per_row + i // m).reshape(-1))
        first += outputs * positions * per_row
    cell = torch.from_numpy(np.concatenate(cells))
    return Quota(cell, torch.bincount(cell, minlength=first).clamp_max(n))
