"""No knowledge at all."""

import hashlib

import torch

from espalier.saliency.state import Saliency, State, average
from espalier.space.search_space import SearchSpace


def random(seed: int = 0) -> Saliency:
    """A saliency that is uniform in [0, 1), drawn from the seed and each structure's name.

    >>> saliency = random(seed=1)

    The baseline that every score must beat: with it, :class:`espalier.H2SPG` removes a random valid set. The
    same structure gets the same number in every step, whatever its place.
    """

    @average
    def score(space: SearchSpace, state: State) -> torch.Tensor:
        digests = (hashlib.sha256(f"{seed}:{s.name}".encode()).digest() for s in space.structures)
        numbers = [int.from_bytes(d[:6], "big") / 2**48 for d in digests]
        return torch.tensor(numbers, device=state.size.device)

    return score
