"""The condition number of the neural tangent kernel."""

from typing import Any

import torch
from torch import nn

from espalier.saliency.fall import arguments, falls, first_tensor, own_randomness
from espalier.saliency.state import Saliency, State
from espalier.space.search_space import SearchSpace

_WORST = 1e9


def ntk(args: tuple[Any, ...] | torch.Tensor | None = None, kwargs: dict[str, Any] | None = None) -> Saliency:
    """A saliency: how much the tangent kernel's condition number rises when a structure is removed.

    >>> saliency = ntk(torch.randn(16, 3, 32, 32))

    ``kappa = lambda_max / lambda_min`` of ``K_ij = <J_i, J_j>``, where J_i is the gradient of the sum of the outputs
    for example i with respect to all parameters, in train mode. A small kappa means that the network trains
    easily: Chen et al., "Neural architecture search on ImageNet in four GPU hours" (TE-NAS, 2021). Eigenvalues
    below 1e-9 of the largest count as that: kappa is at most 1e9. By default the batch is the space's example
    inputs.
    """

    def score(space: SearchSpace, state: State) -> torch.Tensor:
        given = arguments(space, args, kwargs)
        return falls(space, lambda network: -_condition(network, *given)).to(state.size.device)

    return score


def _condition(network: nn.Module, args: Any, kwargs: Any) -> float:
    parameters = [p for p in network.train().parameters() if p.requires_grad]
    if not parameters:
        return _WORST
    with torch.enable_grad(), own_randomness(parameters[0].device):
        output = first_tensor(network(*args, **kwargs))
        rows = []
        for example in output.flatten(1).sum(1):
            found = torch.autograd.grad(example, parameters, retain_graph=True, allow_unused=True)
            rows.append(torch.cat([g.flatten().double() for g in found if g is not None]))
    jacobian = torch.stack(rows)
    values = torch.linalg.eigvalsh(jacobian @ jacobian.T)
    return float(values[-1] / values[0].clamp_min(values[-1] / _WORST)) if values[-1] > 0 else _WORST
