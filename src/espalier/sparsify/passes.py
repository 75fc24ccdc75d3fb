"""What holds while the antithetic pass runs: the same randomness, and untouched running statistics."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Normalisations keep their mode, but afterwards every buffer of the model is as it was.

    Batch norms leave their running statistics alone, which costs nothing; other buffers are copied and put back.
    """
    modules = list(model.modules())
    norms = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    before = [m.track_running_stats for m in norms]
    known = {id(m) for m in norms}
    saved = [
        (m, name, b, b.clone())
        for m in modules
        if m._buffers and id(m) not in known
        for name, b in m._buffers.items()
        if b is not None
    ]
    for m in norms:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m, tracked in zip(norms, before, strict=True):
            m.track_running_stats = tracked
        for m, name, b, copy in saved:
            b.data.copy_(copy)  # unconditionally: functional norms write without counting up the version
            m._buffers[name] = b


@contextmanager
def same_noise(model: nn.Module) -> Iterator[None]:
    """The next pass sees the same random numbers as this one: dropout, as a layer or as a function."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)):
        yield
