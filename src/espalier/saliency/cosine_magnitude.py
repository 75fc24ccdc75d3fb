"""The default of ASGSSD and DHSPG (Chen et al., 2023)."""

import torch

from espalier.saliency.state import State, average
from espalier.space.search_space import SearchSpace


@average
def cosine_magnitude(space: SearchSpace, state: State) -> torch.Tensor:
    """``|x| / sqrt(n) - cos(-g, -x)`` per structure, each part divided by its norm over all structures.

    Where the descent direction -g points along the projection -x, removing the structure lowers the loss, and
    the cosine is high: the structure is redundant. The magnitude is its distance to the origin. Published codes
    differ in the cosine's sign; the paper has this one.
    """
    magnitude = (state.weight_sq / state.size).sqrt()
    cosine = state.dot / (state.weight_sq * state.grad_sq).sqrt().clamp_min(torch.finfo(state.dot.dtype).tiny)
    return _normalized(magnitude) - _normalized(cosine)


def _normalized(score: torch.Tensor) -> torch.Tensor:
    return score / score.norm().clamp_min(torch.finfo(score.dtype).tiny)
