"""What a choice of structures takes, beside what a budget allows: predicted in closed form, and measured as built."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from espalier.errors import BudgetError
from espalier.space.budget import Budget
from espalier.space.latency import latencies, latency, timed

if TYPE_CHECKING:
    from espalier.space.search_space import SearchSpace


class Gauge:
    """A budget over a search space.

    >>> import torch
    >>> from espalier import Budget, search_space
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> gauge = Gauge(search_space(model, torch.rand(2, 3), levels=("channel",)), Budget(params=0.6))
    >>> gauge.full["params"], gauge.bounds, gauge.measured(["0[1]", "0[3]"])["params"]
    (26, {'params': 15.6}, 14)

    ``full``: what the whole network takes, by name. ``bounds``: what may stay, in the same units. ``table``: what the
    widths of the families are expected to take (:class:`~espalier.space.amounts.Amounts`).
    """

    def __init__(self, space: "SearchSpace", budget: Budget):
        if "weights" in budget.given:
            raise BudgetError(
                "weights= bounds single weights, and structures are chosen here: use a method for weights."
            )
        self.space, self.budget = space, budget
        self.inputs = (space.trace.args, space.trace.kwargs)
        self.full: dict[str, float] = {"structures": float(len(space)), **vars(space.cost())}
        self.table = space.amounts
        if "latency" in budget.given:
            self.full["latency"] = latency(space.model, *self.inputs)
            self.table = timed(space, self.full["latency"])
        self.bounds = budget.bounds(self.full)

    def measured(self, names: Sequence[str]) -> dict[str, float]:
        """What the network without these structures takes; it is built only where its latency is bounded."""
        amounts: dict[str, float] = {"structures": float(len(self.space) - len(names))}
        if {"params", "macs"} & set(self.bounds):
            amounts |= vars(self.space.cost(names))
        if "latency" in self.bounds:
            model = self.space.zero_parameters(self.space.solution(names))
            amounts["latency"] = self._latency(self.space.reduced(names, model).module)
        return amounts

    def _latency(self, small: nn.Module) -> float:
        """Measured beside the full network, which has changed if other work has come or gone meanwhile."""
        full, now = latencies([self.space.model, small], *self.inputs)
        return now if isinstance(self.budget.latency, str) else now / full * self.full["latency"]

    def shares(self, real: Mapping[str, float]) -> str:
        """The bounded amounts as fractions of the full network's, in words."""
        return ", ".join(f"{name}={real[name] / max(self.full[name], 1e-300):.3f}" for name in self.bounds)
