"""Problem (5): sparse ridge regression towards a quadratic model of the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import SupportsFloat

import torch
from torch import Tensor

from espalier.curvature.matrix import chunks, surely_finite, working_dtype
from espalier.select.inputs import Array, matrix_of, ridge_of, vector_of


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
    def of(cls, A: Array, b: Array | None, w_bar: Array, ridge: SupportsFloat) -> Problem:
        """Check the data; `b = None` means b = Aw̄, that is, no first-order term."""
        A, ridge = matrix_of(A), ridge_of(ridge)
        n, p = A.shape
        w_bar = vector_of("w_bar", w_bar, p, "columns")
        b = None if b is None else vector_of("b", b, n, "rows")
        if not ridge > 0:
            raise ValueError(_no_ridge(A, ridge))
        if not surely_finite(A):
            rows = [i for i in range(n) if not bool(torch.isfinite(A[i]).all())]
            if rows:
                raise ValueError(f"A holds NaN or infinity in row {rows[0]}: drop that mini-batch, or find its cause")
        residual = torch.zeros(n, dtype=torch.float64)
        if b is not None:
            residual = b.double() - matvec64(A, w_bar)
        return cls(A, residual, w_bar.to(working_dtype(A)), ridge)

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


def largest_square(A: Tensor) -> float:
    """The largest squared norm of a column, in float64."""
    return max(float(a.double().square().sum(0).max()) for _, a in chunks(A, 4096))


def too_small(problem: Problem, largest: float) -> str:
    """What to say where a refit is singular in float64; `largest`: the largest entry of A_S A_Sᵀ or A_SᵀA_S."""
    enough = 1e-12 * largest / problem.n
    more = f": λ ≥ {enough:.0e} would do" if 0 < enough < math.inf else ""
    return (
        f"ridge λ = {problem.ridge:g} is too small for the scale of A: with nλ beside A_S A_Sᵀ (n = {problem.n}, "
        f"entries up to {largest:.1e}) the refit is singular in float64{more}"
    )


def _no_ridge(A: Tensor, ridge: float) -> str:
    """Why λ must be positive even where A has full rank."""
    n, p = A.shape
    scale = max(float(part.abs().max()) for _, part in chunks(A, 4096))
    enough = f"; λ = {1e-9 * scale**2:.0e} would hardly change the solution" if 0 < scale < math.inf else ""
    return (
        f"ridge λ = {ridge}: refits go through A_S A_Sᵀ + nλI of n × n (n = {n}, p = {p}), which is singular without a "
        f"positive λ wherever fewer than n independent weights stay{enough}; 1e-5 to 1e-2 are usual"
    )


def matvec64(A: Tensor, x: Tensor) -> Tensor:
    """A x with products and sums in float64."""
    total = torch.zeros(A.shape[0], dtype=torch.float64)
    # small chunks: converting one then stays in the cache, which makes this 8 times faster
    for part, a in chunks(A, max(64, (1 << 19) // A.shape[0])):
        total += a.double() @ x[part].double()
    return total


def first_order_target(A: Array, w_bar: Array, batch: int = 1) -> Tensor:
    """b = Aw̄ − e/m: problem (5) with the first-order term, for rows that average m samples each.

    >>> first_order_target(torch.eye(2), torch.ones(2))
    tensor([0., 0.], dtype=torch.float64)

    The paper's b = Aw̄ − e is for m = 1. A mini-batch gradient's outer product estimates 1/m of the Fisher
    matrix, so the linear term takes the same factor. Returned in float64, [n].
    """
    A = matrix_of(A)
    return matvec64(A, vector_of("w_bar", w_bar, A.shape[1], "columns")) - 1.0 / batch


def objective(A: Array, b: Array | None, w_bar: Array, w: Array, ridge: float) -> float:
    """Q(w) by the plain formula in float64, row by row: independent of the solvers, for checks.

    >>> objective(torch.eye(2), None, torch.ones(2), torch.tensor([1.0, 0.0]), ridge=0.5)
    1.0
    """
    A = matrix_of(A)
    w_bar, w = (vector_of(name, v, A.shape[1], "columns").double() for name, v in (("w_bar", w_bar), ("w", w)))
    total = 0.5 * A.shape[0] * ridge * float(torch.sum((w - w_bar) ** 2))
    for i in range(A.shape[0]):
        row = A[i].double()
        aim = float(torch.dot(row, w_bar)) if b is None else float(b[i])
        total += 0.5 * (aim - float(torch.dot(row, w))) ** 2
    return total
