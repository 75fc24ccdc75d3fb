"""Orthogonal matching pursuit on second moments: one run gives the exact refit for every size."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from espalier.select.refit import Path, Reconstruction, Selection, inner, refit, residual_of, solve_on
from espalier.select.sweep import Sweep, diagonal_blocks


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

    With the columns of S swept out, the residual correlation is R = C − C_S K_SS⁻¹ K_S and the unexplained part of
    unit j is D_j = [K − K_:S K_SS⁻¹ K_S]_jj; adding j lowers the error by tr(R_j D_j⁻¹ R_jᵀ). Both are kept up to
    date by :class:`espalier.select.sweep.Sweep`. Cost O(s·b·d²) as matrix products and O(d²·d_out) once, memory O(d²).
    """
    size = problem.check_size(problem.units if size is None else size)
    if criterion not in ("gain", "correlation"):
        raise ValueError(f"criterion must be 'gain' or 'correlation', not {criterion!r}")
    dense = diagonal_blocks(problem.gram, problem.block).diagonal(dim1=1, dim2=2).sum(1)
    floor = 1e-14 * float(dense.mean()) / problem.block
    sweep = Sweep(problem.gram, problem.cross, problem.block, residual_of(problem), floor=floor)
    gains: list[float] = []
    for _ in range(size):
        gain, best = _best(sweep, dense, floor, criterion)
        if sweep.lost(best):
            gain, best = _best(sweep, dense, floor, criterion)
        gains.append(max(float(gain[best]), 0.0))
        sweep.take(best)
    chosen = torch.tensor(sweep.taken, device=problem.gram.device)
    end = _end(problem, chosen)
    # summed from the end: small errors keep their digits
    drops = problem.gram.new_tensor(gains).flip(0).cumsum(0).flip(0)
    return Path(chosen, torch.cat([drops + end, drops.new_tensor([end])]))


def _best(sweep: Sweep, dense: Tensor, floor: float, criterion: str) -> tuple[Tensor, int]:
    gain = sweep.gain()
    score = gain if criterion == "gain" else sweep.power() / dense[sweep.names].clamp_min(floor)
    return gain, int(torch.where(sweep.present, score, -torch.inf).argmax())


def _end(problem: Reconstruction, support: Tensor) -> float:
    """The objective of the refit on the support: ``f(0) − tr(C_S K_SS⁻¹ C_Sᵀ)``, or in full where that would cancel."""
    index = problem.column_index(support)
    start = problem.objective_of_nothing()
    factor, failed = torch.linalg.cholesky_ex(problem.gram[index[:, None], index])
    if not int(failed):
        half = torch.linalg.solve_triangular(factor, problem.cross[:, index].T, upper=False)
        end = start - inner(half, half)
        if end > 1e-6 * start:
            return end
    full = torch.zeros_like(problem.weight)
    full[:, index] = solve_on(problem, index)
    return problem.objective(full)
