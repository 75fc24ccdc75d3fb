"""What every weight selector returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from espalier.curvature.layout import WeightLayout

if TYPE_CHECKING:
    from espalier.select.problem import Problem


@dataclass(frozen=True)
class Result:
    """Pruned weights, what stays, and how the objective got there.

    weights: [p], exactly zero off the support. support: bool [p]. objective: Q(weights), recomputed in
    float64 from the returned weights (NaN for selectors without a model of the loss). history: the objective
    after each step of the solver, never increasing within a stage. info: counts of steps, swaps, passes.
    """

    weights: Tensor
    support: Tensor
    objective: float
    history: tuple[float, ...] = ()
    info: dict[str, float] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """Number of weights that stay."""
        return int(self.support.sum())

    def masks(self, layout: WeightLayout) -> dict[str, Tensor]:
        """Keep masks per parameter name, bool, in the parameters' shapes."""
        return layout.unflatten(self.support)

    def refitted(self, layout: WeightLayout) -> dict[str, Tensor]:
        """Weights per parameter name, in the parameters' shapes."""
        return layout.unflatten(self.weights)


def finish(problem: Problem, weights: Tensor, support: Tensor, history: list[float], **info: float) -> Result:
    """Zero what is off the support exactly and recompute the objective in float64."""
    weights = torch.where(support, weights, torch.zeros((), dtype=weights.dtype))
    return Result(weights, support, problem.objective(weights), tuple(history), info)
