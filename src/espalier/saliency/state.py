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
