"""Structured CHITA over search spaces: what is charged, budgets, refit, against all subsets."""

import itertools

import pytest
import torch
from torch import nn

from espalier import construct, search_space
from espalier.curvature.gradients import gradients
from espalier.curvature.layout import WeightLayout
from espalier.errors import BudgetError
from espalier.select.dual import DualState
from espalier.select.families import FamilyOptions, charged, prune_structures
from espalier.select.problem import Problem
from espalier.select.structured import StructuredOptions, eliminate, exchange_alike, members_of
from espalier.space.budget import Budget
from espalier.space.cost import count_macs

CE = nn.functional.cross_entropy


class Block(nn.Module):
    """A residual stream, a batch norm, two branches."""

    def __init__(self, width=6):
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1, bias=False)
        self.a, self.na = nn.Conv2d(width, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, width, 1)
        self.side = nn.Conv2d(width, width, 1)
        self.fc = nn.Linear(width, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.b(torch.relu(self.na(self.a(x)))) + self.side(x)
        return self.fc(torch.relu(x).mean((2, 3)))


@pytest.fixture
def task():
    torch.manual_seed(0)
    model = Block().double()
    x, y = torch.randn(300, 2, 5, 5).double(), torch.randint(3, (300,))
    model(x)
    return model.eval(), (x, y)


def test_charge_is_the_first_order_effect_of_removal(task):
    """Σ w·∂l/∂w over the charged weights of a channel is the derivative along its removal, per sample."""
    model, (x, y) = task
    space = search_space(model, x[:3], levels=("channel",))
    found = gradients(model, CE, (x[:20], y[:20]), 20)
    plan = charged(space, found.layout)
    for name in ("a[3]", "stem[2]"):
        g = plan.names.index(name)
        mine = plan.group == g
        by_weights = found.A[:, mine].double() @ found.w_bar[mine].double()
        gate = torch.ones((), dtype=torch.float64, requires_grad=True)
        at = int(name[-2])

        def scaled(value, at=at, gate=gate):
            keep = torch.ones(value.shape[1], dtype=torch.float64)
            keep[at] = 0
            return value * (keep + (1 - keep) * gate)[:, None, None]

        for i in range(20):
            v = x[i : i + 1]
            stream, inner = (scaled, torch.clone) if name == "stem[2]" else (torch.clone, scaled)
            s = torch.relu(model.stem(v))  # the gate lies where the channel is read
            out = s + model.b(inner(torch.relu(model.na(model.a(stream(s)))))) + model.side(stream(s))
            out = stream(torch.relu(out))
            loss = CE(model.fc(out.mean((2, 3))), y[i : i + 1])
            (slope,) = torch.autograd.grad(loss, gate)
            torch.testing.assert_close(by_weights[i], slope, rtol=1e-4, atol=1e-6)  # A is float32


BUDGETS = [Budget(macs=0.6), Budget(params=0.7), Budget(structures=0.6)]
CASES = [(levels, budget) for levels in (("channel",), ("segment",), ("channel", "segment")) for budget in BUDGETS]


# Kernels are masked: the network without them costs what it did, so only their number can be bounded.
@pytest.mark.parametrize(("levels", "budget"), [*CASES, (("kernel",), Budget(structures=0.6))])
def test_solutions_meet_the_budget_and_build(task, levels, budget):
    model, data = task
    space = search_space(model, data[0][:3], levels=levels)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    options = FamilyOptions(n=60, batch=5)
    refitted, solution = prune_structures(space, data, CE, budget, options)
    small = construct(refitted, solution)
    full, cost = space.cost(), refitted.cost(solution.removed)
    left = len(space) - len(solution.removed)
    assert budget.met_by({"structures": left, **vars(cost)}, {"structures": len(space), **vars(full)})
    if budget.structures:
        assert len(solution.removed) >= len(space) - int(0.6 * len(space))
    torch.testing.assert_close(small(data[0][:5]), refitted.masked(solution)(data[0][:5]))
    if budget.macs:
        assert count_macs(small, (data[0][:3],)) == cost.macs
    assert all(before[n].equal(p) for n, p in model.state_dict().items())
    assert not small.training


def test_refit_is_the_minimiser_without_what_goes(task):
    model, data = task
    space = search_space(model, data[0][:3], levels=("channel",))
    found = gradients(model, CE, (data[0][:120], data[1][:120]), 40, 3)
    plan = charged(space, found.layout)
    A, w_bar = found.A.double(), found.w_bar.double()
    problem = Problem.of(A, None, w_bar, 1e-3)
    kept = torch.ones(len(plan.names), dtype=torch.bool)
    kept[[plan.names.index("a[1]"), plan.names.index("a[4]"), plan.names.index("stem[0]")]] = False
    weights, value = plan.refit(problem, kept)
    gone, riding = ~plan.without(plan.group, kept), ~plan.without(plan.rider, kept)
    free = ~gone & ~riding
    t = A[:, gone] @ w_bar[gone]
    rho = 40 * 1e-3
    delta = torch.linalg.solve(A[:, free].T @ A[:, free] + rho * torch.eye(int(free.sum())).double(), A[:, free].T @ t)
    torch.testing.assert_close(weights[free], (w_bar[free] + delta), rtol=1e-6, atol=1e-9)
    assert not weights[gone].any()
    assert weights[riding & ~gone].equal(w_bar[riding & ~gone])
    expected = 0.5 * ((t - A[:, free] @ delta) ** 2).sum() + rho / 2 * (delta @ delta + w_bar[gone] @ w_bar[gone])
    torch.testing.assert_close(torch.tensor(value).double(), expected)


def test_exchanges_end_at_the_best_of_all_subsets_of_a_family():
    """On a small family, elimination and exchanges find the best of all subsets in most draws, and never increase Q."""
    hits = 0
    for seed in range(12):
        torch.manual_seed(seed)
        group = torch.arange(7).repeat_interleave(3)
        problem = Problem.of(torch.randn(12, 21).double(), None, torch.randn(21).double(), 0.05)
        family, members = torch.zeros(7, dtype=torch.int64), members_of(group, 7)
        state = DualState.of(problem, torch.ones(21, dtype=torch.bool))
        state.solve()
        order = eliminate(state, members, torch.ones(7).double(), 3.0, StructuredOptions(), family)
        kept = torch.ones(7, dtype=torch.bool)
        kept[order] = False
        assert int(kept.sum()) == 3
        kept, history = exchange_alike(state, members, kept, family, StructuredOptions())
        assert int(kept.sum()) == 3
        assert all(b < a for a, b in itertools.pairwise(history))
        values = {}
        for some in itertools.combinations(range(7), 3):
            trial = DualState.of(problem, torch.isin(group, torch.tensor(some)))
            trial.solve()
            values[some] = trial.objective
        found = values[tuple(kept.nonzero().flatten().tolist())]
        assert history[-1] == pytest.approx(found, rel=1e-9)
        hits += found <= min(values.values()) * (1 + 1e-9)
    assert hits >= 9


def test_one_of_each_family_is_left():
    torch.manual_seed(0)
    group = torch.arange(6).repeat_interleave(2)
    problem = Problem.of(torch.randn(5, 12).double(), None, torch.randn(12).double(), 0.1)
    family = torch.tensor([0, 0, 0, 1, 2, 2])
    state = DualState.of(problem, torch.ones(12, dtype=torch.bool))
    state.solve()
    order = eliminate(state, members_of(group, 6), torch.ones(6).double(), 0.0, StructuredOptions(), family)
    assert len(order) == 3
    assert {int(f) for f in family[[g for g in range(6) if g not in order]]} == {0, 1, 2}


def test_budget_that_cannot_be_met(task):
    model, data = task
    space = search_space(model, data[0][:3], levels=("channel",))
    with pytest.raises(BudgetError, match="nearest"):
        prune_structures(space, data, CE, Budget(macs=0.0001), FamilyOptions(n=20, batch=2))


def test_every_weight_has_one_owner_at_most(task):
    model, data = task
    space = search_space(model, data[0][:3], levels=("channel", "segment"))
    layout = WeightLayout.of(model)
    plan = charged(space, layout)
    sizes = torch.bincount(plan.group[plan.group >= 0], minlength=len(plan.names))
    assert bool((sizes > 0).all())
    by_name = dict(zip(layout.names, plan.group.split(layout.sizes), strict=True))
    assert by_name["b.weight"].view(6, 8).unique(dim=0).shape == (1, 8)  # columns of the inner family
