"""The matrix-free recursion of M-FAC."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from espalier.curvature.fisher import DampedInverse, Fisher
from espalier.curvature.matrix import working_dtype
from espalier.curvature.memory import check_store


@dataclass(frozen=True)
class MatrixFreeInverse(DampedInverse):
    """F⁻¹ as n rank-one corrections of I/λ, as published in M-FAC (Frantar et al. 2021).

    >>> MatrixFreeInverse(torch.eye(2), damping=0.5) @ torch.ones(2)
    tensor([1., 1.])

    vᵢ = F⁻¹ᵢ₋₁gᵢ and F⁻¹ᵢx = F⁻¹ᵢ₋₁x − vᵢ(vᵢᵀx)/(n + gᵢᵀvᵢ): O(n²p) in n sequential steps and a second
    n × p store, in memory even where A is mapped: MemoryError, before, where it does not fit. Kept as the baseline;
    `DualInverse` gives the same numbers faster and without that store.
    """

    A: Tensor
    damping: float

    @cached_property
    def _recursion(self) -> tuple[Tensor, Tensor]:
        n, dtype = self.A.shape[0], working_dtype(self.A)
        store = self.A.numel() * dtype.itemsize
        check_store(store, "the recursion's own store, as large as A,", "use DualInverse, which gives the same numbers")
        V = torch.empty(self.A.shape, dtype=dtype)
        scale = torch.empty(n, dtype=dtype)
        for i in range(n):
            g = self.A[i].to(dtype)
            v = g / self.damping
            if i:
                v -= V[:i].t() @ ((V[:i] @ g) / scale[:i])
            V[i], scale[i] = v, n + torch.dot(g, v)
        return V, scale

    def __matmul__(self, v: Tensor) -> Tensor:
        V, scale = self._recursion
        v = v.to(V.dtype)
        inner = V @ v
        return v / self.damping - V.t() @ (inner / (scale if v.ndim == 1 else scale[:, None]))

    def diag(self) -> Tensor:
        """Diagonal of F⁻¹, [p]."""
        V, scale = self._recursion
        out = torch.full((V.shape[1],), 1 / self.damping, dtype=V.dtype)
        for v, s in zip(V, scale, strict=True):
            out -= v.square() / s
        return out

    def solve(self, v: Tensor) -> Tensor:
        """(F⁻¹)⁻¹ v = F v."""
        return Fisher(self.A, self.damping) @ v
