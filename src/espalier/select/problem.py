"""Problem (5): sparse ridge regression towards a quadratic model of the loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from espalier.curvature.matrix import as_matrix, chunks, surely_finite, working_dtype


@dataclass(frozen=True)
class Problem:
    """minimise Q(w) = ½‖b − Aw‖² + (nλ/2)‖w − w̄‖² over supports of a given kind.

    >>> problem = Problem.of(torch.eye(2), None, torch.ones(2), ridge=0.5)
    >>> problem.objective(torch.tensor([1.0, 0.0]))
    1.0

    Everything is kept relative to w̄, since ‖b − Aw‖ cancels badly in float32: with δ = w − w̄ the objective
    is ½‖residual − Aδ‖² + (ρ/2)‖δ‖², residual = b − Aw̄ in float64 and ρ = nλ.
    """

    A: Tensor
    residual: Tensor
    w_bar: Tensor
    ridge: float

    @classmethod
    def of(cls, A: Tensor | np.ndarray, b: Tensor | None, w_bar: Tensor, ridge: float) -> Problem:
        """Check the data; `b = None` means b = Aw̄, that is, no first-order term."""
        A = as_matrix(A)
        n, p = A.shape
        if w_bar.shape != (p,):
            raise ValueError(f"w_bar has shape {tuple(w_bar.shape)}, but A has {p} columns")
        if b is not None and b.shape != (n,):
            raise ValueError(f"b has shape {tuple(b.shape)}, but A has {n} rows")
        if not ridge > 0:
            raise ValueError(
                f"ridge λ = {ridge}: AᵀA has rank at most n = {n}, so the refit is singular without a "
                "positive λ; 1e-5 to 1e-2 are usual"
            )
        for name, value in (("w_bar", w_bar), ("b", b)):
            if value is not None and not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} holds NaN or infinity at index {int((~torch.isfinite(value)).nonzero()[0])}")
        if not surely_finite(A):
            rows = [i for i in range(n) if not bool(torch.isfinite(A[i]).all())]
            if rows:
                raise ValueError(f"A holds NaN or infinity in row {rows[0]}: drop that mini-batch, or find its cause")
        residual = torch.zeros(n, dtype=torch.float64)
        if b is not None:
            residual = b.double() - matvec64(A, w_bar)
        return cls(A, residual, w_bar.detach().to(working_dtype(A)), float(ridge))

    @property
    def n(self) -> int:
        """Number of gradients."""
        return self.A.shape[0]

    @property
    def p(self) -> int:
        """Number of weights."""
        return self.A.shape[1]

    @property
    def rho(self) -> float:
        """nλ, the weight of the ridge."""
        return self.n * self.ridge

    def objective(self, w: Tensor) -> float:
        """Q(w) in float64, from δ = w − w̄."""
        delta = w.double() - self.w_bar.double()
        misfit = self.residual - matvec64(self.A, delta)
        return float(0.5 * misfit.square().sum() + 0.5 * self.rho * delta.square().sum())


def matvec64(A: Tensor, x: Tensor) -> Tensor:
    """A x with products and sums in float64."""
    total = torch.zeros(A.shape[0], dtype=torch.float64)
    # small chunks: converting one then stays in the cache, which makes this 8 times faster
    for part, a in chunks(A, max(64, (1 << 19) // A.shape[0])):
        total += a.double() @ x[part].double()
    return total


def first_order_target(A: Tensor, w_bar: Tensor, batch: int = 1) -> Tensor:
    """b = Aw̄ − e/m: problem (5) with the first-order term, for rows that average m samples each.

    >>> first_order_target(torch.eye(2), torch.ones(2))
    tensor([0., 0.], dtype=torch.float64)

    The paper's b = Aw̄ − e is for m = 1. A mini-batch gradient's outer product estimates 1/m of the Fisher
    matrix, so the linear term takes the same factor. Returned in float64, [n].
    """
    return matvec64(as_matrix(A), w_bar) - 1.0 / batch


def objective(A: Tensor, b: Tensor | None, w_bar: Tensor, w: Tensor, ridge: float) -> float:
    """Q(w) by the plain formula in float64, row by row: independent of the solvers, for checks.

    >>> objective(torch.eye(2), None, torch.ones(2), torch.tensor([1.0, 0.0]), ridge=0.5)
    1.0
    """
    w_bar, w = w_bar.double(), w.double()
    total = 0.5 * A.shape[0] * ridge * float(torch.sum((w - w_bar) ** 2))
    for i in range(A.shape[0]):
        row = A[i].double()
        aim = float(torch.dot(row, w_bar)) if b is None else float(b[i])
        total += 0.5 * (aim - float(torch.dot(row, w))) ** 2
    return total
