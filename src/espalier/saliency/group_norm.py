"""The energy of a structure's parameters."""

import torch

from espalier.saliency.state import State
from espalier.space.search_space import SearchSpace


def group_norm(space: SearchSpace, state: State) -> torch.Tensor:
    """``|x|²`` per structure, over all coupled parameters: what zeroing the structure moves the weights by.

    A sum, so that it adds up over structures, as a budget's knapsack asks for; with it the least of the network's
    energy is lost for what a removal saves.
    """
    return state.weight_sq
