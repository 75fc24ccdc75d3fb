"""Where a data-movement operator takes every index: run it on index labels and read its result."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Flat = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Movement:
    """One result of a data-movement operator: ``source`` [its shape] is the flat index that every element came from.

    -1 marks elements that come from nowhere (padding).
    """

    shape: tuple[int, ...]
    source: Flat

    def digit(self, dim: int) -> Flat:
        """The index along input axis ``dim`` of every element's source."""
        stride = int(np.prod(self.shape[dim + 1 :], dtype=np.int64))
        return np.where(self.source < 0, -1, self.source // stride % self.shape[dim])

    def depends(self, digit: Flat) -> dict[int, Flat] | None:
        """Per output axis along which the digit varies, how far it moves; None unless the moves add up."""
        if not digit.size:
            return {}  # nothing is left of the axis
        if (digit < 0).any():
            return None
        origin = digit[(0,) * digit.ndim]
        lines: dict[int, Flat] = {}
        total = np.full((1,) * digit.ndim, origin)
        for axis in range(digit.ndim):
            at: list[int | slice] = [0] * digit.ndim
            at[axis] = slice(None)
            line = digit[tuple(at)] - origin
            if line.any():
                lines[axis] = line
                shape = [1] * digit.ndim
                shape[axis] = -1
                total = total + line.reshape(shape)
        return lines if (total == digit).all() else None


def labelled(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor that holds each element's own flat index."""
    return torch.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)


def movements(shape: tuple[int, ...], operator: Callable[[torch.Tensor], object]) -> list[Movement]:
    """What ``operator`` does to a tensor of this shape, one :class:`Movement` per result."""
    results = operator(labelled(shape))
    tensors = results if isinstance(results, (tuple, list)) else [results]
    return [Movement(shape, np.ascontiguousarray(t.numpy())) for t in tensors if isinstance(t, torch.Tensor)]
