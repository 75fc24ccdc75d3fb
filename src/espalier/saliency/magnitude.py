"""The average size of a structure's parameters."""

import torch

from espalier.saliency.state import State, average
from espalier.space.search_space import SearchSpace


@average
def magnitude(space: SearchSpace, state: State) -> torch.Tensor:
    """``|x| / sqrt(n)`` per structure: the root mean square of its parameters."""
    return (state.weight_sq / state.size).sqrt()
