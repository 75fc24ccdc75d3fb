"""Structured CHITA: whole groups of weights chosen under problem (5).

A group is any set of weights that goes as one: a filter, a neuron, a head, a segment, or a block of a matrix.
With z and K of `dual` and H_g = A_gᵀK⁻¹A_g, taking a whole group out and refitting everything raises Q by
exactly (ρ/2) z_gᵀ(I − H_g)⁻¹z_g, and bringing one in lowers it by (ρ/2) z_gᵀ(I + H_g)⁻¹z_g.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from espalier.curvature.layout import WeightLayout
from espalier.curvature.matrix import columns
from espalier.curvature.watch import Watch, unwatched, watching
from espalier.select.dual import DualState
from espalier.select.problem import Problem
from espalier.select.result import Result, finish


@dataclass(frozen=True)
class StructuredOptions:
    """sweeps: rounds in which groups are eliminated, their exact costs renewed in between. exchanges: at
    most so many rounds of swapping groups afterwards. memory: bytes for the columns looked at together.
    """

    sweeps: int = 16
    exchanges: int = 30
    memory: int = 256 << 20


@dataclass(frozen=True)
class StructuredResult:
    """`kept`: bool per group; `result`: weights and support as for single weights; `cost`: what is spent."""

    kept: Tensor
    result: Result
    cost: float


def structured_chita(
    problem: Problem,
    group: Tensor,
    budget: float,
    costs: Tensor | None = None,
    options: StructuredOptions | None = None,
    progress: bool | None = None,
) -> StructuredResult:
    """Choose groups whose costs sum to at most `budget`, and refit the weights in them.

    >>> problem = Problem.of(torch.tensor([[1.0, 1.0, 3.0]]), None, torch.ones(3), ridge=0.1)
    >>> structured_chita(problem, torch.tensor([0, 0, 1]), budget=1).kept
    tensor([False,  True])

    Blocks of 4 × 1 of every matrix of a model, half of the weights:

    >>> from torch import nn
    >>> from espalier.curvature.gradients import gradients
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    >>> data = torch.randn(200, 8), torch.randint(4, (200,))
    >>> found = gradients(model, nn.functional.cross_entropy, data, n=40, batch=5)
    >>> group = block_groups(found.layout, (4, 1))
    >>> problem = Problem.of(found.A, None, found.w_bar, ridge=1e-3)
    >>> blocks = structured_chita(problem, group, budget=96, costs=torch.bincount(group))
    >>> found.layout.write(model, blocks.result.weights)  # the other blocks are zeros now
    >>> sum(int((p != 0).sum()) for name, p in model.named_parameters() if "weight" in name)
    96

    group: int64 [p], the structure of each weight, counted from 0; −1 for weights that always stay (they are
    refitted too). costs: [groups], for example MACs; by default 1 each, so that `budget` counts groups.
    Groups are eliminated by exact cost per unit of budget, renewed `sweeps` times; then groups are exchanged
    as long as that lowers Q within the budget. progress: show a bar on standard error; None: where that is a terminal.

    Raises ValueError for a budget that is NaN or that not even one group fits, for groups with gaps in their numbers or
    another length than A has columns, and for costs that are not positive.
    """
    options = options or StructuredOptions()
    if group.shape != (problem.p,):
        raise ValueError(f"group has shape {tuple(group.shape)}, but A has {problem.p} columns")
    count = int(group.max()) + 1
    if count < 1:
        raise ValueError("no weight belongs to a group: nothing can be pruned")
    costs = torch.ones(count) if costs is None else costs
    costs = costs.double()
    if costs.shape != (count,) or not bool(((costs > 0) & (costs < torch.inf)).all()):
        raise ValueError(f"costs must hold {count} positive numbers, one per group")
    if math.isnan(budget):
        raise ValueError("budget = nan: give what the kept groups may cost together")
    if budget < float(costs.min()):
        raise ValueError(f"budget = {budget}: not even the cheapest group fits; it needs {float(costs.min()):g}")
    members = members_of(group, count)
    cost = f"{count:,} groups of {problem.p:,} weights; each round reads A about twice"
    with watching(progress, lambda: cost) as watch:
        state, kept = _eliminated(problem, members, costs, budget, options, watch)
        history = [state.objective]
        for _ in watch(range(options.exchanges), "rounds of exchanges"):
            moved = _exchange(state, members, kept, costs, budget, options)
            if moved is None:
                break
            state, kept = moved
            history.append(state.objective)
    result = finish(problem, state.weights(), state.support, history, groups=int(kept.sum()))
    return StructuredResult(kept, result, float(costs[kept].sum()))


def _eliminated(
    problem: Problem, members: Tensor, costs: Tensor, budget: float, options: StructuredOptions, watch: Watch
) -> tuple[DualState, Tensor]:
    """What elimination leaves within the budget: its state, solved, and the groups, bool."""
    state = DualState.of(problem, torch.ones(problem.p, dtype=torch.bool))
    state.solve()
    order = eliminate(state, members, costs, budget, options, watch=watch)
    kept = torch.ones(len(members), dtype=torch.bool)
    kept[order] = False
    if float(costs[kept].sum()) > budget * (1 + 1e-9):  # only one, too costly, group is left
        best = int(torch.where(costs <= budget, costs, 0).argmax())
        _move(state, members, torch.tensor([best]), kept.nonzero().flatten())
        kept[:] = False
        kept[best] = True
        state.solve()
    return state, kept


def eliminate(
    state: DualState,
    members: Tensor,
    costs: Tensor,
    budget: float,
    options: StructuredOptions,
    family: Tensor | None = None,
    watch: Watch = unwatched,
) -> list[int]:
    """Take groups out until the costs of the others sum to at most `budget`; their order. Moves `state` along.

    The groups of lowest exact cost per unit of budget go first, renewed in each sweep. At least one group is left, and
    with `family` (int64 [groups]) one of each family.
    """
    count = len(members)
    family = torch.zeros(count, dtype=torch.int64) if family is None else family
    kept, out = torch.ones(count, dtype=torch.bool), list[int]()
    excess = float(costs.sum()) - budget
    for sweep in watch(range(options.sweeps), "sweeps of elimination"):
        over = float(costs[kept].sum()) - budget
        if over <= 1e-9 * budget:
            break
        share = over if sweep == options.sweeps - 1 else max(excess / options.sweeps, over / options.sweeps)
        price = _changes(state, members, kept, options, kept) / costs
        order = torch.where(kept, price, torch.inf).argsort()[: int(kept.sum())]
        order = order[~_last_of_each(order, family)]
        if not len(order):
            break
        spent = costs[order].cumsum(0)
        drop = order[: int((spent < share - 1e-9 * budget).sum()) + 1]
        _move(state, members, drop[:0], drop)
        kept[drop] = False
        out += drop.tolist()
        state.solve()
    return out


def _last_of_each(order: Tensor, family: Tensor) -> Tensor:
    """Which entry of an order is the last one of its family, bool."""
    last = torch.zeros(int(family.max()) + 1, dtype=torch.int64).scatter_reduce(
        0, family[order], torch.arange(len(order)), "amax", include_self=False
    )
    return last[family[order]] == torch.arange(len(order))


def exchange_alike(
    state: DualState,
    members: Tensor,
    kept: Tensor,
    family: Tensor,
    options: StructuredOptions,
    watch: Watch = unwatched,
) -> tuple[Tensor, list[float]]:
    """Swap groups within their family as long as that lowers Q, at most `exchanges` times; what is kept, and Q."""
    kept, history, exhausted = kept.clone(), [state.objective], set[int]()
    open_ = [k for k in family.unique().tolist() if 0 < int(kept[family == k].sum()) < int((family == k).sum())]
    for _ in watch(range(options.exchanges), "exchanges"):
        if not (left := [k for k in open_ if k not in exhausted]):
            break
        change = _changes(state, members, kept, options, torch.isin(family, torch.tensor(left)))
        best: tuple[float, int, int] | None = None
        for k in left:
            mine = family == k
            add = int(torch.where(mine & ~kept, change, -torch.inf).argmax())
            drop = int(torch.where(mine & kept, change, torch.inf).argmin())
            net = float(change[add] - change[drop])
            if best is None or net > best[0]:
                best = (net, add, drop)
        assert best is not None
        _, add, drop = best
        trial = state.copy()
        _move(trial, members, torch.tensor([add]), torch.tensor([drop]))
        trial.solve()
        if trial.objective >= state.objective * (1 - 1e-9):
            exhausted.add(int(family[add]))
            continue
        state, kept[add], kept[drop] = trial, True, False
        history.append(state.objective)
    return kept, history


def block_groups(layout: WeightLayout, shape: tuple[int, int]) -> Tensor:
    """The group of each weight where every matrix [outputs, inputs · kernel] is cut into blocks of `shape`, int64 [p].

    >>> block_groups(WeightLayout(("w",), ((2, 4),)), (2, 2)).tolist()
    [0, 0, 1, 1, 0, 0, 1, 1]

    Blocks at the right and lower edge are smaller where the shape does not divide the matrix. Groups for
    `structured_chita`, whose example prunes blocks of a model: with costs of `torch.bincount(groups)`, its budget is a
    number of weights.
    """
    if min(shape) < 1:
        raise ValueError(f"blocks of {shape[0]} × {shape[1]}: both sides must be at least 1")
    groups, first = [], 0
    for size in layout.shapes:
        rows, columns = size[0], math.prod(size[1:])
        across = -(-columns // shape[1])
        block = torch.arange(rows)[:, None] // shape[0] * across + torch.arange(columns) // shape[1]
        groups.append(first + block.reshape(-1))
        first += -(-rows // shape[0]) * across
    return torch.cat(groups)


def members_of(group: Tensor, count: int) -> Tensor:
    """Indices of each group's weights, [groups, largest size], padded with −1."""
    sizes = torch.bincount(group[group >= 0], minlength=count)
    if bool((sizes == 0).any()):
        raise ValueError(f"group {int((sizes == 0).nonzero()[0])} has no weights: number the groups without gaps")
    order = group.argsort(stable=True)[int((group < 0).sum()) :]
    place = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[group[order]]
    out = torch.full((count, int(sizes.max())), -1)
    out[group[order], place] = order
    return out


def _weights(members: Tensor, groups: Tensor) -> Tensor:
    index = members[groups].flatten()
    return index[index >= 0]


def _changes(
    state: DualState, members: Tensor, kept: Tensor, options: StructuredOptions, wanted: Tensor | None = None
) -> Tensor:
    """Per group, the exact change of Q of taking it out (kept) or bringing it in (not kept); positive.

    Only of the groups in the boolean `wanted`, where given; the others' entries are infinite.
    """
    z, n = state.potential().double(), state.problem.n
    groups = torch.arange(len(members)) if wanted is None else wanted.nonzero().flatten()
    sizes = (members >= 0).sum(1)
    groups = groups[sizes[groups].argsort()]  # groups of like size together: little padding
    out = torch.full((len(members),), torch.inf, dtype=torch.float64)
    while len(groups):
        ends = sizes[groups] * torch.arange(1, len(groups) + 1) * (8 * 3 * n)
        take = groups[: max(1, int((ends <= options.memory).sum()))]
        groups = groups[len(take) :]
        out[take] = _chunk_changes(state, members[take, : int(sizes[take].max())], kept[take], z)
    return out


def _chunk_changes(state: DualState, some: Tensor, inside: Tensor, z: Tensor) -> Tensor:
    n, live, index = state.problem.n, some >= 0, some.clamp_min(0)
    a = columns(state.problem.A, index.flatten()).double()
    half = torch.linalg.solve_triangular(state.factor, a, upper=False)
    half = half.view(n, *some.shape).permute(1, 0, 2) * live[:, None]  # [groups, n, size]
    u = (z[index] * live)[..., None]
    sign = torch.where(inside, -1.0, 1.0).double()[:, None, None]
    if some.shape[1] <= n:
        M = torch.eye(some.shape[1]).double() + sign * (half.transpose(1, 2) @ half)
        value = (u * torch.linalg.solve(M, u)).sum((1, 2))
    else:  # (I ∓ HᵀH)⁻¹ = I ± Hᵀ(I ∓ HHᵀ)⁻¹H, of size n instead
        v = half @ u
        M = torch.eye(n).double() + sign * (half @ half.transpose(1, 2))
        value = u.square().sum((1, 2)) - (sign * v * torch.linalg.solve(M, v)).sum((1, 2))
    return 0.5 * state.problem.rho * value


def _move(state: DualState, members: Tensor, add: Tensor, drop: Tensor) -> None:
    state.add_drop(_weights(members, add), _weights(members, drop))


def _exchange(
    state: DualState, members: Tensor, kept: Tensor, costs: Tensor, budget: float, options: StructuredOptions
) -> tuple[DualState, Tensor] | None:
    """The first exchange, of the most promising groups and ever fewer of them, that lowers Q; or None."""
    change = _changes(state, members, kept, options)
    gains = torch.where(kept, -torch.inf, change / costs).argsort(descending=True)[: int((~kept).sum())]
    losses = torch.where(kept, change / costs, torch.inf).argsort()[: int(kept.sum())]
    size = max(1, min(len(gains), len(losses)) // 10)
    trials = [(gains[:q], q) for q in _halvings(size)]
    trials += [(gains[i : i + 1], 1) for i in range(1, min(8, len(gains)))]
    for add, _ in trials:
        if not len(add):
            return None
        room = budget * (1 + 1e-9) - float(costs[kept].sum()) - float(costs[add].sum())
        freed = costs[losses].cumsum(0)
        needed = int((freed < -room).sum()) + 1 if room < 0 else 0
        if needed > len(losses):
            continue
        trial = state.copy()
        _move(trial, members, add, losses[:needed])
        trial.solve()
        if trial.objective < state.objective * (1 - 1e-9):
            after = kept.clone()
            after[add], after[losses[:needed]] = True, False
            return trial, after
    return None


def _halvings(size: int) -> list[int]:
    out = []
    while size:
        out.append(size)
        size //= 2
    return out
