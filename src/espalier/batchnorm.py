"""Batch norm statistics of a changed network, taken anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from espalier.modes import evaluating


@torch.no_grad()
def recalibrate(model: nn.Module, inputs: Tensor | Iterable[Any], samples: int = 2000, batch: int = 250) -> int:
    """Replace the running statistics of every batch norm by those of the first `samples` inputs.

    >>> model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1)).eval()
    >>> recalibrate(model, torch.tensor([[0.0, 1.0], [0.0, 3.0]]))
    2

    inputs: one tensor of samples, or batches of them; several inputs are a tuple or a dict of tensors. Changed
    weights change the mean and variance of activations, which the stored statistics do not follow, or follow late.
    Each batch counts by its size; means and (unbiased) variances are averaged over batches of `batch`. No weight
    changes, and every module keeps its mode. Returns the number of samples used; 0, and nothing is run, where the
    model has no batch norm with statistics.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return 0
    device = next(model.parameters()).device
    momenta = [m.momentum for m in norms]
    sums = [
        (torch.zeros_like(cast(Tensor, m.running_mean)), torch.zeros_like(cast(Tensor, m.running_var))) for m in norms
    ]
    before = [(cast(Tensor, m.running_mean).clone(), cast(Tensor, m.running_var).clone()) for m in norms]
    used = 0
    try:
        with evaluating(model):
            for norm in norms:
                norm.train()
                norm.momentum = 1.0  # the running statistics are then those of the last batch
            for whole in _parts(inputs, batch):
                part = _cut(whole, 0, samples - used)
                count = _samples(part)
                if count < 2:  # one sample has no variance
                    break
                _call(model, tree_map(lambda t: t.to(device), part))
                for norm, (mean, variance) in zip(norms, sums, strict=True):
                    mean.add_(cast(Tensor, norm.running_mean), alpha=count)
                    variance.add_(cast(Tensor, norm.running_var), alpha=count)
                used += count
        for norm, new, old in zip(norms, sums, before, strict=True):
            mean, variance = (new[0] / used, new[1] / used) if used else old
            cast(Tensor, norm.running_mean).copy_(mean)
            cast(Tensor, norm.running_var).copy_(variance)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return used


def _parts(inputs: Tensor | Iterable[Any], batch: int) -> Iterable[Any]:
    for whole in [inputs] if isinstance(inputs, Tensor) else inputs:
        for start in range(0, _samples(whole), batch):
            yield _cut(whole, start, start + batch)


def _cut(whole: Any, start: int, stop: int) -> Any:
    return tree_map(lambda t: t[start:stop], whole)


def _samples(part: Any) -> int:
    return len(tree_leaves(part)[0])


def _call(model: nn.Module, part: Any) -> object:
    if isinstance(part, dict):
        return model(**part)
    return model(*part) if isinstance(part, tuple | list) else model(part)
