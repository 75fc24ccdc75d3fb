"""Which structures go when they are taken in a given order: as few as the budget allows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from espalier.errors import BudgetError
from espalier.space.budget import Budget, within
from espalier.space.cost import Cost

if TYPE_CHECKING:
    from espalier.space.search_space import SearchSpace


def meet(space: "SearchSpace", order: Sequence[str], budget: Budget) -> list[str]:
    """Structures to remove so that the budget holds: as few as possible, taken in ``order`` where valid.

    The result is at most the budget, and one structure fewer would exceed it. Raises :class:`BudgetError`,
    naming the nearest that can be met, if the order and a few others all end before the budget is met.
    """
    if not set(budget.given) <= {"structures", "params", "macs"}:
        raise BudgetError(f"an order of structures meets bounds on structures, params and macs, not {budget}.")
    if budget.shapes_widths and any(f.components is not None for f in space.families):
        raise BudgetError(f"an order of structures holds no round_to, min_keep or max_keep: {budget}.")
    least = budget.structures_to_remove(len(space))
    fits = _Within(space, budget)
    chain = space.removable_in_order(order)
    if len(chain) < least or not fits(chain):
        others = _other_orders(space, order)
        fitting = [c for c in others if len(c) >= least and fits(c)]
        if not fitting:
            raise BudgetError(_nearest(space, [chain, *others], budget, least))
        chain = fitting[0]
    if budget.params is None and budget.macs is None:
        return chain[:least]
    return chain[: _shortest(chain, least, fits, _by_estimate(space, chain, budget, least))]


def _shortest(chain: Sequence[str], least: int, fits: "_Within", guess: int) -> int:
    """Length of the shortest prefix (at least ``least``) within the budget; costs fall along the chain.

    Each look builds a sub-network, so the search starts at the guess and doubles its steps from there.
    """
    low, high = least, len(chain)  # the whole chain is within the budget
    step = 1
    while low < high and low <= (at := min(max(guess, low), high - 1)):
        if fits(chain[:at]):
            high, guess = at, at - step
        else:
            low, guess = at + 1, at + step
        step *= 2
        if step > 4:  # the guess was poor: halve what is left
            guess = (low + high) // 2
    return low


def estimate(space: "SearchSpace", budget: Budget, trials: int = 8, generator: torch.Generator | None = None) -> float:
    """About how many structures a budget takes away: the mean over random removals (ASGSSD, appendix A.2).

    Quick and not exact: the parameters and MACs of what is still reachable are added up, and no sub-network is
    built. :func:`meet` is exact.
    """
    counts = []
    for _ in range(trials):
        order = torch.randperm(len(space), generator=generator).tolist()
        chain = space.removable_in_order([space.structures[i].name for i in order])
        counts.append(_by_estimate(space, chain, budget, budget.structures_to_remove(len(space))))
    return sum(counts) / max(len(counts), 1)


def _by_estimate(space: "SearchSpace", chain: Sequence[str], budget: Budget, least: int) -> int:
    """The same length by what is still reachable alone: layers that would be narrowed count in full."""
    bounds = _bounds(budget, space.reachable_cost(()))
    low, high = min(least, len(chain)), len(chain)
    while low < high:
        middle = (low + high) // 2
        cost = space.reachable_cost(chain[:middle])
        low, high = (low, middle) if within(vars(cost), bounds) else (middle + 1, high)
    return low


def check_feasible(space: "SearchSpace", budget: Budget) -> None:
    """Raise :class:`BudgetError`, naming the nearest, if no order that we know meets the budget."""
    least = budget.structures_to_remove(len(space))
    fits = _Within(space, budget)
    chains = _other_orders(space, [s.name for s in space.structures])
    if not any(len(chain) >= least and fits(chain) for chain in chains):
        raise BudgetError(_nearest(space, chains, budget, least))


class _Within:
    """Whether the sub-network without these structures is within the budget's parameters and MACs."""

    def __init__(self, space: "SearchSpace", budget: Budget):
        self.space = space
        bounded = budget.params is not None or budget.macs is not None
        self.bounds = _bounds(budget, space.cost()) if bounded else {}

    def __call__(self, removed: Sequence[str]) -> bool:
        return not self.bounds or within(vars(self.space.cost(removed)), self.bounds)


def _bounds(budget: Budget, full: Cost) -> dict[str, float]:
    """The bounds on parameters and MACs, as amounts."""
    bounds = budget.bounds({**vars(full), "structures": 0.0, "latency": 0.0, "weights": 0.0})
    return {name: bound for name, bound in bounds.items() if name in vars(full)}


def _other_orders(space: "SearchSpace", order: Sequence[str]) -> list[list[str]]:
    """Chains that may reach further: within the largest set that is known to go together, or large ones first."""
    most = space.most_removable()
    inside = set(most)
    sizes = {name: p.numel() for name, p in space.model.named_parameters()}
    large_first = sorted(order, key=lambda name: -sum(sizes[p] for p in space[name].parameters))
    return [
        space.removable_in_order([name for name in order if name in inside]),
        most,
        space.removable_in_order(large_first),
    ]


def _nearest(space: "SearchSpace", chains: Sequence[Sequence[str]], budget: Budget, least: int) -> str:
    full = space.cost()
    costs = [space.cost(chain) for chain in chains]
    most = max(len(chain) for chain in chains)
    params = min(cost.params for cost in costs) / full.params
    macs = min(cost.macs for cost in costs) / max(full.macs, 1)
    return (
        f"{budget} cannot be met: of {len(space)} structures {most} can go together (the budget asks for {least}). "
        f"The nearest is structures={1 - most / max(len(space), 1):.3f}, params={params:.3f} or macs={macs:.3f}."
    )
