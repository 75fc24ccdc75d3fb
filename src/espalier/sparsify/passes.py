"""What holds while the antithetic pass runs: the same randomness, and untouched running statistics."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# Their own forward leaves the running statistics alone where it is told so; a subclass's may not.
_OBEYING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Normalisations keep their mode, but afterwards every buffer of the model is as it was.

    torch's batch norms leave their running statistics alone, which costs nothing; all other buffers, those of
    subclasses with a forward of their own among them, are copied and put back.
    """
    modules = list(model.modules())
    exact = [m for m in modules if isinstance(m, _OBEYING) and type(m) in _OBEYING]
    norms = [m for m in exact if m.training and "forward" not in vars(m)]
    before = [m.track_running_stats for m in norms]
    known = {id(m) for m in norms}
    saved = [
        (m, name, b, b.clone())
        for m in modules
        for name, b in m._buffers.items()
        if b is not None and not (id(m) in known and name in _STATISTICS)
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
