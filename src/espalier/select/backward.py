"""Backward elimination on second moments: start from everything, drop the cheapest unit, downdate the
inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from espalier.select.omp import block_gain, diagonal_blocks
from espalier.select.refit import Path, Reconstruction, Selection, refit

_PENDING = 64  # columns of delayed rank updates before one matrix product applies them


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
    state = _State(problem, torch.cholesky_inverse(factor))
    del factor
    removed: list[int] = []
    costs: list[float] = []
    full = problem.objective(state.weights) if problem.offset is not None else 0.0
    for _ in range(problem.units - smallest):
        unit, cost = state.remove()
        removed.append(unit)
        costs.append(cost)
    kept = sorted(set(range(problem.units)) - set(removed))
    order = torch.tensor(kept + removed[::-1], device=problem.gram.device)
    errors = torch.full((problem.units + 1,), torch.inf, dtype=problem.gram.dtype, device=problem.gram.device)
    errors[-1] = full
    if costs:
        errors[smallest:-1] = (full + problem.gram.new_tensor(costs).cumsum(0)).flip(0)
    return Path(order, errors)


class _State:
    """Inverse and weights of the units still present; positions shrink as units go, `names` says which they
    are."""

    def __init__(self, problem: Reconstruction, inverse: Tensor) -> None:
        self.block = problem.block
        self.inverse = inverse
        self.weights = problem.weight.clone()
        if problem.offset is not None:
            self.weights += problem.offset @ inverse
        self.diagonal = diagonal_blocks(inverse, problem.block)
        self.names = torch.arange(problem.units, device=inverse.device)
        self.present = torch.ones(problem.units, dtype=torch.bool, device=inverse.device)
        self.pending = inverse.new_empty(inverse.shape[0], max(_PENDING, problem.block))
        self.used = 0

    def remove(self) -> tuple[int, float]:
        block = self.block
        cost = block_gain(self.weights, self.diagonal, 0.0)
        where = int(torch.where(self.present, cost, torch.inf).argmin())
        name, lost = int(self.names[where]), max(float(cost[where]), 0.0)
        columns = slice(where * block, (where + 1) * block)
        done = self.pending[:, : self.used]
        now = self.inverse[:, columns] - done @ done[columns].T
        factor = torch.linalg.cholesky(self.diagonal[where])
        update = torch.linalg.solve_triangular(factor, now.T, upper=False)  # [block, d]
        ahead = torch.linalg.solve_triangular(factor, self.weights[:, columns].T, upper=False)
        self.weights.addmm_(ahead.T, update, alpha=-1)
        split = update.view(block, -1, block).transpose(0, 1)
        self.diagonal -= split.transpose(1, 2) @ split
        self.diagonal[where] = torch.eye(block, dtype=self.diagonal.dtype, device=self.diagonal.device)
        self.present[where] = False
        self.pending[:, self.used : self.used + block] = update.T
        self.used += block
        if self.used + block > self.pending.shape[1]:
            self._flush()
        return name, lost

    def _flush(self) -> None:
        done = self.pending[:, : self.used]
        self.inverse.addmm_(done, done.T, alpha=-1)
        self.used = 0
        left = int(self.present.sum())
        if left and left < 0.8 * len(self.names):
            units = self.present.nonzero().flatten()
            offsets = torch.arange(self.block, device=units.device)
            index = (units[:, None] * self.block + offsets).flatten()
            self.inverse = self.inverse[index[:, None], index]
            self.weights = self.weights[:, index].contiguous()
            self.diagonal = self.diagonal[units]
            self.names, self.present = self.names[units], self.present[units]
            self.pending = self.pending.new_empty(len(index), self.pending.shape[1])
