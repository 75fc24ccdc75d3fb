"""The exact refit on a support, in the n × n dual.

With S the support, K = A_S A_Sᵀ + ρI and t = b − A_S w̄_S, the best weights on S are w̄_S + A_Sᵀy, Ky = t, and
Q = (ρ/2)(tᵀy + ‖w̄ off S‖²). The vector z = w̄ + Aᵀy is at once the refitted weight of every index in S and,
off S, −1/ρ times the gradient of Q: it ranks what to add and what to drop (see `exchange`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from espalier.curvature.matrix import columns, gram, matvec, rmatvec
from espalier.select.problem import Problem, matvec64, too_small

CHUNK = 4096
"""Columns converted to float64 at a time."""
TRUSTED = 1e-4
"""Largest rounding error of K, relative to what one row of it adds to those before, with which a support is judged."""


@dataclass
class DualState:
    """A support with its dual system; `add_drop` moves it along. K and t are float64, [n, n] and [n].

    `exact`: whether the products behind K and t ran in float64 too. They do where `solve` finds that rounding in
    the type of A would count.
    """

    problem: Problem
    support: Tensor
    K: Tensor
    t: Tensor
    exact: bool = False

    @classmethod
    def of(cls, problem: Problem, support: Tensor, exact: bool = False) -> DualState:
        """Build K and t for a boolean support: n²k operations and one pass over A."""
        exact = exact or problem.A.dtype == torch.float64
        index = support.nonzero().flatten()
        K = _gram64(problem.A, index) if exact else gram(problem.A, index)
        K.diagonal().add_(problem.rho)
        outside = torch.where(support, torch.zeros((), dtype=problem.w_bar.dtype), problem.w_bar)
        product = matvec64(problem.A, outside) if exact else matvec(problem.A, outside).double()
        return cls(problem, support.clone(), K, problem.residual + product, exact)

    def copy(self) -> DualState:
        """A state that can be moved without moving this one; `solve` it first."""
        return replace(self, support=self.support.clone(), K=self.K.clone(), t=self.t.clone())

    def solve(self) -> None:
        """Factorise K and find y; ValueError where K is singular in float64."""
        self.factor, failed = torch.linalg.cholesky_ex(self.K)
        if not self.exact and (failed or self.rounding(torch.float32) > TRUSTED):
            fresh = DualState.of(self.problem, self.support, exact=True)
            self.K, self.t, self.exact = fresh.K, fresh.t, True
            self.factor, failed = torch.linalg.cholesky_ex(self.K)
        if failed or not bool(torch.isfinite(self.factor.diagonal()).all()):
            raise ValueError(too_small(self.problem, float(self.K.diagonal().max())))
        self.y = self.solution(self.t)

    def solution(self, t: Tensor) -> Tensor:
        """K⁻¹t, [n]."""
        return torch.cholesky_solve(t[:, None], self.factor)[:, 0]

    def rounding(self, dtype: torch.dtype) -> float:
        """The rounding error of K's entries in a type, relative to the smallest pivot of the scaled K."""
        return torch.finfo(dtype).eps * float((self.K.diagonal() / self.factor.diagonal().square()).max())

    @property
    def objective(self) -> float:
        """Q of the refitted weights, from the dual."""
        off = self.problem.w_bar[~self.support].double().square().sum()
        return float(0.5 * self.problem.rho * (torch.dot(self.t, self.y) + off))

    def potential(self) -> Tensor:
        """z = w̄ + Aᵀy, [p]; one pass over A."""
        if not self.exact:
            return self.problem.w_bar + rmatvec(self.problem.A, self.y)
        return torch.cat([self._exactly(slice(i, i + CHUNK)) for i in range(0, self.problem.p, CHUNK)])

    def _exactly(self, some: slice) -> Tensor:
        a = self.problem.A[:, some].double()
        return self.problem.w_bar[some].double() + a.t() @ self.y

    def weights(self) -> Tensor:
        """The refitted weights with zeros off the support, [p]."""
        z = self.potential().to(self.problem.w_bar.dtype)
        return torch.where(self.support, z, torch.zeros((), dtype=z.dtype))

    def add_drop(self, add: Tensor, drop: Tensor) -> None:
        """Move indices into and out of the support; reads only their columns."""
        for index, sign in ((add, 1.0), (drop, -1.0)):
            if index.numel():
                a = columns(self.problem.A, index).double()
                self.K.addmm_(a, a.t(), alpha=sign)
                self.t.sub_(a @ self.problem.w_bar[index].double(), alpha=sign)
                self.support[index] = sign > 0


def refit(problem: Problem, support: Tensor) -> Tensor:
    """The minimiser of Q with zeros off the boolean support, [p].

    >>> problem = Problem.of(torch.eye(2), None, torch.ones(2), ridge=0.5)
    >>> refit(problem, torch.tensor([True, False]))
    tensor([1., 0.])
    """
    state = DualState.of(problem, support)
    state.solve()
    return state.weights()


def _gram64(A: Tensor, index: Tensor) -> Tensor:
    K = torch.zeros(A.shape[0], A.shape[0], dtype=torch.float64)
    for some in index.split(CHUNK):
        a = columns(A, some).double()
        K.addmm_(a, a.t())
    return K
