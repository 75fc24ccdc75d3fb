"""Structured CHITA over a search space: filters, neurons, heads, segments or kernels, chosen under problem (5).

A structure is charged for what only reads it. Removing channel c of a family makes the columns of its readers read
zeros, so in the quadratic model their weights go to zero: to first order that is exactly what the loss sees, and no
product of weights in series is counted twice. The rows that write the channel vanish without a charge of their own.
Structures that no linear or convolution layer reads alone (segments, kernels) are charged for their own weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from espalier.batchnorm import recalibrate
from espalier.curvature.gradients import GradientOptions, gradients
from espalier.curvature.layout import WeightLayout, convolution_and_linear
from espalier.curvature.per_layer import Loss
from espalier.curvature.watch import watching
from espalier.errors import BudgetError, SpaceError
from espalier.select.dual import DualState
from espalier.select.multistage import draw, inputs_of
from espalier.select.problem import Problem
from espalier.select.structured import StructuredOptions, eliminate, exchange_alike, members_of
from espalier.space.budget import Budget
from espalier.space.chains import meet
from espalier.space.search_space import SearchSpace
from espalier.space.solution import Solution
from espalier.space.structure import Slices


@dataclass(frozen=True)
class FamilyOptions:
    """n, batch, ridge: gradients, samples in each, λ. recalibrate: samples for new batch norm statistics, 0 for none.
    search: sweeps and exchanges of the search. depth: how far the elimination goes, as a share of the cost of all
    structures that the budget would leave if costs added up. gradient.progress: show bars over the search too.
    """

    n: int = 300
    batch: int = 10
    ridge: float = 1e-3
    seed: int = 0
    recalibrate: int = 0
    depth: float = 0.5
    search: StructuredOptions = field(default_factory=StructuredOptions)
    gradient: GradientOptions = field(default_factory=GradientOptions)


def prune_structures(
    space: SearchSpace,
    data: Iterable[Any] | tuple[Tensor, Tensor],
    loss: Loss,
    budget: Budget,
    options: FamilyOptions | None = None,
) -> tuple[SearchSpace, Solution]:
    """Choose the structures that go by problem (5), and refit the weights that stay.

    >>> from torch import nn
    >>> from espalier import construct, search_space
    >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> data = torch.randn(200, 4), torch.randint(2, (200,))
    >>> space = search_space(model, data[0], levels=("channel",))
    >>> options = FamilyOptions(n=40, batch=5)
    >>> refitted, solution = prune_structures(space, data, nn.functional.cross_entropy, Budget(macs=0.5), options)
    >>> construct(refitted, solution)[0].out_features
    8

    Structures are eliminated by the exact rise of Q per unit of the budget's cost, all refitted after each sweep; then
    structures of one family, which cost the same, are exchanged as long as that lowers Q. The weights that stay are
    the exact refit of problem (5) without its first-order term. Returns the search space of a copy of the model with
    the new weights, and the solution for it: `construct` makes it smaller. `space.model` is not changed.

    Raises BudgetError, naming the nearest, where the budget cannot be met, SpaceError where no structure holds or
    feeds a convolution or linear weight, ValueError as `gradients` does.
    """
    options = options or FamilyOptions()
    if not set(budget.given) <= {"structures", "params", "macs"}:
        raise BudgetError(f"structured CHITA holds bounds on structures, params and macs, not {budget}.")
    if budget.shapes_widths:
        raise BudgetError(f"structured CHITA holds no round_to, min_keep or max_keep: {budget}.")
    model = copy.deepcopy(space.model)
    modes = {name: module.training for name, module in model.named_modules()}
    samples: Any = list(data) if hasattr(data, "__next__") else data
    sample = draw(samples, options.n * options.batch, torch.Generator().manual_seed(options.seed))
    model.eval()
    found = gradients(
        model, loss, sample, options.n, options.batch, convolution_and_linear, options.gradient
    ).gathered()
    plan = charged(space, found.layout)
    problem = Problem.of(found.A, None, found.w_bar, options.ridge)
    costs = plan.costs(space, budget)
    members = members_of(plan.group, len(plan.names))
    cost = f"{len(plan.names):,} structures of {problem.p:,} weights; each round reads A about twice"
    with watching(options.gradient.progress, lambda: cost) as watch:
        state = DualState.of(problem, torch.ones(problem.p, dtype=torch.bool))
        state.solve()
        full = {"structures": len(space), **vars(space.reachable_cost(()))}
        share = min(bound / full[kind] for kind, bound in budget.bounds(full).items())
        fixed = float(costs.sum()) * share * options.depth
        order = eliminate(state, members, costs, fixed, options.search, plan.family, watch)
        rest = [g for g in range(len(plan.names)) if g not in set(order)]
        removed = meet(space, [plan.names[g] for g in (*order, *rest)], budget)
        gone = set(removed)
        kept = torch.tensor([name not in gone for name in plan.names])
        if options.search.exchanges:
            start = plan.without(plan.group, kept)
            state = DualState.of(problem, start)
            state.solve()
            kept, _ = exchange_alike(state, members, kept, plan.family, options.search, watch)
            chosen = [name for name, stays in zip(plan.names, kept.tolist(), strict=True) if not stays]
            removed = chosen + [name for name in removed if name not in set(plan.names)]
            removed = removed if space.is_valid(removed) else list(gone)
    weights, value = plan.refit(problem, kept)
    found.layout.write(model, weights)
    if options.recalibrate:
        recalibrate(model, inputs_of(sample), options.recalibrate)
    for name, module in model.named_modules():
        module.training = modes[name]
    again = space.of(model)
    provenance = {"method": "structured-chita", "budget": budget.given, "objective": value}
    return again, again.solution(removed, provenance | {"n": options.n, "batch": options.batch, "ridge": options.ridge})


@dataclass(frozen=True)
class Plan:
    """Which structure each weight is charged to (`group`, int64 [p], −1 for none) and which other one takes it away
    without a charge (`rider`, int64 [p]); `names` of the structures and the family of each.
    """

    group: Tensor
    rider: Tensor
    names: tuple[str, ...]
    family: Tensor

    def costs(self, space: SearchSpace, budget: Budget) -> Tensor:
        """What removing one structure alone saves: of the family's first, as all of a family are alike."""
        full, out = space.reachable_cost(()), []
        for k in self.family.unique().tolist():
            name = self.names[int((self.family == k).nonzero()[0])]
            saved = full - space.reachable_cost([name])
            amounts = {"structures": 1.0, "params": saved.params, "macs": saved.macs}
            wanted = next(float(amounts[kind]) for kind in budget.given)
            out += [max(wanted, 1e-3)] * int((self.family == k).sum())
        return torch.tensor(out, dtype=torch.float64)

    @staticmethod
    def without(group: Tensor, kept: Tensor) -> Tensor:
        """The weights of no structure or of one that is kept, bool [p]."""
        return (group < 0) | kept[group.clamp_min(0)]

    def refit(self, problem: Problem, kept: Tensor) -> tuple[Tensor, float]:
        """The best weights without the structures that go; riders keep their value, which nothing sees."""
        stays, present = self.without(self.group, kept), self.without(self.rider, kept)
        aim = torch.where(stays & ~present, torch.zeros((), dtype=problem.w_bar.dtype), problem.w_bar)
        state = DualState.of(replace(problem, w_bar=aim), stays & present)
        state.solve()
        weights = torch.where(stays & present, state.weights(), problem.w_bar)
        return torch.where(stays, weights, torch.zeros((), dtype=weights.dtype)), state.objective


def charged(space: SearchSpace, layout: WeightLayout) -> Plan:
    """Assign every weight of the layout to structures of the space.

    >>> from torch import nn
    >>> from espalier import search_space
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> plan = charged(search_space(model, torch.rand(2, 2), levels=("channel",)), WeightLayout.of(model))
    >>> plan.group.tolist(), plan.rider.tolist(), plan.names
    ([-1, -1, -1, -1, -1, -1, 0, 1, 2], [0, 0, 1, 1, 2, 2, -1, -1, -1], ('0[0]', '0[1]', '0[2]'))
    """
    group, rider = (torch.full((layout.numel,), -1) for _ in range(2))
    places, start = {}, 0
    for name, shape, size in zip(layout.names, layout.shapes, layout.sizes, strict=True):
        places[name] = (slice(start, start + size), shape)
        start += size
    names: list[str] = []
    families: list[int] = []
    for k, family in enumerate(space.families):
        read = [s for s in family.readers if s.parameter in places]
        charge, ride = (read, family.slices) if read else (family.slices, ())
        trial, first = group.clone(), len(names)
        for piece in charge:
            _assign(trial, places, piece, first)
        owned = torch.bincount(trial[trial >= first] - first, minlength=family.count)
        if len(owned) < family.count or bool((owned == 0).any()):
            continue  # no weight to charge it with, or all of them are charged to another structure
        group = trial
        for piece in ride:
            _assign(rider, places, piece, first)
        names += family.names
        families += [k] * family.count
    if not names:
        raise SpaceError(
            "no structure of this space holds or feeds a convolution or linear weight: make it with "
            "levels=('channel', 'head', 'segment')."
        )
    return Plan(group, rider, tuple(names), torch.tensor(families))


def _assign(target: Tensor, places: dict[str, tuple[slice, tuple[int, ...]]], piece: Slices, first: int) -> None:
    """Write the structures' numbers where a slice lies, unless another structure has the weight already."""
    if piece.parameter not in places:
        return
    where, shape = places[piece.parameter]
    owner = torch.zeros((), dtype=torch.int64) if piece.owner is None else piece.owner.long()
    dim = piece.dim or 0
    view = owner.view([1] * dim + list(owner.shape) + [1] * (len(shape) - dim - owner.ndim)).expand(shape).reshape(-1)
    own = target[where]
    target[where] = torch.where((own < 0) & (view >= 0), view + first, own)
