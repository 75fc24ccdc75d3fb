"""What holds while the antithetic pass runs: the same randomness, and untouched running statistics."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms keep their mode, but leave their running statistics alone."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    before = [m.track_running_stats for m in norms]
    for m in norms:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m, tracked in zip(norms, before, strict=True):
            m.track_running_stats = tracked


@contextmanager
def same_noise(model: nn.Module) -> Iterator[None]:
    """The next pass sees the same random numbers as this one: dropout, as a layer or as a function."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)):
        yield
