"""Optimal Brain Surgeon with any inverse Fisher: the common part of WoodFisher and M-FAC."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from espalier.select.patterns import Quota
from espalier.select.problem import Problem, largest_square, too_small
from espalier.select.result import Result, finish


class Inverse(Protocol):
    """What both need of F⁻¹: products and the diagonal."""

    def __matmul__(self, v: Tensor) -> Tensor: ...

    def diag(self) -> Tensor: ...


def brain_surgeon(problem: Problem, quota: Quota, inverse: Inverse) -> Result:
    """Remove the weights of lowest saliency wⱼ²/(2[F⁻¹]ⱼⱼ), and add up their single-weight corrections.

    w ← w̄ − F⁻¹s with sⱼ = wⱼ/[F⁻¹]ⱼⱼ for the removed weights; what was removed is then set to zero. The
    corrections ignore each other, which is what the joint refit of CHITA does better.
    """
    try:
        diag = inverse.diag().to(problem.w_bar.dtype)
    except torch.linalg.LinAlgError as error:
        raise ValueError(too_small(problem, largest_square(problem.A))) from error
    score = problem.w_bar.square() / (2 * diag)
    support = quota.project(score)
    removed = torch.where(support, torch.zeros((), dtype=score.dtype), problem.w_bar / diag)
    weights = problem.w_bar - (inverse @ removed).to(score.dtype)
    return finish(problem, weights, support, [])
