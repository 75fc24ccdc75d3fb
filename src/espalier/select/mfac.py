"""M-FAC pruning (Frantar et al. 2021): the same saliency with the full, matrix-free inverse Fisher."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from espalier.curvature.dual import DualInverse
from espalier.curvature.matrix_free import MatrixFreeInverse
from espalier.select.obs import brain_surgeon
from espalier.select.patterns import Quota, cardinality
from espalier.select.problem import Problem
from espalier.select.result import Result


def mfac(A: Tensor | np.ndarray, w_bar: Tensor, k: int | Quota, damping: float, recursion: bool = False) -> Result:
    """Prune by wⱼ²/(2[F⁻¹]ⱼⱼ) with the full empirical Fisher, and update the rest.

    >>> import torch
    >>> mfac(torch.tensor([[0.0, 3.0]]), torch.tensor([2.0, 1.0]), 1, damping=0.5).support
    tensor([False,  True])

    `recursion` runs the published n sequential rank-one steps; by default the n × n dual gives the same
    numbers sooner. The objective reported is problem (5) with λ = damping and no first-order term.
    """
    problem = Problem.of(A, None, w_bar, damping)
    quota = cardinality(k, problem.p) if isinstance(k, int) else k
    kind = MatrixFreeInverse if recursion else DualInverse
    return brain_surgeon(problem, quota, kind(problem.A, damping))
