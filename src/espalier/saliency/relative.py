"""Structures of layers of different widths against each other."""

import numpy as np
import torch

from espalier.saliency.magnitude import magnitude
from espalier.saliency.state import Saliency, State, average
from espalier.space.search_space import SearchSpace


def relative(saliency: Saliency = magnitude) -> Saliency:
    """A saliency that divides each score by the mean over its family; made for scores that are not negative.

    >>> from espalier.saliency import taylor
    >>> score = relative(taylor)

    Weights of a wide layer are smaller than those of a narrow one throughout (their size goes with the fan-in):
    side by side, the channels of wide layers all come last, and a budget takes such layers down to one channel.
    Against their own family's mean they are comparable. Families of a single structure (segments) are divided by the
    mean over all of these.
    """

    @average
    def score(space: SearchSpace, state: State) -> torch.Tensor:
        scores = saliency(space, state)
        counts = np.array([family.count for family in space.families])
        kind = np.where(counts > 1, np.arange(len(counts)), len(counts))
        at = torch.from_numpy(np.repeat(kind, counts)).to(scores.device)
        total = scores.new_zeros(len(counts) + 1).index_add_(0, at, scores)
        size = scores.new_zeros(len(counts) + 1).index_add_(0, at, torch.ones_like(scores))
        mean = total / size.clamp_min(1.0)
        return scores / mean.clamp_min(torch.finfo(scores.dtype).tiny)[at]

    return score
