"""The sub-network as an instance of the model's own class, where that class can express it."""

from torch import fx, nn

from espalier.space.search_space import SearchSpace


def in_own_class(space: SearchSpace, model: nn.Module, lifted: fx.GraphModule) -> nn.Module | None:
    return None
