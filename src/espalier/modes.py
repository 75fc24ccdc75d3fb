"""Train and eval mode, changed for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def keeping_modes(*modules: nn.Module) -> Iterator[None]:
    """Afterwards every module within these is in the mode that it has now."""
    modes = {m: m.training for module in modules for m in module.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode, and every module's own mode afterwards.

    >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
    >>> with evaluating(model):
    ...     model[0].training
    False
    >>> [m.training for m in model]
    [True, False]
    """
    with keeping_modes(*modules):
        for module in modules:
            module.eval()
        yield
