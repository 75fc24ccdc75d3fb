"""Where to cut the probabilities of gates after training."""

import torch
from torch import Tensor

from espalier.errors import TrainingError


def checked_threshold(value: float | str) -> float | str:
    """τ in [0, 1), or "histogram"; raises :class:`TrainingError` for all else."""
    if value == "histogram":
        return value
    if isinstance(value, str) or not hasattr(value, "__float__") or not 0.0 <= value < 1.0:
        raise TrainingError(f"threshold: a number from 0 up to but not including 1, or 'histogram', not {value!r}.")
    return float(value)


def histogram_threshold(pi: Tensor) -> float:
    """The threshold that splits the probabilities into the two tightest clusters (Otsu, 1979).

    >>> round(histogram_threshold(torch.tensor([0.01, 0.02, 0.2, 0.9, 0.95, 0.99])), 3)
    0.55

    ``pi``: float [V]. The cut is exact (over the sorted values, without bins) and lies midway between two of
    them. The paper leaves a threshold that looks at the histogram open and takes 0.5; where all values are
    equal there is nothing to split and 0.5 is returned.
    """
    values = pi.detach().double().flatten().sort().values
    if len(values) < 2 or bool(values[0] == values[-1]):
        return 0.5
    count = torch.arange(1, len(values), dtype=torch.float64, device=values.device)
    total = values.cumsum(0)
    low = total[:-1] / count
    high = (total[-1] - total[:-1]) / (len(values) - count)
    between = count * (len(values) - count) * (high - low).square()
    cut = int(torch.where(values[1:] > values[:-1], between, -1.0).argmax())
    return float(values[cut] + values[cut + 1]) / 2
