"""How strongly the network answers to a small change of its input."""

import copy
import hashlib
import math
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from espalier.saliency.fall import arguments, falls, first_tensor, own_randomness
from espalier.saliency.state import Saliency, State
from espalier.space.search_space import SearchSpace


def zen_score(
    args: tuple[Any, ...] | torch.Tensor | None = None,
    kwargs: dict[str, Any] | None = None,
    *,
    alpha: float = 0.01,
    redraw: bool = True,
    seed: int = 0,
) -> Saliency:
    """A saliency: the fall of the Zen-score when a structure is removed.

    >>> saliency = zen_score(torch.randn(16, 3, 32, 32), seed=1)

    ``log mean |f(x) - f(x + alpha e)| + sum_n log sqrt(mean var_n)``: x and e are drawn from N(0, 1), with the
    shapes of the inputs (by default the space's example inputs); the mean runs over the examples; the sum
    runs over batch norms n, with the variance of what enters each channel over the batch, in train mode. Lin et
    al., "Zen-NAS" (2021). As there, the weights are drawn from N(0, 1) (``redraw``), biases are 0 and norms are
    fresh; with ``redraw=False`` the network's own are used. f is the network's first output, and shortcuts are
    kept: they are structures here.
    """

    def score(space: SearchSpace, state: State) -> torch.Tensor:
        inputs, other = _drawn(arguments(space, args, kwargs), alpha, seed)
        model = copy.deepcopy(space.model)
        if redraw:
            _redraw(model, seed)
        return falls(space, lambda network: _zen(network, inputs, other), model).to(state.size.device)

    return score


def _drawn(given: Any, alpha: float, seed: int) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    leaves, spec = pytree.tree_flatten(given)
    first, second = [], []
    for leaf in leaves:
        floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
        x = torch.randn(leaf.shape, generator=generator).to(leaf) if floating else leaf
        e = torch.randn(leaf.shape, generator=generator).to(leaf) if floating else 0
        first.append(x)
        second.append(x + alpha * e if floating else leaf)
    return pytree.tree_unflatten(first, spec), pytree.tree_unflatten(second, spec)


def _redraw(model: nn.Module, seed: int) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                own = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:6], "big")
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(own)))
            else:
                p.fill_(1.0 if name.rpartition(".")[2] == "weight" else 0.0)


def _zen(network: nn.Module, inputs: Any, other: Any) -> float:
    entering: list[float] = []

    def note(layer: Any, given: tuple[torch.Tensor, ...]) -> None:
        x = given[0]
        variance = x.double().var(dim=[d for d in range(x.ndim) if d != 1], correction=0).mean()
        entering.append(0.5 * math.log(float(variance) + layer.eps))

    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    network.train()
    device = next(network.parameters()).device
    with torch.no_grad(), own_randomness(device):
        changed = first_tensor(network(*other[0], **other[1]))
    handles = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        with torch.no_grad(), own_randomness(device):
            output = first_tensor(network(*inputs[0], **inputs[1]))
    finally:
        for handle in handles:
            handle.remove()
    change = float((output - changed).double().flatten(1).norm(dim=1).mean())
    return math.log(max(change, 1e-300)) + sum(entering)
