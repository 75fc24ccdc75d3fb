"""What saliencies may look at."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from espalier.space.search_space import SearchSpace


@dataclass(frozen=True, eq=False)
class State:
    """Sums over each structure's own parameters x and their gradients g; each tensor is [structures].

    ``weight_sq`` = sum of x², ``grad_sq`` = sum of g², ``dot`` = sum of x g, ``size`` = number of elements.
    ``parameters`` and ``gradients`` are the tensors themselves, by name.
    """

    weight_sq: torch.Tensor
    grad_sq: torch.Tensor
    dot: torch.Tensor
    size: torch.Tensor
    parameters: Mapping[str, torch.Tensor]
    gradients: Mapping[str, torch.Tensor]


Saliency: TypeAlias = Callable[[SearchSpace, State], torch.Tensor]


def average(saliency: Saliency) -> Saliency:
    """Mark a saliency whose score is an average over a structure's parameters, or has no scale: it does not add up.

    >>> @average
    ... def largest_gradient(space, state):
    ...     return state.grad_sq / state.size
    >>> worth(largest_gradient, torch.tensor([1.0, 2.0]), torch.tensor([10.0, 3.0]))
    tensor([10.,  6.])
    """
    saliency.average = True  # type: ignore[attr-defined]
    return saliency


def worth(saliency: Saliency, scores: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """What keeping each structure [structures] is worth, to be added up and held against what it costs.

    A budget's knapsack weighs sums: an average over a structure's parameters counts once for each of them. Unmarked
    scores (a change of the loss, a sum of squares) are worth themselves.
    """
    if not getattr(saliency, "average", False):
        return scores
    return (scores - scores.min().clamp_max(0.0)) * size.to(scores)
