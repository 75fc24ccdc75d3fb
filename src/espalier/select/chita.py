"""One call for problem (5): the default solver, or the paper's."""

from __future__ import annotations

from typing import Literal

import numpy as np
from torch import Tensor

from espalier.select.exchange import ExchangeOptions, exchange
from espalier.select.iht import IHTOptions, iht
from espalier.select.patterns import Quota, cardinality
from espalier.select.problem import Problem
from espalier.select.result import Result

Solver = Literal["exchange", "iht", "magnitude"]


def solve(
    problem: Problem,
    quota: Quota,
    solver: Solver = "exchange",
    options: ExchangeOptions | IHTOptions | None = None,
) -> Result:
    """Solve a prepared problem over the supports that `quota` allows."""
    if len(quota.cell) != problem.p:
        raise ValueError(f"the quota covers {len(quota.cell)} weights, but A has {problem.p} columns")
    if solver == "iht":
        assert options is None or isinstance(options, IHTOptions)
        return iht(problem, quota, options)
    assert options is None or isinstance(options, ExchangeOptions)
    if solver == "magnitude":
        options = ExchangeOptions(rounds=0)
    return exchange(problem, quota, options)


def chita(
    A: Tensor | np.ndarray,
    b: Tensor | None,
    w_bar: Tensor,
    k: int | Quota,
    ridge: float,
    solver: Solver = "exchange",
    options: ExchangeOptions | IHTOptions | None = None,
) -> Result:
    """Choose k weights and their values: minimise ½‖b − Aw‖² + (nλ/2)‖w − w̄‖², ‖w‖₀ ≤ k.

    >>> import torch
    >>> A = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    >>> chita(A, None, torch.tensor([1.0, 2.0, 0.1]), k=2, ridge=0.1).support
    tensor([ True,  True, False])

    A: [n, p] tensor or (memory-mapped) array of float64, float32 or bfloat16; row i is the gradient of the
    mean loss over mini-batch i. b: [n], or None for Aw̄, the problem without first-order term;
    `first_order_target` gives the b with it. w_bar: [p]. k: a number of weights, or a `Quota` (per layer,
    N:M). ridge: λ > 0.

    solver: "exchange" (the default: magnitude support, exact refit, exact exchanges), "iht" (the paper's:
    exact line search, active set, refit), or "magnitude" (magnitude support and exact refit only).

    Raises ValueError for k outside 1 … p, λ ≤ 0, NaN or infinity in A, b or w̄, and shapes that do not fit.
    """
    problem = Problem.of(A, b, w_bar, ridge)
    return solve(problem, cardinality(k, problem.p) if isinstance(k, int) else k, solver, options)
