"""Products with a tall store of gradients A [n, p], whatever its type, layout or place.

A may be float64, float32 or bfloat16, row- or column-major, in memory or memory-mapped. Products run in the
type of `working_dtype`; what becomes n × n is summed in float64, since that is what gets factorised.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20


def as_matrix(A: Tensor | np.ndarray) -> Tensor:
    """View an array or tensor as an [n, p] floating tensor without copying it."""
    if isinstance(A, np.ndarray):
        A = torch.from_numpy(A)
    if A.ndim != 2 or not A.is_floating_point():
        raise ValueError(f"A must be a floating [n, p] matrix, got {A.dtype} of shape {tuple(A.shape)}")
    if A.shape[0] == 0 or A.shape[1] == 0:
        raise ValueError(f"A has shape {tuple(A.shape)}: at least one gradient and one weight are needed")
    return A


def working_dtype(A: Tensor) -> torch.dtype:
    """The type in which products with A run: float64 stays, everything else is float32."""
    return torch.float64 if A.dtype == torch.float64 else torch.float32


def surely_finite(A: Tensor) -> bool:
    """False where an entry is NaN or infinite, or where a sum overflows; one pass over A.

    >>> surely_finite(torch.tensor([[1.0, float("nan")]]))
    False
    """
    # A sum is not finite as soon as one entry is not, and takes no mask of A's size. Where the type changes, torch
    # converts all that it adds up at once: hence in parts.
    parts = (A,) if A.dtype == working_dtype(A) else A.split(max(1, CHUNK_BYTES // (4 * A.shape[1])))
    return all(bool(torch.isfinite(part.sum(dtype=working_dtype(A)))) for part in parts)


def columns(A: Tensor, index: Tensor) -> Tensor:
    """A[:, index] in the working type, [n, len(index)]; column-major where A is (the fast case)."""
    picked = A.t().index_select(0, index).t() if A.stride(0) == 1 else A.index_select(1, index)
    return picked.to(working_dtype(A))


def chunks(A: Tensor, width: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Column slices of A in the working type."""
    width = width or max(1, CHUNK_BYTES // (4 * A.shape[0]))
    for start in range(0, A.shape[1], width):
        part = slice(start, min(start + width, A.shape[1]))
        yield part, A[:, part].to(working_dtype(A))


def matvec(A: Tensor, x: Tensor) -> Tensor:
    """A x for x of shape [p] or [p, q]; one pass over A."""
    x = x.to(working_dtype(A))
    if A.dtype == x.dtype:
        return A @ x
    return torch.stack([a @ x[part] for part, a in chunks(A)]).sum(0)


def rmatvec(A: Tensor, y: Tensor) -> Tensor:
    """Aᵀ y for y of shape [n] or [n, q]; one pass over A."""
    y = y.to(working_dtype(A))
    if A.dtype == y.dtype:
        return A.t() @ y
    return torch.cat([a.t() @ y for _, a in chunks(A)])


def dead_columns(A: Tensor) -> Tensor:
    """Which columns are zero throughout, bool [p]."""
    largest = torch.zeros(A.shape[1], dtype=working_dtype(A))
    for row in A:
        torch.maximum(largest, row.abs().to(largest.dtype), out=largest)
    return largest == 0


def gram(A: Tensor, index: Tensor | None = None) -> Tensor:
    """A[:, index] A[:, index]ᵀ in float64, [n, n], summed over chunks of columns."""
    n = A.shape[0]
    total = torch.zeros(n, n, dtype=torch.float64)
    if index is None:
        for _, part in chunks(A):
            total += part @ part.t()
        return total
    width = max(1, CHUNK_BYTES // (4 * n))
    for some in index.split(width):
        part = columns(A, some)
        total += part @ part.t()
    return total
