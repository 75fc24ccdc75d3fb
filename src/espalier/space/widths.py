"""How many structures a family may keep, and what keeping the best of them is worth."""

import math
from collections.abc import Sequence

import numpy as np

from espalier.space.budget import Budget
from espalier.space.structure import Family


class Widths:
    """The permitted numbers of structures of every family; which ones stay follows from their scores.

    ``values`` [families] holds, of any numbers kept, the sum of the highest scores. Segments are not narrowed: they
    are families of one that stay at 1 here.
    """

    def __init__(self, families: Sequence[Family], scores: np.ndarray, budget: Budget, floor: float):
        """``scores``: one per structure, at least 0. ``floor``: the share that a family keeps without ``min_keep``."""
        self.full = np.array([f.count for f in families], dtype=np.int64)
        starts = np.cumsum([0, *self.full])
        own = np.split(scores, starts[1:-1])
        self.order = [np.argsort(-each, kind="stable") for each in own]
        sums = [np.cumsum(np.concatenate([[0.0], each[o]])) for each, o in zip(own, self.order, strict=True)]
        self._sums, self._at = np.concatenate(sums), starts[:-1] + np.arange(len(families))
        self.multiple = np.array([_multiple(f, budget.round_to) for f in families], dtype=np.int64)
        self.least = np.array([_least(f, budget, floor) for f in families], dtype=np.int64)
        most = [budget.most(f.name, f.count) if f.level != "segment" else 1 for f in families]
        self.start = self.at_most(np.maximum(np.array(most, dtype=np.int64), self.least))

    def values(self, kept: np.ndarray) -> np.ndarray:
        """[..., families]: the sum of the scores of what stays."""
        return self._sums[self._at + kept]

    def at_most(self, kept: np.ndarray) -> np.ndarray:
        """The largest permitted numbers up to these; the smallest permitted where there is none."""
        down = np.minimum(kept, self.full) // self.multiple * self.multiple
        lowest = np.minimum(-(-self.least // self.multiple) * self.multiple, self.full)
        return np.where(kept >= self.full, self.full, np.maximum(down, lowest))

    def lower(self, kept: np.ndarray, step: np.ndarray | int = 1) -> np.ndarray:
        """The next permitted numbers that are at least ``step`` smaller, or as much smaller as may be."""
        return np.minimum(self.at_most(kept - step), kept)

    def higher(self, kept: np.ndarray, step: np.ndarray | int = 1) -> np.ndarray:
        """The next permitted numbers that are at least ``step`` larger, up to where the families start."""
        up = -(-(kept + step) // self.multiple) * self.multiple
        return np.maximum(np.minimum(up, self.start), kept)

    def permitted(self, family: int) -> np.ndarray:
        """All permitted numbers of one family, ascending."""
        every = np.arange(self.full[family] + 1)
        fits = (every % self.multiple[family] == 0) | (every == self.full[family])
        low, high = self.at_most(np.zeros_like(self.full))[family], self.start[family]
        return every[fits & (every >= low) & (every <= high)]


def _multiple(family: Family, round_to: int) -> int:
    """So many structures at a time keep the layer's width a multiple of ``round_to``."""
    if family.components is None or round_to == 1:
        return 1
    owned = [int((s.owner >= 0).sum()) // family.count for s in family.slices if s.owner is not None]
    return round_to // math.gcd(round_to, *owned[:1])


def _least(family: Family, budget: Budget, floor: float) -> int:
    if family.level == "segment":
        return 1
    if family.components is None:
        return 0
    return budget.least(family.name, family.count, floor)
