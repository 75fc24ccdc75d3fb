"""Steps on the support between two prunings, with the curvature that the pruning was decided by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from espalier.curvature.dual import DualInverse
from espalier.curvature.gradients import Gradients, Pair, mini_batches
from espalier.curvature.matrix import columns
from espalier.curvature.per_layer import Loss


@dataclass(frozen=True)
class Steps:
    """How many steps on the support follow each pruning.

    count: 0 for none, as in the paper. batch: fresh samples per step. size: η of the first step, in full Gauss-Newton
    steps; it falls linearly, so that a stage does not end in the noise of its last batch. autocast: the type that the
    forward pass computes in, as in `torch.autocast`; bfloat16 takes half the time where the processor has it.

    >>> Steps(count=2, size=0.4).sizes
    [0.4, 0.2]
    """

    count: int = 0
    batch: int = 250
    size: float = 0.4
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.count < 0 or self.batch < 1 or not self.size > 0:
            raise ValueError(f"{self}: count is at least 0, batch at least 1 and size above 0")

    @property
    def sizes(self) -> list[float]:
        """η of every step."""
        return [self.size * (1 - t / self.count) for t in range(self.count)]


def step_on_support(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Pair],
    found: Gradients,
    support: Tensor,
    ridge: float,
    sizes: Sequence[float],
    autocast: torch.dtype | None = None,
) -> None:
    """A step of each size on a batch of its own, on the weights of the support alone; the model is changed.

    >>> model = nn.Linear(3, 2, bias=False).eval()
    >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
    >>> from espalier.curvature.gradients import gradients
    >>> found = gradients(model, nn.functional.cross_entropy, (x, y), n=4, batch=2)
    >>> support = torch.tensor([True, False, True, True, True, False])
    >>> step_on_support(model, nn.functional.cross_entropy, [(x, y)], found, support, 0.1, sizes=[0.3])

    wₛ ← wₛ − η (AₛᵀAₛ/n + λI)⁻¹ ∇ₛl / m: problem (5) on the support, with its curvature as it was at the pruning and
    its first-order term from the batch, by the n × n dual. ``found``: A [n, p] with the m = `found.batch` samples
    averaged in each row; ``support``: bool [p]. Batch norms normalise by the batch's own statistics, as in training.
    """
    parameters = dict(model.named_parameters())
    wanted = [parameters[name] for name in found.layout.names]
    inverse = DualInverse(columns(found.A, support.nonzero().flatten()), ridge)
    device = wanted[0].device
    training = {module: module.training for module in model.modules()}
    model.train()
    try:
        for (x, y), size in zip(batches, sizes, strict=True):
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                value = loss(model(x.to(device)), y.to(device))
            slopes = torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)
            slope = torch.cat([s.reshape(-1) for s in slopes]).cpu()[support]
            if not bool(torch.isfinite(slope.sum())):
                raise ValueError(f"the gradient is not finite after a step of size {size}: take smaller steps")
            weights = found.layout.flatten(model).cpu()
            weights[support] -= (inverse @ slope).to(weights.dtype) * (size / found.batch)
            found.layout.write(model, weights)
    finally:
        for module, mode in training.items():
            module.training = mode


def in_batches(loader: Iterable[Pair], count: int, batch: int) -> Iterator[Pair]:
    """`count` batches of one size from a loader of any, begun anew where it ends.

    >>> [len(x) for x, _ in in_batches([(torch.zeros(3), torch.zeros(3))], 2, 4)]
    [4, 4]
    """
    yield from mini_batches(_again_and_again(loader), 0, count * batch, batch)


def _again_and_again(loader: Iterable[Pair]) -> Iterator[Pair]:
    while True:
        empty = True
        for pair in loader:
            empty = False
            yield pair
        if empty:
            raise ValueError("the loader gives no more samples for the steps on the support: is it an iterator?")
