"""Pivoted elimination: the step that forward and backward greedy selection share, mostly in matrix products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from espalier.curvature.symmetric import add_symmetric, gram_of

_PENDING = 2**19  # numbers in one panel of delayed updates (4 MiB): small enough to stay in the cache
_LOST = 1e-7  # what may be left of a unit's ‖R_j‖² before rounding asks for it to be computed anew


class Sweep:
    """A symmetric P [d, d] and rows R [m, d] from which units (b columns each) are taken one at a time.

    >>> sweep = Sweep(torch.eye(3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64), 1, lambda taken: None)
    >>> sweep.gain()
    tensor([1., 1., 1.], dtype=torch.float64)
    >>> sweep.take(1)
    1

    The gain of unit j is tr(R_j P_jj⁻¹ R_jᵀ); taking it leaves R − R_j P_jj⁻¹ P_j and P − P_:j P_jj⁻¹ P_j. With P the
    second moment and R the correlations this is forward selection; with P its inverse and R the weights it is
    backward elimination.

    With P_jj = L Lᵀ and V = L⁻¹ P_j, the update of P is VᵀV: only its diagonal blocks are applied at once, the rest is
    delayed and applied in panels. R is needed only through the diagonal blocks of M = RᵀR, so where R has many rows
    it is not kept at all: with U = L⁻¹ M_j and X = U − ½ U_:j L⁻ᵀ V, M changes by −VᵀX − XᵀV, delayed likewise, and
    the number of rows drops out of every step. Where a unit's ‖R_j‖² has shrunk so far that rounding could decide,
    `again(taken)` must return R [m, d] computed from scratch, for the units taken so far.

    Cost per step O(b·d·(panel + d)), memory O(d²). `floor` is the least diagonal of P that is told from zero.
    `explicit` says whether R is kept (by default: where it has few rows); P is overwritten if `own`.
    """

    def __init__(
        self,
        matrix: Tensor,
        rows: Tensor,
        block: int,
        again: Callable[[Tensor], Tensor | None],
        *,
        floor: float = 0.0,
        explicit: bool | None = None,
        own: bool = False,
    ) -> None:
        self.matrix, self.block, self.floor, self.own = matrix, block, floor, own
        self.again = again
        self.diagonal = diagonal_blocks(matrix, block)
        units = len(self.diagonal)
        self.names = torch.arange(units, device=matrix.device)
        self.present = torch.ones(units, dtype=torch.bool, device=matrix.device)
        self.taken: list[int] = []
        self.used = 0
        explicit = rows.shape[0] <= max(64, matrix.shape[0] // 8) if explicit is None else explicit
        self.rows = rows.clone() if explicit else None
        self.shared = matrix.new_empty(0, 0)  # M, with its updates delayed like those of P
        if not explicit:
            self._measure(rows)
        self._panels()

    def power(self) -> Tensor:
        """‖R_j‖² of every position [n]."""
        if self.rows is not None:
            return torch.linalg.vector_norm(self.rows, dim=0).square().view(-1, self.block).sum(1)
        return self.parts.diagonal(dim1=1, dim2=2).sum(1)

    def gain(self) -> Tensor:
        """tr(R_j P_jj⁻¹ R_jᵀ) of every position [n] (see `names`, `present`)."""
        if self.rows is not None:
            return block_gain(self.rows, self.diagonal, self.floor)
        if self.block == 1:
            power, spread = self.parts.flatten(), self.diagonal.flatten()
            gain = power.clamp_min(0) / spread.clamp_min(self.floor)
            return torch.where(spread > self.floor, gain, 0.0)
        jitter = self.floor * torch.eye(self.block, dtype=self.parts.dtype, device=self.parts.device)
        factor, failed = torch.linalg.cholesky_ex(self.diagonal + jitter)
        gain = torch.cholesky_solve(self.parts, factor).diagonal(dim1=1, dim2=2).sum(1)
        return torch.where(failed == 0, gain.clamp_min(0), 0.0)

    def lost(self, where: int) -> bool:
        """Whether rounding could decide the gain at this position; if so everything is measured anew."""
        if self.rows is not None or not self.taken or self.fresh == len(self.taken):
            return False
        if float(self.power()[where]) > _LOST * float(self.peak[where]):
            return False
        rows = self.again(torch.tensor(self.taken, device=self.names.device))
        assert rows is not None
        self._flush(where)
        self._measure(rows[:, self._columns(self.names)])
        return True

    def take(self, where: int) -> int:
        """Take the unit at this position; returns which unit that is."""
        block = self.block
        if self.used + block > len(self.done):
            where = self._flush(where)
        columns = slice(where * block, (where + 1) * block)
        name = int(self.names[where])
        pivot = self.diagonal[where].clone()
        pivot.diagonal().clamp_min_(self.floor)
        factor = torch.linalg.cholesky(pivot) if block > 1 else pivot.sqrt_()
        done = self.done[: self.used]
        row = torch.linalg.solve_triangular(
            factor, self.matrix[columns] - _product(done[:, columns], done), upper=False
        )
        if self.rows is not None:
            target = _solve(factor, self.rows[:, columns].T)
            self.rows.addmm_(target.T, row, alpha=-1)
        else:
            other = self.other[: self.used]
            now = self.shared[columns] - _product(done[:, columns], other) - _product(other[:, columns], done)
            image = _solve(factor, now)
            spread = _solve(factor, image[:, columns].T)
            image.addmm_(spread.T, row, alpha=-0.5)
            change = _per_unit(row, image)
            self.parts -= change + change.transpose(1, 2)
            self.parts[where] = 0.0
            self.peak = torch.maximum(self.peak, self.power())
            self.other[self.used : self.used + block] = image
        self.diagonal -= _per_unit(row, row)
        self.diagonal[where] = torch.eye(block, dtype=self.diagonal.dtype, device=self.diagonal.device)
        self.present[where] = False
        self.done[self.used : self.used + block] = row
        self.used += block
        self.taken.append(name)
        return name

    def _measure(self, rows: Tensor) -> None:
        self.shared = gram_of(rows)
        self.parts = diagonal_blocks(self.shared, self.block)
        self.peak = self.power()
        self.fresh = len(self.taken)

    def _panels(self) -> None:
        width = self.matrix.shape[0]
        length = max(128, _PENDING // width, self.block)
        self.done = self.matrix.new_empty(length, width)
        self.other = self.done if self.rows is not None else torch.empty_like(self.done)

    def _columns(self, units: Tensor) -> Tensor:
        offsets = torch.arange(self.block, device=units.device)
        return (units[:, None] * self.block + offsets).flatten()

    def _flush(self, where: int) -> int:
        """Apply what is delayed and drop what was taken; returns where the unit at this position is then."""
        done = self.done[: self.used]
        if not self.own:
            self.matrix, self.own = self.matrix.clone(), True
        add_symmetric(self.matrix, done, done, alpha=-1)
        if self.rows is None:
            add_symmetric(self.shared, done, self.other[: self.used], alpha=-1, both=True)
        self.used = 0
        left = int(self.present.sum())
        if left and left < 0.8 * len(self.names):
            units = self.present.nonzero().flatten()
            where = int((units == where).nonzero())
            index = self._columns(units)
            self.matrix = self.matrix[index[:, None], index]
            self.diagonal, self.names, self.present = self.diagonal[units], self.names[units], self.present[units]
            if self.rows is not None:
                self.rows = self.rows[:, index].contiguous()
            else:
                self.shared = self.shared[index[:, None], index]
                self.parts, self.peak = self.parts[units], self.peak[units]
            self._panels()
        return where


def diagonal_blocks(matrix: Tensor, block: int) -> Tensor:
    """A copy of the diagonal blocks [n / block, block, block] of a square matrix [n, n].

    >>> diagonal_blocks(torch.eye(4), 2).shape
    torch.Size([2, 2, 2])
    """
    units = matrix.shape[0] // block
    return matrix.reshape(units, block, units, block).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()


def block_gain(rows: Tensor, blocks: Tensor, floor: float) -> Tensor:
    """``tr(R_j D_j⁻¹ R_jᵀ)`` for every unit j, with R [m, units·b] and D [units, b, b].

    >>> block_gain(torch.ones(3, 2), torch.full((2, 1, 1), 3.0), 0.0)
    tensor([1., 1.])
    """
    units, block, _ = blocks.shape
    if block == 1:
        return torch.linalg.vector_norm(rows, dim=0).square() / blocks.flatten().clamp_min(floor)
    jitter = floor * torch.eye(block, dtype=blocks.dtype, device=blocks.device)
    factor, failed = torch.linalg.cholesky_ex(blocks + jitter)
    per_unit = rows.T.reshape(units, block, -1)
    gain = torch.linalg.solve_triangular(factor, per_unit, upper=False).square().sum((1, 2))
    # where a unit is explained by others to rounding, there is nothing to gain
    return torch.where(failed == 0, gain, 0.0)


def _solve(factor: Tensor, right: Tensor) -> Tensor:
    """``L⁻¹ right`` for a lower triangle L [b, b]."""
    return right / factor if len(factor) == 1 else torch.linalg.solve_triangular(factor, right, upper=False)


def _per_unit(left: Tensor, right: Tensor) -> Tensor:
    """The diagonal blocks [units, b, b] of ``leftᵀ right``, for left and right [b, units·b]."""
    block = len(left)
    if block == 1:
        return (left * right).view(-1, 1, 1)
    return left.view(block, -1, block).permute(1, 2, 0) @ right.view(block, -1, block).transpose(0, 1)


def _product(few: Tensor, many: Tensor) -> Tensor:
    """``fewᵀ many`` for few [n, b] and many [n, d]; a vector product where b = 1, which is several times faster."""
    if few.shape[1] == 1:
        return (many.T @ few[:, 0])[None]
    return few.T @ many
