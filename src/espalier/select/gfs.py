"""Greedy forward selection (Ye et al., 2020): grow a uniformly weighted average of neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from espalier.select.refit import Reconstruction, Selection, refit, with_weights
from espalier.select.sweep import diagonal_blocks


def gfs(
    problem: Reconstruction,
    size: int,
    *,
    candidates: int | None = None,
    scale: Literal["mean", "fit", "one"] = "mean",
    loss: Callable[[Tensor, Tensor], float] | None = None,
    stop: Callable[[Tensor, Tensor], bool] | None = None,
    tolerance: float = 0.0,
    refitted: bool = False,
    seed: int = 0,
) -> Selection:
    """Add, one at a time, the unit whose average with those already chosen reproduces the layer best.

    >>> from espalier.select.refit import reconstruction
    >>> H = torch.rand(8, 100, dtype=torch.float64)
    >>> problem = reconstruction(torch.randn(3, 8, dtype=torch.float64), H @ H.T)
    >>> len(gfs(problem, 8, tolerance=0.3).support) <= 8
    True

    At most `size` units. `candidates` examines that many random units in each step (the published code: 50;
    None: all). `scale` is the factor on the chosen dense columns: "mean" is the paper's N/n for n of N
    units, "fit" the best single factor, "one" leaves them as they are. `loss(support, weights)` replaces
    the reconstruction error by any other, such as the whole network's; `stop(support, weights)` or a
    relative error of at most `tolerance` ends the growth early (the published rule: stop once the accuracy
    is within 2 % of the dense one's). `weights` is [d_out, n·block] and `support` in the order chosen.

    With A = W1_S K: f(S ∪ j) = α² (‖W1_S H_S‖² + 2⟨A_j, W1_j⟩ + ‖W1_j H_j‖²) − 2α (⟨W1_S, C_S⟩ + ⟨W1_j,
    C_j⟩) + ‖U‖². Cost O(s·d_out·d·block).
    """
    size = problem.check_size(size)
    weight, gram, block, units = problem.weight, problem.gram, problem.block, problem.units
    cross = problem.cross
    energy = problem.energy + problem.ridge * float(weight.square().sum())
    per_unit = weight.T.reshape(units, block, -1)
    own = (diagonal_blocks(gram, block) @ per_unit * per_unit).sum((1, 2))  # ‖W1_j H_j‖²
    target = (weight * cross).sum(0).view(units, block).sum(1)  # ⟨W1_j, C_j⟩
    image = torch.zeros_like(weight)
    norm, match = 0.0, 0.0
    free = torch.ones(units, dtype=torch.bool, device=gram.device)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []

    def factor(squared: Tensor, matched: Tensor) -> Tensor:
        if scale == "fit":
            return torch.where(squared > 0, matched / squared.clamp_min(1e-300), 0.0)
        return torch.full_like(squared, units / (len(order) + 1) if scale == "mean" else 1.0)

    def columns(chosen: list[int], alpha: float) -> tuple[Tensor, Tensor]:
        support = torch.tensor(chosen, device=gram.device)
        return support, alpha * weight[:, problem.column_index(support)]

    alpha = 1.0
    while len(order) < size:
        squared = norm + 2 * (image * weight).sum(0).view(units, block).sum(1) + own
        matched = match + target
        alphas = factor(squared, matched)
        error = alphas**2 * squared - 2 * alphas * matched + energy
        pool = free.nonzero().flatten()
        if candidates is not None and candidates < len(pool):
            pool = pool[torch.randperm(len(pool), generator=generator)[:candidates].to(pool.device)]
        if loss is None:
            best = int(pool[error[pool].argmin()])
        else:
            best = min(pool.tolist(), key=lambda unit: loss(*columns([*order, unit], float(alphas[unit]))))
        alpha = float(alphas[best])
        norm, match = float(squared[best]), float(matched[best])
        order.append(best)
        free[best] = False
        span = slice(best * block, (best + 1) * block)
        image.addmm_(weight[:, span], gram[span])
        if float(error[best]) <= tolerance * problem.energy or (stop is not None and stop(*columns(order, alpha))):
            break
    support, weights = columns(order, alpha)
    if refitted:
        return refit(problem, support)
    ranks = support.argsort()
    index = (ranks[:, None] * block + torch.arange(block, device=ranks.device)).flatten()
    return with_weights(problem, support[ranks], weights[:, index])
