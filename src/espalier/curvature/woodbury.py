"""The block-diagonal inverse of WoodFisher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from espalier.curvature.fisher import DampedInverse
from espalier.curvature.matrix import working_dtype


@dataclass(frozen=True)
class BlockWoodburyInverse(DampedInverse):
    """Inverse of the diagonal blocks of F = AᵀA/n + λI, each c consecutive weights.

    >>> BlockWoodburyInverse(torch.eye(2), damping=0.5, block=1) @ torch.ones(2)
    tensor([1., 1.])

    `block`: the largest block size c; `sizes`: lengths of the tensors (blocks do not cross them), by default
    one tensor of p weights. WoodFisher reaches the same inverse by n rank-one Sherman-Morrison updates per
    block, O(n c²) sequential; here each block is one Cholesky factor of c × c, or of n × n where n < c
    (Woodbury). The factors, together as large as A where c ≥ n, are kept between products while they take at most
    `memory_limit` bytes, and otherwise computed block by block for each. Singh & Alistarh (2020), equation 5.
    """

    A: Tensor
    damping: float
    block: int = 2000
    sizes: tuple[int, ...] | None = None
    memory_limit: int = 1 << 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise ValueError(f"block = {self.block}: a block holds at least one weight")
        if self.sizes is not None and sum(self.sizes) != self.A.shape[1]:
            raise ValueError(f"sizes sum to {sum(self.sizes)}, but A has {self.A.shape[1]} columns")

    @cached_property
    def blocks(self) -> list[slice]:
        """The columns of each block."""
        out, start = [], 0
        for size in self.sizes or (self.A.shape[1],):
            count = -(-size // self.block)
            out += [slice(start + i * size // count, start + (i + 1) * size // count) for i in range(count)]
            start += size
        return out

    @property
    def _factors(self) -> Iterator[tuple[slice, Tensor]]:
        """Each block's columns and factor: kept where all factors together fit, else computed anew."""
        if self._kept is not None:
            return zip(self.blocks, self._kept, strict=True)
        return ((part, self._factor(part)) for part in self.blocks)

    @cached_property
    def _kept(self) -> list[Tensor] | None:
        n, dtype = self.A.shape[0], working_dtype(self.A)
        widths = [part.stop - part.start for part in self.blocks]
        sizes = [min(n, c) * c for c in widths]
        if sum(sizes) * dtype.itemsize > self.memory_limit:
            return None
        store = torch.empty(sum(sizes), dtype=dtype)  # one for all: small ones between scratch would leave gaps
        # column by column, as LAPACK returns them
        kept = [piece.view(c, -1).t() for piece, c in zip(store.split(sizes), widths, strict=True)]
        for part, M in zip(self.blocks, kept, strict=True):
            M.copy_(self._factor(part))
        return kept

    def _factor(self, part: slice) -> Tensor:
        """M with F⁻¹ = (I − MᵀM)/λ, M = L⁻¹A (n × c), or the c × c inverse where c ≤ n."""
        n, dtype = self.A.shape[0], working_dtype(self.A)
        a = self.A[:, part].double()
        c = a.shape[1]
        if c <= n:
            F = a.t() @ a / n + self.damping * torch.eye(c, dtype=torch.float64)
            return torch.cholesky_inverse(torch.linalg.cholesky(F)).to(dtype)
        K = a @ a.t() + n * self.damping * torch.eye(n, dtype=torch.float64)
        return torch.linalg.solve_triangular(torch.linalg.cholesky(K), a, upper=False).to(dtype)

    def __matmul__(self, v: Tensor) -> Tensor:
        v = v.to(working_dtype(self.A))
        out = []
        for part, M in self._factors:
            x = v[part]
            out.append(M @ x if M.shape[0] == M.shape[1] == len(x) else (x - M.t() @ (M @ x)) / self.damping)
        return torch.cat(out)

    def diag(self) -> Tensor:
        """Diagonal of the inverse, [p]."""
        out = []
        for part, M in self._factors:
            c = part.stop - part.start
            out.append(M.diagonal().clone() if c <= self.A.shape[0] else (1 - M.square().sum(0)) / self.damping)
        return torch.cat(out)

    def solve(self, v: Tensor) -> Tensor:
        """The block-diagonal F times v."""
        v = v.to(working_dtype(self.A))
        n, out = self.A.shape[0], []
        for part in self.blocks:
            a, x = self.A[:, part].to(v.dtype), v[part]
            out.append(a.t() @ (a @ x) / n + self.damping * x)
        return torch.cat(out)
