"""F⁻¹ through one n × n Cholesky factor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from espalier.curvature.fisher import DampedInverse, Fisher
from espalier.curvature.matrix import chunks, gram, matvec, rmatvec, working_dtype


@dataclass(frozen=True)
class DualInverse(DampedInverse):
    """F⁻¹ = (I − Aᵀ(AAᵀ + nλI)⁻¹A)/λ of the damped empirical Fisher, exactly.

    >>> DualInverse(torch.eye(2), damping=0.5) @ torch.ones(2)
    tensor([1., 1.])

    Building it reads A once and costs n²p + n³/3; each product reads A twice. The same numbers as the full
    (one-block) WoodFisher and M-FAC recursions give, without their n sequential steps.
    """

    A: Tensor
    damping: float

    @cached_property
    def factor(self) -> Tensor:
        """Lower Cholesky factor of AAᵀ + nλI, float64 [n, n]."""
        K = gram(self.A)
        K.diagonal().add_(self.A.shape[0] * self.damping)
        return torch.linalg.cholesky(K)

    def __matmul__(self, v: Tensor) -> Tensor:
        v = v.to(working_dtype(self.A))
        inner = matvec(self.A, v).double()
        y = torch.cholesky_solve(inner.reshape(len(inner), -1), self.factor).reshape(inner.shape)
        return (v - rmatvec(self.A, y)) / self.damping

    def diag(self) -> Tensor:
        """Diagonal of F⁻¹, [p]: (1 − aⱼᵀK⁻¹aⱼ)/λ for column aⱼ of A and K = AAᵀ + nλI."""
        half = torch.linalg.solve_triangular(self.factor, torch.eye(len(self.factor)).double(), upper=False)
        half = half.to(working_dtype(self.A))
        return torch.cat([1 - (half @ a).square().sum(0) for _, a in chunks(self.A)]) / self.damping

    def solve(self, v: Tensor) -> Tensor:
        """(F⁻¹)⁻¹ v = F v."""
        return Fisher(self.A, self.damping) @ v
