"""WoodFisher (Singh & Alistarh 2020): block-wise inverse Fisher, saliency and weight update."""

from __future__ import annotations

from typing import SupportsFloat

from espalier.curvature.woodbury import BlockWoodburyInverse
from espalier.select.inputs import Array, Count, quota_of
from espalier.select.obs import brain_surgeon
from espalier.select.problem import Problem
from espalier.select.result import Result


def woodfisher(
    A: Array,
    w_bar: Array,
    k: Count,
    ridge: SupportsFloat,
    block: int = 2000,
    sizes: tuple[int, ...] | None = None,
) -> Result:
    """Prune by wⱼ²/(2[F⁻¹]ⱼⱼ) with the block-diagonal F of blocks of `block` weights, and update the rest.

    >>> import torch
    >>> woodfisher(torch.tensor([[0.0, 3.0]]), torch.tensor([2.0, 1.0]), 1, ridge=0.5).support
    tensor([False,  True])

    A: [n, p] gradients; w_bar: [p]; k: a number of weights or a quota; ridge: λ > 0; sizes: lengths of the tensors,
    which blocks do not cross. The objective reported is problem (5) without first-order term. Raises what `chita`
    raises.
    """
    problem = Problem.of(A, None, w_bar, ridge)
    inverse = BlockWoodburyInverse(problem.A, problem.ridge, block, sizes)
    return brain_surgeon(problem, quota_of(k, problem.p), inverse)
