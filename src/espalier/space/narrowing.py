"""What a solution leaves of every axis."""

from collections.abc import Iterable
from functools import cached_property

import numpy as np
import torch
from torch import fx

from espalier.graph.axes import Axes, Labels
from espalier.rules import Kept

NO_AXES = Axes({}, {}, frozenset(), {}, frozenset(), {}, {})


class Narrowing:
    """The removal of components of coupled axes, seen from any tensor."""

    def __init__(self, axes: Axes = NO_AXES, removed: Iterable[int] = ()):
        self.axes = axes
        self.removed = np.fromiter(removed, dtype=np.int64)
        self._of: dict[fx.Node, Kept] = {}

    def __bool__(self) -> bool:
        return len(self.removed) > 0

    @cached_property
    def _gone(self) -> np.ndarray:
        gone = np.zeros(int(self.removed.max()) + 1 if len(self.removed) else 0, dtype=bool)
        gone[self.removed] = True
        return gone

    def of(self, node: fx.Node) -> Kept:
        """Axis → indices that stay, for the axes of the node's value that lose something."""
        if not self or node not in self.axes.labels or isinstance(node.meta["val"], (tuple, list)):
            return {}
        if node not in self._of:
            self._of[node] = self._kept(self.axes.labels[node])
        return self._of[node]

    def of_parameter(self, name: str) -> Kept:
        """The same for a parameter."""
        return self._kept(self.axes.parameters[name]) if self and name in self.axes.parameters else {}

    def _kept(self, labels: Labels) -> Kept:
        kept: Kept = {}
        for dim, axis in enumerate(labels):
            if axis is not None:
                gone = (axis < len(self._gone)) & self._gone[np.minimum(axis, len(self._gone) - 1)]
                if gone.any():
                    kept[dim] = torch.from_numpy(np.flatnonzero(~gone))
        return kept
