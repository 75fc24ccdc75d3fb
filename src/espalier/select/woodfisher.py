"""WoodFisher (Singh & Alistarh 2020): block-wise inverse Fisher, saliency and weight update."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from espalier.curvature.woodbury import BlockWoodburyInverse
from espalier.select.obs import brain_surgeon
from espalier.select.patterns import Quota, cardinality
from espalier.select.problem import Problem
from espalier.select.result import Result


def woodfisher(
    A: Tensor | np.ndarray,
    w_bar: Tensor,
    k: int | Quota,
    damping: float,
    block: int = 2000,
    sizes: tuple[int, ...] | None = None,
) -> Result:
    """Prune by wⱼ²/(2[F⁻¹]ⱼⱼ) with the block-diagonal F of blocks of `block` weights, and update the rest.

    >>> import torch
    >>> woodfisher(torch.tensor([[0.0, 3.0]]), torch.tensor([2.0, 1.0]), 1, damping=0.5).support
    tensor([False,  True])

    A: [n, p] gradients; w_bar: [p]; damping: λ > 0; sizes: lengths of the tensors, which blocks do not
    cross. The objective reported is problem (5) with λ = damping and no first-order term.
    """
    problem = Problem.of(A, None, w_bar, damping)
    quota = cardinality(k, problem.p) if isinstance(k, int) else k
    return brain_surgeon(problem, quota, BlockWoodburyInverse(problem.A, damping, block, sizes))
