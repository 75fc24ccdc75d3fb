"""Budgets: amounts without building, the solved selection against brute force, widths, rankings, measured latency."""

import itertools
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from random_channels import RandomChannels
from test_reconstruct import Small
from torch import Tensor, nn

import espalier
from espalier import Budget
from espalier.errors import BudgetError, SpaceError
from espalier.space import gauge, selection
from espalier.space import latency as latency_module
from espalier.space.cost import count_macs, macs_per_node
from espalier.space.knapsack import Knapsack
from espalier.space.latency import latency, timed
from espalier.space.selection import select
from espalier.space.widths import Widths

X = torch.randn(2, 3, 4, 4, dtype=torch.float64)


def chain(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def channels(model: nn.Module, x: Tensor, *levels: str) -> espalier.SearchSpace:
    return espalier.search_space(model, (x,), levels=levels or ("channel",))


# The budget itself.


def test_fractions_amounts_and_units() -> None:
    full = {"structures": 40.0, "params": 1000.0, "macs": 5e9, "latency": 0.02, "weights": 900.0}
    budget = Budget(structures=0.25, params="0.3k", macs="2.5G", latency="5ms", weights=90)
    assert budget.bounds(full) == pytest.approx(
        {"structures": 10, "params": 300, "macs": 2.5e9, "latency": 0.005, "weights": 90}
    )
    assert Budget(latency="800us").bounds(full) == pytest.approx({"latency": 8e-4})
    assert Budget(latency=0.5).bounds(full) == pytest.approx({"latency": 0.01})
    half = Budget(macs="2G", latency="5ms").tightened(0.5, full).bounds(full)
    assert half == pytest.approx({"macs": (5e9 * 2e9) ** 0.5, "latency": 0.01})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "empty budget"),
        ({"round_to": 8}, "empty budget"),
        ({"params": -0.1}, "between 0 and 1"),
        ({"params": float("nan")}, "between 0 and 1"),
        ({"macs": 1.5}, "between 0 and 1"),
        ({"latency": 5}, "unit, '5ms' say"),
        ({"latency": "5 parsecs"}, "one of the units s, ms, us"),
        ({"macs": "5ms"}, "one of the units k, M, G, T"),
        ({"params": 0.5, "round_to": 0}, "round_to=0"),
        ({"params": 0.5, "min_keep": -1}, "min_keep=-1"),
    ],
)
def test_what_is_no_budget(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**arguments)  # type: ignore[arg-type]


# Amounts without building.


@pytest.mark.parametrize("seed", range(60))
def test_amounts_equal_the_built_network(seed: int) -> None:
    """Parameters and MACs of a random removal, predicted and counted; they part only where constants come back."""
    space = channels(RandomChannels(seed), X, "channel", "head")
    if not len(space):
        return
    assert space.reachable_cost(()) == space.cost()
    rng, names = random.Random(seed), list(space.structures.names)
    removed = space.removable_in_order(rng.sample(names, len(names)), stop_at=len(names) // 2)
    small = espalier.construct(space, space.solution(removed))
    built = sum(p.numel() for p in small.parameters())
    assert space.cost(removed).params == built
    if not any("constant" in name for name, _ in small.named_buffers()):
        extra = [n for n, _ in small.named_parameters() if n not in dict(space.model.named_parameters())]
        if not extra:
            assert space.reachable_cost(removed) == space.cost(removed)


class Attention(nn.Module):
    """Every way to attend, over 10 tokens of width 12 in 3 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.multihead = nn.MultiheadAttention(12, 3, batch_first=True)
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.multihead(x, x, x, need_weights=False)[0]
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).flatten(2))


def test_macs_count_the_products_inside_attention() -> None:
    model, x = Attention().eval(), torch.randn(5, 10, 12)
    one = 10 * 12 * 36 + 2 * 10 * 10 * 12 + 10 * 12 * 12
    assert count_macs(model, (x,)) == 2 * one
    space = channels(model, x, "channel", "head")
    assert sum(macs_per_node(space.trace).values()) == 2 * one
    heads = [f for f in space.families if f.level == "head"]
    assert len(heads) == 2
    for family in heads:  # a head less: a third of everything but the width that is read and returned
        assert space.cost(family.names[:1]).macs == 2 * one - one // 3
        assert space.reachable_cost(family.names[:1]) == space.cost(family.names[:1])


# The solved selection.


def knapsack(space: espalier.SearchSpace, scores: Tensor, budget: Budget) -> Knapsack:
    values = scores.double().numpy()
    asked = selection._Asked(space, budget, values)
    return selection._knapsack(space, values, Widths(space.families, values, budget, 0.0), asked, asked.bounds)


def brute_force(space: espalier.SearchSpace, scores: Tensor, budget: Budget) -> float:
    """The largest sum of kept scores over all sets of structures, each one built and counted."""
    full, names, best = {"structures": len(space), **vars(space.cost())}, space.structures.names, -1.0
    for keep in itertools.product((False, True), repeat=len(space)):
        removed = [n for n, k in zip(names, keep, strict=True) if not k]
        if space.is_valid(removed):
            amounts = {"structures": sum(keep), **vars(space.reachable_cost(removed))}
            if budget.met_by(amounts, full):
                best = max(best, float(scores[torch.tensor(keep)].sum()))
    return best


@pytest.mark.parametrize("seed", range(12))
def test_against_brute_force_over_all_sets_of_channels(seed: int) -> None:
    torch.manual_seed(seed)
    space, scores = channels(chain(3, 4, 3, 4, 2), torch.rand(2, 3)), torch.rand(11)
    budget = [Budget(params=0.5), Budget(macs=0.4), Budget(structures=0.5), Budget(params=0.6, macs=0.5)][seed % 4]
    budget = replace(budget, min_keep=1)
    expected = brute_force(space, scores, budget)
    found = select(space, scores, budget)
    kept = scores.sum() - sum(scores[space.position(n)] for n in found.removed)
    assert float(kept) == pytest.approx(expected)


class Branches(nn.Module):
    """Three branches that may go, channels within them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4))
        self.b, self.c = nn.Linear(3, 4), nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x) + self.b(x) + self.c(x))


@pytest.mark.parametrize("seed", range(6))
def test_against_brute_force_over_segments_and_channels(seed: int) -> None:
    torch.manual_seed(seed)
    space = channels(Branches(), torch.rand(2, 3), "segment", "channel")
    scores, budget = torch.rand(len(space)), Budget(params=0.3 + 0.1 * seed, min_keep=1)
    found = select(space, scores, budget)
    kept = float(scores.sum() - sum(scores[space.position(n)] for n in found.removed))
    assert kept == pytest.approx(brute_force(space, scores, budget))
    assert knapsack(space, scores, budget).search() is not None


def test_the_search_is_close_to_the_enumeration() -> None:
    """On instances that both can do: never above the budget, at most 2 % below the optimum, mostly equal to it."""
    equal = 0
    for seed in range(40):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        space = channels(chain(3, *(rng.randint(3, 9) for _ in range(4)), 2), torch.rand(2, 3))
        scores = torch.rand(len(space)) ** rng.choice((1, 3))
        bound: dict[str, Any] = {rng.choice(("params", "macs")): rng.uniform(0.2, 0.9)}
        budget = Budget(**bound, min_keep=1)
        problem = knapsack(space, scores, budget)
        best, found = problem.enumerate(), problem.search()
        assert best is not None
        assert found is not None
        assert problem.fits(problem.used(found.kept, (), problem.coefficients(())))
        assert found.value >= 0.98 * best.value
        equal += found.value >= best.value - 1e-9
    assert equal >= 20


@pytest.mark.parametrize("bound", ["params", "macs"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_at_most_the_budget_and_one_structure_from_it(bound: str, share: float) -> None:
    torch.manual_seed(0)
    space = channels(chain(16, 60, 70, 80, 4), torch.rand(2, 16))
    asked: dict[str, Any] = {bound: share}
    found = select(space, torch.rand(len(space)), Budget(**asked))
    full, left = getattr(space.cost(), bound), found.amounts[bound]
    assert (share - 0.01) * full <= left <= share * full
    assert left == getattr(space.cost(found.removed), bound)


def test_several_bounds_hold_together() -> None:
    torch.manual_seed(0)
    space = espalier.search_space(Small().double().eval(), X, levels=("channel", "head"))
    found = select(space, torch.rand(len(space)), Budget(params=0.7, macs=0.6, structures=0.8))
    cost, full = space.cost(found.removed), space.cost()
    assert cost.params <= 0.7 * full.params
    assert cost.macs <= 0.6 * full.macs
    assert len(space) - len(found.removed) <= 0.8 * len(space)


def test_constants_that_come_back_are_paid_for() -> None:
    """Behind a sigmoid a removed channel is a half that the padded convolution needs: what is built decides."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.Sigmoid(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 2, 1)
    )
    space = channels(model.double().eval(), torch.randn(2, 3, 6, 6).double())
    found = select(space, torch.rand(len(space)), Budget(macs=0.5))
    assert space.reachable_cost(found.removed).macs < space.cost(found.removed).macs  # the prediction is too low
    assert 0.4 * space.cost().macs <= space.cost(found.removed).macs <= 0.5 * space.cost().macs


def test_a_budget_out_of_reach_names_the_nearest() -> None:
    space = channels(chain(3, 8, 8, 2), torch.rand(2, 3))
    with pytest.raises(BudgetError, match=r"params=0\.01.*cannot be met.*the least is params=0\.082"):
        select(space, torch.rand(16), Budget(params=0.01))
    with pytest.raises(BudgetError, match="the least is"):
        select(space, torch.rand(16), Budget(params=0.2, min_keep=0.5))


def test_bad_scores() -> None:
    space = channels(chain(3, 8, 2), torch.rand(2, 3))
    with pytest.raises(SpaceError, match=r"'0\[3\]' is nan"):
        select(space, torch.tensor([1.0, 1, 1, float("nan"), 1, 1, 1, 1]), Budget(params=0.5))
    with pytest.raises(SpaceError, match="3 scores for 8"):
        select(space, torch.rand(3), Budget(params=0.5))
    with pytest.raises(SpaceError, match="global, local, isomorphic"):
        select(space, torch.rand(8), Budget(params=0.5), "universal")
    with pytest.raises(BudgetError, match="single weights"):
        select(space, torch.rand(8), Budget(weights=0.5))


def test_latencies_are_not_for_an_order() -> None:
    space = channels(chain(3, 8, 2), torch.rand(2, 3))
    with pytest.raises(BudgetError, match="H2SPG takes latencies"):
        espalier.DHSPG(space, budget=Budget(latency=0.5), lr=0.1)
    with pytest.raises(BudgetError, match="not Budget"):
        space.sample(Budget(latency=0.5))
    with pytest.raises(BudgetError, match="holds no round_to"):
        space.sample(Budget(params=0.5, round_to=4))


# Widths.


def kept_of(space: espalier.SearchSpace, removed: list[str]) -> dict[str, int]:
    lost = space.lost(removed)
    return {f.name: f.count - int(n) for f, n in zip(space.families, lost, strict=True)}


def test_widths_are_multiples() -> None:
    torch.manual_seed(0)
    space = channels(chain(16, 60, 64, 50, 4), torch.rand(2, 16))
    for budget in (Budget(macs=0.5, round_to=8), Budget(params=0.2, round_to=16)):
        for ranking in ("global", "local", "isomorphic"):
            kept = kept_of(space, select(space, torch.rand(len(space)), budget, ranking).removed)
            assert all(
                n % budget.round_to == 0 or n == full for n, full in zip(kept.values(), (60, 64, 50), strict=True)
            )


def test_heads_count_by_their_width() -> None:
    space = channels(Attention().eval(), torch.randn(5, 10, 12), "head")
    widths = Widths(space.families, np.random.default_rng(0).random(6), Budget(params=0.5, round_to=4), 0.0)
    assert widths.multiple.tolist() == [1, 1]  # heads of width 4
    widths = Widths(space.families, np.random.default_rng(0).random(6), Budget(params=0.5, round_to=8), 0.0)
    assert widths.multiple.tolist() == [2, 2]
    assert [widths.permitted(k).tolist() for k in range(2)] == [[2, 3], [2, 3]]


def test_floors_and_ceilings() -> None:
    torch.manual_seed(0)
    space = channels(chain(16, 40, 40, 40, 4), torch.rand(2, 16))
    scores = torch.rand(120)
    scores[:40] *= 1e-3  # the first family would go almost wholly
    assert kept_of(space, select(space, scores, Budget(macs=0.3)).removed)["0"] == 4  # a tenth
    assert kept_of(space, select(space, scores, Budget(macs=0.3, min_keep=1)).removed)["0"] < 4
    assert kept_of(space, select(space, scores, Budget(macs=0.5, min_keep={"0": 0.5})).removed)["0"] >= 20
    capped = kept_of(space, select(space, scores, Budget(macs=0.9, max_keep={"4": 0.25, "2": 15})).removed)
    assert (capped["2"], capped["4"]) == (15, 10)
    tight = select(space, scores, Budget(params=0.02))  # not with a tenth of each: one of each is enough
    assert min(kept_of(space, tight.removed).values()) < 4


def test_rankings() -> None:
    torch.manual_seed(0)
    space = channels(chain(16, 40, 40, 20, 4), torch.rand(2, 16))
    scores = torch.rand(100)
    scores[:40] *= 0.1
    local = kept_of(space, select(space, scores, Budget(macs=0.4), "local").removed)
    shares = [((n - 1.5) / f.count, (n + 0.5) / f.count) for f, n in zip(space.families, local.values(), strict=True)]
    assert max(low for low, _ in shares) <= min(high for _, high in shares)  # one fraction, up to one step each
    for name in ("0", "2", "4"):  # the best of each family stay
        gone = {space.position(n) for n in select(space, scores, Budget(macs=0.4), "local").removed}
        family = range(*{"0": (0, 40), "2": (40, 80), "4": (80, 100)}[name])
        worst = min(scores[i] for i in family if i not in gone)
        assert all(scores[i] <= worst for i in family if i in gone)
    isomorphic = kept_of(space, select(space, scores, Budget(macs=0.4), "isomorphic").removed)
    assert isomorphic["0"] < isomorphic["2"]  # compared with one another, unlike the family of 20
    assert abs((isomorphic["0"] + isomorphic["2"]) / 80 - isomorphic["4"] / 20) <= 0.06


# Latency.


def test_latency_is_positive_and_restores_the_mode() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout())
    assert latency(model, torch.rand(2, 8), seconds=0.01) > 0
    assert model.training
    assert model[1].training


def test_the_table_adds_up_to_the_whole() -> None:
    space = channels(chain(64, 256, 256, 8), torch.rand(32, 64))
    amounts = timed(space, 0.5)
    column = amounts.kinds.index("latency")
    assert amounts(np.zeros(2))[column] == pytest.approx(0.5)
    halves = amounts(np.array([[128.0, 128.0], [255.0, 255.0]]))[:, column]
    assert 0.5 > halves[0] > halves[1] > 0.0


def test_the_measurement_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that counts a network's parameters: the table's prediction is wrong, what is built holds the bound."""
    measured: list[float] = []

    def clock(model: nn.Module, args: object, kwargs: object = None, seconds: float = 1.0) -> float:
        measured.append(1e-6 * sum(p.numel() for p in model.parameters()))
        return measured[-1]

    monkeypatch.setattr(gauge, "latency", clock)
    monkeypatch.setattr(gauge, "latencies", lambda models, *inputs: [clock(m, inputs) for m in models])
    monkeypatch.setattr(latency_module, "PER_OPERATOR", 1e-4)
    torch.manual_seed(0)
    space = channels(chain(32, 90, 90, 90, 4), torch.rand(2, 32))
    full = 1e-6 * sum(p.numel() for p in space.model.parameters())
    for budget in (Budget(latency=0.4), Budget(latency=f"{0.4e3 * full}ms")):
        found = select(space, torch.rand(len(space)), budget)
        small = espalier.construct(space, space.solution(found.removed))
        time = 1e-6 * sum(p.numel() for p in small.parameters())
        assert found.amounts["latency"] == pytest.approx(time)
        assert 0.35 * full <= time <= 0.4 * full
    with pytest.raises(BudgetError, match="the least is latency"):
        select(space, torch.rand(len(space)), Budget(latency="1us"))


def test_a_real_clock() -> None:
    """A bound so wide that no load of the machine breaks it."""
    model, x = chain(64, 512, 512, 8), torch.rand(64, 64)
    small = espalier.prune(model, x, budget=Budget(latency="100s", params=0.5))
    assert sum(p.numel() for p in small.parameters()) <= 0.5 * sum(p.numel() for p in model.parameters())
