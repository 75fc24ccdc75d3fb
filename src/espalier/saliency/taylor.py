"""The change of the loss, to first order."""

import torch

from espalier.saliency.state import State
from espalier.space.search_space import SearchSpace


def taylor(space: SearchSpace, state: State) -> torch.Tensor:
    """``|sum x g|`` per structure: how much the loss would change, to first order, were x zero.

    The sum stands inside the absolute value, over all parameters of a structure at once: the group form of
    Molchanov et al., "Importance estimation for neural network pruning" (2019), whose score is its square.
    """
    return state.dot.abs()
