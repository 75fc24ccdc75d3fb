"""Symmetric products at half the work: BLAS ``syrk`` in panels, which torch does not offer."""

from torch import Tensor

_PANEL = 256  # columns; narrower panels save little more and slow the products down


def add_symmetric(matrix: Tensor, left: Tensor, right: Tensor, *, alpha: float = 1.0, both: bool = False) -> Tensor:
    """``matrix += alpha · leftᵀ right`` in place, where that product is known to be symmetric.

    >>> import torch
    >>> rows = torch.rand(5, 600, dtype=torch.float64)
    >>> torch.allclose(add_symmetric(torch.zeros(600, 600, dtype=torch.float64), rows, rows), rows.T @ rows)
    True

    `matrix` [d, d] must itself be symmetric, `left` and `right` are [n, d]; with `both`, ``rightᵀ left`` is added too,
    and they may be any matrices. Only the blocks on and below the diagonal
    are multiplied out; the rest is copied from them. Where that would cost more than it saves (few rows or columns),
    the whole product is computed. Returns `matrix`.
    """
    columns = matrix.shape[0]
    if columns <= 2 * _PANEL or left.shape[0] <= 16:
        matrix.addmm_(left.T, right, alpha=alpha)
        return matrix.addmm_(right.T, left, alpha=alpha) if both else matrix
    for start in range(0, columns, _PANEL):
        stop = min(start + _PANEL, columns)
        panel = matrix[start:stop, :stop].addmm_(left[:, start:stop].T, right[:, :stop], alpha=alpha)
        if both:
            panel.addmm_(right[:, start:stop].T, left[:, :stop], alpha=alpha)
        matrix[:start, start:stop] = matrix[start:stop, :start].T
    return matrix


def gram_of(rows: Tensor) -> Tensor:
    """``rowsᵀ rows`` [d, d] for rows [n, d].

    >>> import torch
    >>> gram_of(torch.ones(3, 2))
    tensor([[3., 3.],
            [3., 3.]])
    """
    return add_symmetric(rows.new_zeros(rows.shape[1], rows.shape[1]), rows, rows)
