"""Skips and pools against everything else, each among its own kind."""

import torch

from espalier.saliency.cosine_magnitude import cosine_magnitude
from espalier.saliency.state import Saliency, State
from espalier.space.search_space import SearchSpace


def balanced(saliency: Saliency = cosine_magnitude) -> Saliency:
    """A saliency that replaces each score by its rank among structures of its kind, in (0, 1).

    >>> from espalier.saliency import magnitude
    >>> saliency = balanced(magnitude)

    The kinds are structures of single numbers (the scalars of ``parameterless=True``) and all others. A scalar
    starts at 1 where weights are far smaller, and the gradient of weights before a norm is orthogonal to them where
    that of a scalar is not: side by side, hardly any score ever removes a skip or a pool. Equal scores share
    the middle of their ranks: the k-th of n has ``(k - 1/2) / n``.
    """

    def score(space: SearchSpace, state: State) -> torch.Tensor:
        scores = saliency(space, state)
        alone = _scalars(space).to(scores.device)
        return torch.where(alone, _ranks(scores, alone), _ranks(scores, ~alone))

    return score


def _scalars(space: SearchSpace) -> torch.Tensor:
    """Which structures consist of parameters of one element each."""
    sizes = {name: p.numel() for name, p in space.model.named_parameters()}
    each = [all(sizes[name] == 1 for name in f.parameters) for f in space.families]
    return torch.tensor(each).repeat_interleave(torch.tensor([f.count for f in space.families]))


def _ranks(scores: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Rank of every score among some of them."""
    ordered = torch.where(among, scores, torch.inf).sort().values
    below, up_to = (torch.searchsorted(ordered, scores.contiguous(), right=right) for right in (False, True))
    return (below + up_to) / (2.0 * among.sum().clamp_min(1))
