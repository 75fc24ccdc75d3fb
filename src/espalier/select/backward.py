"""Backward elimination on second moments: start from everything, drop the cheapest unit, downdate the
inverse."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from espalier.select.refit import Path, Reconstruction, Selection, refit, solve_on
from espalier.select.sweep import Sweep


def backward(problem: Reconstruction, size: int) -> Selection:
    """Keep `size` units by removing, one at a time, the unit whose loss the others can best make up for.

    >>> from espalier.select.refit import reconstruction
    >>> H = torch.rand(8, 100, dtype=torch.float64)
    >>> len(backward(reconstruction(torch.randn(3, 8, dtype=torch.float64), H @ H.T), 4).support)
    4
    """
    size = problem.check_size(size)
    return refit(problem, backward_path(problem, size).support(size))


def backward_path(problem: Reconstruction, smallest: int = 0) -> Path:
    """The supports and errors of all sizes; below `smallest` the order is arbitrary and the errors are not
    computed (inf).

    >>> from espalier.select.refit import reconstruction
    >>> H = torch.rand(8, 100, dtype=torch.float64)
    >>> backward_path(reconstruction(torch.randn(3, 8, dtype=torch.float64), H @ H.T)).order.shape
    torch.Size([8])

    With P = (K_SS + ρI)⁻¹ and the refitted W on the current support, removing unit j costs tr(W_j P_jj⁻¹
    W_jᵀ); then W ← W − W_j P_jj⁻¹ P_j and P ← P − P_:j P_jj⁻¹ P_j. The downdates of P are delayed and
    applied in groups, so that nearly all of the O(d³) work is matrix products. Memory O(d²).

    Raises ValueError where the second moment is singular and the ridge is zero.
    """
    if not 0 <= smallest <= problem.units:
        raise ValueError(f"smallest size {smallest} is not from 0 to {problem.units}")
    factor, failed = torch.linalg.cholesky_ex(problem.gram)
    if int(failed):
        raise ValueError(
            "the second moment is singular (fewer samples than columns, or dead or duplicate units) and the "
            "ridge is zero: backward elimination needs its inverse; use ridge=1e-6, or omp, which does not"
        )
    inverse = torch.cholesky_inverse(factor)
    del factor
    weights = problem.weight if problem.offset is None else problem.weight + problem.offset @ inverse
    full = problem.objective(weights) if problem.offset is not None else 0.0
    sweep = Sweep(inverse, weights, problem.block, _weights_without(problem), own=True)
    del inverse, weights
    costs: list[float] = []
    for _ in range(problem.units - smallest):
        cost, least = _cheapest(sweep)
        if sweep.lost(least):
            cost, least = _cheapest(sweep)
        costs.append(max(float(cost[least]), 0.0))
        sweep.take(least)
    removed = sweep.taken
    kept = sorted(set(range(problem.units)) - set(removed))
    order = torch.tensor(kept + removed[::-1], device=problem.gram.device)
    errors = torch.full((problem.units + 1,), torch.inf, dtype=problem.gram.dtype, device=problem.gram.device)
    errors[-1] = full
    if costs:
        errors[smallest:-1] = (full + problem.gram.new_tensor(costs).cumsum(0)).flip(0)
    return Path(order, errors)


def _cheapest(sweep: Sweep) -> tuple[Tensor, int]:
    cost = sweep.gain()
    return cost, int(torch.where(sweep.present, cost, torch.inf).argmin())


def _weights_without(problem: Reconstruction) -> Callable[[Tensor], Tensor]:
    def solve(removed: Tensor) -> Tensor:
        kept = torch.ones(problem.units, dtype=torch.bool, device=removed.device)
        kept[removed] = False
        index = problem.column_index(kept.nonzero().flatten())
        full = torch.zeros_like(problem.weight)
        full[:, index] = solve_on(problem, index)
        return full

    return solve
