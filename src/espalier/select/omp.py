"""Orthogonal matching pursuit on second moments: one run gives the exact refit for every size."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from espalier.select.refit import Path, Reconstruction, Selection, refit, unit_power


def omp(
    problem: Reconstruction, size: int | None = None, *, criterion: Literal["gain", "correlation"] = "gain"
) -> Selection:
    """Keep `size` units chosen by orthogonal matching pursuit, with exact refit.

    >>> from espalier.select.refit import reconstruction
    >>> H = torch.rand(8, 100, dtype=torch.float64)
    >>> len(omp(reconstruction(torch.randn(3, 8, dtype=torch.float64), H @ H.T), 4).support)
    4

    See `omp_path`; `size` None keeps everything. Raises ValueError where the size is not from 1 to the
    number of units.
    """
    size = problem.check_size(problem.units if size is None else size)
    return refit(problem, omp_path(problem, size, criterion=criterion).support(size))


def omp_path(
    problem: Reconstruction, size: int | None = None, *, criterion: Literal["gain", "correlation"] = "gain"
) -> Path:
    """The supports and errors of all sizes up to `size` (default: all units).

    >>> from espalier.select.refit import reconstruction
    >>> H = torch.rand(8, 100, dtype=torch.float64)
    >>> path = omp_path(reconstruction(torch.randn(3, 8, dtype=torch.float64), H @ H.T))
    >>> bool((path.errors.diff() <= 0).all())
    True

    `criterion` "gain" adds the unit that lowers the refitted error most (orthogonal least squares);
    "correlation" is classical matching pursuit, which ignores how much of the unit earlier ones already
    explain.

    With K_SS = L Lᵀ, V = L⁻¹ K_{S,:} and Z = L⁻¹ C_Sᵀ, the residual correlation is R = C − ZᵀV and the
    unexplained part of unit j is D_j = K_jj − V_jᵀV_j; adding j lowers the error by tr(R_j D_j⁻¹ R_jᵀ). One
    step appends a block row to L, V and Z. Cost O(s·b·d·(s·b + d_out)), memory O(s·b·d).
    """
    size = problem.check_size(problem.units if size is None else size)
    if criterion not in ("gain", "correlation"):
        raise ValueError(f"criterion must be 'gain' or 'correlation', not {criterion!r}")
    block, units, gram = problem.block, problem.units, problem.gram
    residual = problem.cross.clone()
    schur = diagonal_blocks(gram, block)
    power = schur.diagonal(dim1=1, dim2=2).sum(1)
    floor = 1e-14 * float(power.mean()) / block
    rows = gram.new_empty(size * block, problem.columns)
    free = torch.ones(units, dtype=torch.bool, device=gram.device)
    order: list[int] = []
    gains: list[float] = []
    for step in range(size):
        gain = block_gain(residual, schur, floor)
        score = gain if criterion == "gain" else unit_power(residual, block) / power.clamp_min(floor)
        best = int(torch.where(free, score, -torch.inf).argmax())
        columns = slice(best * block, (best + 1) * block)
        done = rows[: step * block]
        pivot = schur[best].clone()
        pivot.diagonal().clamp_min_(floor)
        factor = torch.linalg.cholesky(pivot)
        row = torch.linalg.solve_triangular(factor, gram[columns] - done[:, columns].T @ done, upper=False)
        target = torch.linalg.solve_triangular(factor, residual[:, columns].T, upper=False)
        gains.append(max(float(gain[best]), 0.0))
        rows[step * block : (step + 1) * block] = row
        residual.addmm_(target.T, row, alpha=-1)
        split = row.view(block, units, block).transpose(0, 1)
        schur -= split.transpose(1, 2) @ split
        order.append(best)
        free[best] = False
        schur[best] = torch.eye(block, dtype=gram.dtype, device=gram.device)
    chosen = torch.tensor(order, device=gram.device)
    last = refit(problem, chosen)
    end = problem.objective(_scatter(problem, last))
    # summed from the end: small errors keep their digits
    drops = gram.new_tensor(gains).flip(0).cumsum(0).flip(0)
    return Path(chosen, torch.cat([drops + end, drops.new_tensor([end])]))


def diagonal_blocks(matrix: Tensor, block: int) -> Tensor:
    """A copy of the diagonal blocks [n / block, block, block] of a square matrix [n, n]."""
    units = matrix.shape[0] // block
    return matrix.reshape(units, block, units, block).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()


def block_gain(cross: Tensor, schur: Tensor, floor: float) -> Tensor:
    """``tr(R_j D_j⁻¹ R_jᵀ)`` for every unit j, with R [d_out, units·b] and D [units, b, b]."""
    units, block, _ = schur.shape
    if block == 1:
        return torch.linalg.vector_norm(cross, dim=0).square() / schur.flatten().clamp_min(floor)
    jitter = floor * torch.eye(block, dtype=schur.dtype, device=schur.device)
    factor, failed = torch.linalg.cholesky_ex(schur + jitter)
    per_unit = cross.T.reshape(units, block, -1)
    gain = torch.linalg.solve_triangular(factor, per_unit, upper=False).square().sum((1, 2))
    if bool(failed.any()):  # a unit that earlier ones explain to rounding: nothing to gain
        gain = torch.where(failed == 0, gain, 0.0)
    return gain


def _scatter(problem: Reconstruction, selection: Selection) -> Tensor:
    full = torch.zeros_like(problem.weight)
    full[:, problem.column_index(selection.support)] = selection.weights
    return full
