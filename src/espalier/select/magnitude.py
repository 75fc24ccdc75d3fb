"""Magnitude pruning: keep the largest |w|."""

from __future__ import annotations

import torch

from espalier.curvature.layout import WeightLayout
from espalier.select.inputs import Array, Count, quota_of, vector_of
from espalier.select.patterns import Quota, count_of
from espalier.select.result import Result


def magnitude(w_bar: Array, k: Count) -> Result:
    """Keep the k largest |w̄|, or within each cell of a quota its largest; the weights are not changed.

    >>> magnitude(torch.tensor([1.0, -3.0, 2.0]), 2).weights
    tensor([ 0., -3.,  2.])
    """
    w_bar = vector_of("w_bar", w_bar, len(w_bar), "columns")
    quota = quota_of(k, len(w_bar))
    support = quota.project(w_bar.abs())
    return Result(torch.where(support, w_bar, torch.zeros((), dtype=w_bar.dtype)), support, float("nan"))


def erdos_renyi_kernel(layout: WeightLayout, keep: float) -> Quota:
    """The ERK budget: a layer's density is proportional to (sum of its shape) / (product of its shape).

    >>> erdos_renyi_kernel(WeightLayout(("a", "b"), ((10, 10), (100, 100))), 0.1).quota.tolist()
    [92, 918]

    Densities above 1 are cut to 1 and the rest is shared out again (Evci et al. 2020). The quotas sum to
    ⌊keep · p⌋ up to one weight per tensor.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep = {keep}: the fraction of weights to keep must lie in (0, 1]")
    raw = [sum(shape) / size for shape, size in zip(layout.shapes, layout.sizes, strict=True)]
    total, full, scale = count_of(keep, layout.numel), set[int](), 0.0
    while True:
        rest = total - sum(layout.sizes[i] for i in full)
        open_ = [i for i in range(len(raw)) if i not in full]
        if not open_:
            break
        scale = rest / sum(raw[i] * layout.sizes[i] for i in open_)
        over = {i for i in open_ if scale * raw[i] >= 1}
        if not over:
            break
        full |= over
    quota = [size if i in full else max(1, round(scale * raw[i] * size)) for i, size in enumerate(layout.sizes)]
    return Quota(layout.tensor_index(), torch.tensor(quota))
