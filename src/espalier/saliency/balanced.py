"""Skips and pools against everything else, each among its own kind."""

import torch

from espalier.saliency.cosine_magnitude import cosine_magnitude
from espalier.saliency.state import Saliency, State
from espalier.space.search_space import SearchSpace


def balanced(saliency: Saliency = cosine_magnitude) -> Saliency:
    """A saliency that replaces each score by its rank among structures of its kind, in (0, 1).

    >>> from espalier.saliency import magnitude
    >>> saliency = balanced(magnitude)

    The kinds are structures of a single element (the scalars of ``parameterless=True``) and all others. A scalar
    starts at 1 where weights are far smaller, and the gradient of weights before a norm is orthogonal to them where
    that of a scalar is not: side by side, hardly any score ever removes a skip or a pool. Equal scores share
    the middle of their ranks: the k-th of n has ``(k - 1/2) / n``.
    """

    def score(space: SearchSpace, state: State) -> torch.Tensor:
        scores = saliency(space, state)
        alone = (state.size == 1).to(scores.device)
        return torch.where(alone, _ranks(scores, alone), _ranks(scores, ~alone))

    return score


def _ranks(scores: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Rank of every score among some of them."""
    ordered = torch.where(among, scores, torch.inf).sort().values
    below, up_to = (torch.searchsorted(ordered, scores.contiguous(), right=right) for right in (False, True))
    return (below + up_to) / (2.0 * among.sum().clamp_min(1))
