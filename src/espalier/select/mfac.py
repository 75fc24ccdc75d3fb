"""M-FAC pruning (Frantar et al. 2021): the same saliency with the full, matrix-free inverse Fisher."""

from __future__ import annotations

from typing import SupportsFloat

from espalier.curvature.dual import DualInverse
from espalier.curvature.matrix_free import MatrixFreeInverse
from espalier.select.inputs import Array, Count, quota_of
from espalier.select.obs import brain_surgeon
from espalier.select.problem import Problem
from espalier.select.result import Result


def mfac(A: Array, w_bar: Array, k: Count, ridge: SupportsFloat, recursion: bool = False) -> Result:
    """Prune by wⱼ²/(2[F⁻¹]ⱼⱼ) with the full empirical Fisher, and update the rest.

    >>> import torch
    >>> mfac(torch.tensor([[0.0, 3.0]]), torch.tensor([2.0, 1.0]), 1, ridge=0.5).support
    tensor([False,  True])

    `recursion` runs the published n sequential rank-one steps; by default the n × n dual gives the same
    numbers sooner. A: [n, p] gradients; w_bar: [p]; k: a number of weights or a quota; ridge: λ > 0. The objective
    reported is problem (5) without first-order term. Raises what `chita` raises.
    """
    problem = Problem.of(A, None, w_bar, ridge)
    kind = MatrixFreeInverse if recursion else DualInverse
    return brain_surgeon(problem, quota_of(k, problem.p), kind(problem.A, problem.ridge))
