"""Synaptic flow."""

from typing import Any

import torch
from torch.utils import _pytree as pytree

from espalier.modes import evaluating
from espalier.saliency.fall import arguments
from espalier.saliency.state import Saliency, State
from espalier.saliency.sums import sums
from espalier.space.search_space import SearchSpace


def synflow(args: tuple[Any, ...] | torch.Tensor | None = None, kwargs: dict[str, Any] | None = None) -> Saliency:
    """A saliency ``sum |x| dR/d|x|``, with R the sum of the outputs of the network of ``|parameters|`` on ones.

    >>> saliency = synflow()

    Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow" (2020). The
    proxy is a sum over parameters, so that a structure's score is the sum over its own: no network without it
    needs to be run. Norms with running statistics run in eval mode with mean 0 and variance 1, as in a fresh
    network. The inputs give shapes only; by default they are the space's example inputs.
    """

    def score(space: SearchSpace, state: State) -> torch.Tensor:
        values = {n: p.detach().abs().double().requires_grad_() for n, p in space.model.named_parameters()}
        buffers = {n: _fresh(n, b) for n, b in space.model.named_buffers()}
        ones = pytree.tree_map_only(torch.Tensor, _ones, arguments(space, args, kwargs))
        with evaluating(space.model), torch.enable_grad():
            output = torch.func.functional_call(space.model, {**values, **buffers}, *ones)
            total = sum(t.sum() for t in pytree.tree_leaves(output) if torch.is_tensor(t) and t.is_floating_point())
            inputs = list(values.values())
            flows = torch.autograd.grad(torch.as_tensor(total), inputs, allow_unused=True)
        pairs = zip(values.items(), flows, strict=True)
        return sums(space, {n: torch.zeros_like(v) if g is None else v.detach() * g for (n, v), g in pairs})

    return score


def _ones(tensor: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(tensor, dtype=torch.float64) if tensor.is_floating_point() else tensor


def _fresh(name: str, buffer: torch.Tensor) -> torch.Tensor:
    kind = name.rpartition(".")[2]
    if kind in ("running_mean", "running_var"):
        return torch.full_like(buffer, float(kind == "running_var"), dtype=torch.float64)
    return buffer.double() if buffer.is_floating_point() else buffer.clone()
