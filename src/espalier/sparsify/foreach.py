"""torch's list operations, typed: each is one call for a whole list of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor


def zero_(tensors: Sequence[Tensor]) -> None:
    """``t = 0`` for all."""
    torch._foreach_zero_(list(tensors))


def add_(tensors: Sequence[Tensor], others: Sequence[Tensor], alpha: float = 1.0) -> None:
    """``t += alpha * o`` for all pairs."""
    torch._foreach_add_(list(tensors), list(others), alpha=alpha)


def mul(tensors: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """``t * f`` for all pairs."""
    return list(torch._foreach_mul(list(tensors), list(factors)))


def mul_(tensors: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """``t *= f`` for all pairs."""
    torch._foreach_mul_(list(tensors), list(factors))


def sub(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """``t - o`` for all pairs."""
    return list(torch._foreach_sub(list(tensors), list(others)))


def norms(tensors: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """Norm of each tensor (by default the Euclidean one), as one vector, at least in single precision."""
    stacked = torch.stack(list(torch._foreach_norm(list(tensors), order)))
    return stacked if stacked.dtype == torch.float64 else stacked.float()


def flattened(tensors: Sequence[Tensor]) -> Tensor:
    """All elements as one vector."""
    return torch._utils._flatten_dense_tensors(list(tensors))  # pyright: ignore[reportAttributeAccessIssue]
