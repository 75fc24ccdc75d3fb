"""The empirical Fisher matrix as a linear operator, and its dense inverse (the oracle)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from espalier.curvature.matrix import as_matrix, chunks, matvec, rmatvec, working_dtype
from espalier.curvature.memory import check_store


class OnGradients:
    """What all operators on gradients share: A, a tensor or an array, as a checked [n, p] tensor; and their shape."""

    A: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "A", as_matrix(self.A))

    @property
    def shape(self) -> tuple[int, int]:
        """(p, p)."""
        return self.A.shape[1], self.A.shape[1]


class DampedInverse(OnGradients):
    """What all inverses share besides: a positive damping."""

    damping: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_damping(self.A, self.damping)


def check_damping(A: Tensor, damping: float) -> None:
    """Validate what every inverse needs: a positive damping."""
    if not damping > 0:
        raise ValueError(
            f"damping λ = {damping}: AᵀA/n of n = {A.shape[0]} gradients and p = {A.shape[1]} weights has no "
            "inverse without a positive λ; 1e-5 to 1e-2 are usual"
        )


@dataclass(frozen=True)
class Fisher(OnGradients):
    """The damped empirical Fisher F = AᵀA/n + λI, never formed.

    >>> F = Fisher(torch.eye(2), damping=0.5)
    >>> F @ torch.ones(2), F.diag()
    (tensor([1., 1.]), tensor([1., 1.]))

    A: [n, p]. `F @ v` and `F.solve(v)` take v of shape [p] or [p, q]; `F.diag()` is [p].
    """

    A: Tensor
    damping: float

    def __matmul__(self, v: Tensor) -> Tensor:
        v = v.to(working_dtype(self.A))
        return rmatvec(self.A, matvec(self.A, v)) / self.A.shape[0] + self.damping * v

    def diag(self) -> Tensor:
        """Diagonal of F, [p]."""
        return torch.cat([a.square().mean(0) for _, a in chunks(self.A)]) + self.damping

    def solve(self, v: Tensor) -> Tensor:
        """F⁻¹ v, through the n × n dual."""
        from espalier.curvature.dual import DualInverse

        return DualInverse(self.A, self.damping) @ v

    def dense(self) -> Tensor:
        """F as a float64 [p, p] matrix: for tests and small p only. MemoryError, before, where it does not fit."""
        p = self.A.shape[1]
        check_store(8 * (p * p + self.A.numel()), f"a dense matrix of {p:,} × {p:,} values", "use DualInverse")
        A = self.A.double()
        return A.t() @ A / A.shape[0] + self.damping * torch.eye(A.shape[1], dtype=torch.float64)


@dataclass(frozen=True)
class DenseInverse(DampedInverse):
    """F⁻¹ from a p × p Cholesky factor in float64: O(p³), the oracle of the other inverses.

    >>> DenseInverse(torch.eye(2), damping=0.5) @ torch.ones(2)
    tensor([1., 1.], dtype=torch.float64)
    """

    A: Tensor
    damping: float

    @cached_property
    def _factor(self) -> Tensor:
        return torch.linalg.cholesky(Fisher(self.A, self.damping).dense())

    def __matmul__(self, v: Tensor) -> Tensor:
        v = v.double()
        return torch.cholesky_solve(v.reshape(len(v), -1), self._factor).reshape(v.shape)

    def diag(self) -> Tensor:
        """Diagonal of F⁻¹, [p]."""
        return torch.cholesky_inverse(self._factor).diagonal()

    def solve(self, v: Tensor) -> Tensor:
        """(F⁻¹)⁻¹ v = F v."""
        return Fisher(self.A.double(), self.damping) @ v
