"""i-SpaSP (Wolfe & Kyrillidis, 2021): structured pruning as sparse signal recovery, without a refit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from espalier.select.refit import Reconstruction, Selection, keep_dense, refit, unit_power

Importance = Literal["sum", "absolute", "norm"]


def ispasp(
    problem: Reconstruction,
    size: int,
    *,
    iterations: int = 20,
    importance: Importance = "sum",
    refitted: bool = False,
) -> Selection:
    """Keep `size` units chosen by i-SpaSP, with their dense weights (as published) or refitted ones.

    >>> from espalier.select.refit import reconstruction
    >>> H = torch.rand(8, 100, dtype=torch.float64)
    >>> problem = reconstruction(torch.randn(3, 8, dtype=torch.float64), H @ H.T, mean=H.mean(1))
    >>> len(ispasp(problem, 4).support)
    4

    `importance` "sum" is the published μ (signed row sums, added up within a unit), which needs the
    problem's `mean`; "absolute" takes |y| instead, as the theory of CoSaMP does; "norm" uses the rows'
    Euclidean norms, for activations that can be negative (GELU, attention heads).

    From S = ∅ and V = U = W1 H, `iterations` times: y = μ(W1ᵀ V); Ω = top-2s of y; S = top-s of h = μ(H)
    within Ω ∪ S; V = U − W1_S H_S. Since μ is linear, y = W1ᵀ(W1 − W1_S) h: the published choice depends on
    the data only through the d row sums. Cost O(T·d_out·d), and O(T·d_out·d²) with "norm".
    """
    size = problem.check_size(size)
    if importance == "norm":
        rows = unit_power(problem.gram.diagonal().sqrt()[None], problem.block)

        def residual_importance(removed: Tensor) -> Tensor:
            change = problem.weight * removed
            spread = change @ problem.gram @ change.T
            return unit_power(_square_root(spread) @ problem.weight, problem.block)

    else:
        if problem.mean is None:
            raise ValueError(f"importance={importance!r} needs the mean activations; give `mean`, or use 'norm'")
        mean = problem.mean
        rows = _within_units(mean, problem.block, importance)

        def residual_importance(removed: Tensor) -> Tensor:
            score = problem.weight.T @ (problem.weight @ (removed * mean))
            return _within_units(score, problem.block, importance)

    support = _support_pursuit(rows, residual_importance, size, problem.block, iterations)
    return refit(problem, support) if refitted else keep_dense(problem, support)


def ispasp_from_data(
    weight: Tensor, batches: Callable[[], Iterable[Tensor]], size: int, *, iterations: int = 20
) -> Tensor:
    """The support [size] of published i-SpaSP, computed from the activations in every iteration.

    >>> H = torch.rand(8, 100)
    >>> ispasp_from_data(torch.randn(3, 8), lambda: [H], 4).shape
    torch.Size([4])

    `batches()` starts a pass over H in pieces [d, B]. This is the algorithm as written, O(T·B·d_out·d),
    kept as the reference to which the moment form is compared.
    """
    rows = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    outputs = []
    for hidden in batches():
        rows += hidden.double().sum(1)
        outputs.append(weight @ hidden)

    def residual_importance(removed: Tensor) -> Tensor:
        score = torch.zeros_like(rows)
        kept = (weight * (1 - removed).to(weight)).contiguous()
        for hidden, output in zip(batches(), outputs, strict=True):
            score += (weight.T @ (output - kept @ hidden)).sum(1).double()
        return score

    return _support_pursuit(rows, residual_importance, size, 1, iterations, until_fixed=False)


def residual_bound(weight: Tensor, magnitude: float, p: float, size: int) -> float:
    """Upper bound of ‖U − W1_S H_S‖_F for S the `size` largest rows of a p-row-compressible, nonnegative H.

    >>> residual_bound(torch.eye(3), 1.0, 0.5, 4) == (3.0) ** -0.5 * 4 ** -1.5
    True

    ‖V‖_F ≤ ‖W1‖₂ R (2/p − 1)^(−1/2) s^(1/2 − 1/p), for row sums of at most R·i^(−1/p) in descending order.
    """
    norm = float(torch.linalg.matrix_norm(weight.double(), 2))
    return norm * magnitude * (2 / p - 1) ** -0.5 * size ** (0.5 - 1 / p)


def _support_pursuit(
    rows: Tensor,
    residual_importance: Callable[[Tensor], Tensor],
    size: int,
    block: int,
    iterations: int,
    *,
    until_fixed: bool = True,
) -> Tensor:
    units = len(rows)
    kept = torch.zeros(units, dtype=torch.bool, device=rows.device)
    for _ in range(iterations):
        score = residual_importance((~kept).double().repeat_interleave(block))
        merged = kept.clone()
        merged[score.topk(min(2 * size, units)).indices] = True
        chosen = torch.where(merged, rows, -torch.inf).topk(size).indices
        previous, kept = kept, torch.zeros_like(kept)
        kept[chosen] = True
        if until_fixed and bool((previous == kept).all()):
            break  # a fixed point: further iterations repeat it
    return kept.nonzero().flatten()


def _within_units(values: Tensor, block: int, importance: Importance) -> Tensor:
    total = values.view(-1, block).sum(1)
    return total.abs() if importance == "absolute" else total


def _square_root(matrix: Tensor) -> Tensor:
    """R with Rᵀ R = matrix, for a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp_min(0).sqrt()[:, None] * vectors.T
