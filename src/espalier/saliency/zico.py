"""The inverse coefficient of variation of the gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from espalier.errors import TrainingError
from espalier.saliency.fall import own_randomness
from espalier.saliency.state import Saliency, State
from espalier.saliency.sums import sums
from espalier.space.search_space import SearchSpace


def zico(
    batches: Sequence[tuple[Any, Any]],
    loss: Callable[[Any, Any], torch.Tensor] = nn.functional.cross_entropy,
) -> Saliency:
    """A saliency ``sum_l log sum_{w in l} mean |g_w| / std |g_w|`` over a structure's own layers l.

    >>> batches = [(torch.randn(4, 3), torch.randint(0, 2, (4,))) for _ in range(2)]
    >>> saliency = zico(batches)

    g_w is the gradient of ``loss(model(input), target)`` with respect to the weight w of a convolution or a
    linear layer (any parameter of two or more dimensions); mean and (population) standard deviation run over the
    ``batches``, two or more pairs of (input or tuple of inputs, target). Weights of no variation are left out.
    Li et al., "ZiCo: zero-shot NAS via inverse coefficient of variation on gradients" (2023). The proxy is a sum
    over layers, so that a structure's score is the sum over its own layers; a structure without any has 0.

    Raises :class:`TrainingError` for fewer than two batches.
    """
    if len(batches) < 2:
        raise TrainingError(f"zico needs two batches or more, for a variance over them; it was given {len(batches)}.")

    def score(space: SearchSpace, state: State) -> torch.Tensor:
        weights = {n: p for n, p in space.model.named_parameters() if p.ndim > 1 and p.requires_grad}
        sizes = [[g.double().abs() for g in _gradients(space.model, weights, batch, loss)] for batch in batches]
        total = torch.zeros(len(space), dtype=torch.float64, device=state.size.device)
        for i, name in enumerate(weights):
            over = torch.stack([size[i] for size in sizes])
            spread = over.std(0, correction=0)
            ratio = torch.where(spread > 0, over.mean(0) / spread, 0.0)
            inside = sums(space, {name: ratio}).to(total)
            total += torch.where(inside > 0, inside.clamp_min(1e-300).log(), 0.0)
        return total

    return score


def _gradients(model: nn.Module, weights: dict[str, nn.Parameter], batch: tuple[Any, Any], loss: Any) -> Any:
    inputs, target = batch
    buffers = {n: b.clone() for n, b in model.named_buffers()}  # running statistics stay as they are
    with torch.enable_grad(), own_randomness(next(model.parameters()).device):
        output = torch.func.functional_call(model, buffers, inputs if isinstance(inputs, tuple) else (inputs,))
        found = torch.autograd.grad(loss(output, target), list(weights.values()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, weights.values(), strict=True)]
