"""What the weight selectors accept: tensors or arrays, whole numbers or quotas."""

from __future__ import annotations

import math
import operator
import warnings
from typing import SupportsFloat, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from espalier.curvature.matrix import as_matrix
from espalier.select.patterns import Quota, cardinality

Array = Tensor | np.ndarray
Count = SupportsIndex | Quota


def matrix_of(A: Array) -> Tensor:
    """A as a tensor over the same memory, which is only read: a read-only mapped file will do.

    >>> matrix_of(np.ones((2, 3))).shape
    torch.Size([2, 3])
    """
    return as_matrix(_tensor("A", A))


def vector_of(name: str, value: Array, size: int, of: str) -> Tensor:
    """A finite floating vector of `size` entries, one for each of the columns or rows (`of`) of A.

    >>> vector_of("b", np.ones(2), 2, "rows")
    tensor([1., 1.], dtype=torch.float64)
    """
    vector = _tensor(name, value)
    if vector.shape != (size,):
        raise ValueError(f"{name} has shape {tuple(vector.shape)}, but A has {size} {of}")
    if not vector.is_floating_point():
        raise ValueError(f"{name} must be floating, got {vector.dtype}")
    finite = torch.isfinite(vector)
    if not bool(finite.all()):
        raise ValueError(f"{name} holds NaN or infinity at index {int((~finite).nonzero()[0])}")
    return vector


def quota_of(k: Count, p: int) -> Quota:
    """The supports that k allows: so many of all p weights, or a quota.

    >>> quota_of(np.int64(2), 4).kept
    2
    """
    if isinstance(k, Quota):
        if len(k.cell) != p:
            raise ValueError(f"the quota covers {len(k.cell)} weights, but A has {p} columns")
        return k
    try:
        if isinstance(k, bool | np.bool_):
            raise TypeError
        return cardinality(operator.index(k), p)
    except TypeError as error:
        raise TypeError(
            f"k = {k!r} is neither a whole number of weights nor a Quota; of a fraction, round p times it"
        ) from error


def ridge_of(ridge: SupportsFloat) -> float:
    """λ as a finite number.

    >>> ridge_of(torch.tensor(0.5))
    0.5
    """
    try:
        if isinstance(ridge, str):
            raise TypeError
        value = float(ridge)
    except (TypeError, ValueError) as error:
        raise TypeError(f"ridge λ = {ridge!r} is not a number") from error
    if math.isinf(value):
        raise ValueError(f"ridge λ = {value}: infinite, so that nothing but w̄ would count; 1e-5 to 1e-2 are usual")
    return value


def _tensor(name: str, value: Array) -> Tensor:
    if isinstance(value, np.ndarray):
        with warnings.catch_warnings():  # that the array cannot be written to, which nobody does
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(value)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: give a tensor or a numpy array")
    return value.detach()
