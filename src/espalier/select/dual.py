"""The exact refit on a support, in the n × n dual.

With S the support, K = A_S A_Sᵀ + ρI and t = b − A_S w̄_S, the best weights on S are w̄_S + A_Sᵀy, Ky = t, and
Q = (ρ/2)(tᵀy + ‖w̄ off S‖²). The vector z = w̄ + Aᵀy is at once the refitted weight of every index in S and,
off S, −1/ρ times the gradient of Q: it ranks what to add and what to drop (see `exchange`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.curvature.matrix import columns, gram, matvec, rmatvec
from espalier.select.problem import Problem


@dataclass
class DualState:
    """A support with its dual system; `add_drop` moves it along. K and t are float64, [n, n] and [n]."""

    problem: Problem
    support: Tensor
    K: Tensor
    t: Tensor

    @classmethod
    def of(cls, problem: Problem, support: Tensor) -> DualState:
        """Build K and t for a boolean support: n²k operations and one pass over A."""
        K = gram(problem.A, support.nonzero().flatten())
        K.diagonal().add_(problem.rho)
        outside = torch.where(support, torch.zeros((), dtype=problem.w_bar.dtype), problem.w_bar)
        return cls(problem, support.clone(), K, problem.residual + matvec(problem.A, outside).double())

    def solve(self) -> None:
        """Factorise K and find y."""
        self.factor = torch.linalg.cholesky(self.K)
        self.y = torch.cholesky_solve(self.t[:, None], self.factor)[:, 0]

    @property
    def objective(self) -> float:
        """Q of the refitted weights, from the dual."""
        off = self.problem.w_bar[~self.support].double().square().sum()
        return float(0.5 * self.problem.rho * (torch.dot(self.t, self.y) + off))

    def potential(self) -> Tensor:
        """z = w̄ + Aᵀy, [p]; one pass over A."""
        return self.problem.w_bar + rmatvec(self.problem.A, self.y)

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
    return torch.where(support, state.potential(), torch.zeros((), dtype=problem.w_bar.dtype))
