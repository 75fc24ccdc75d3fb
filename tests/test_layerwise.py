"""Whole networks: pairs, sizes from budgets, sequential correction and narrowing."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from espalier.curvature.moments import collect
from espalier.select.allocate import allocate, mac_cost
from espalier.select.auxiliary import AuxiliaryOptions
from espalier.select.layerwise import (
    SELECTORS,
    Pair,
    check_pairs,
    narrow,
    prune_layers,
    prune_together,
    write_back,
)


class Block(nn.Module):
    """Conv-norm-relu-conv-norm with a skip."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        return functional.relu(x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())))


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(4, 6), Block(4, 8))
        self.point = nn.Conv2d(4, 6, 1)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm = nn.BatchNorm2d(6)
        self.flat = nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5 * 16, 3)

    def forward(self, x):
        x = self.norm(self.depth(self.point(self.blocks(x))).relu())
        return self.head(self.flat(x).relu().flatten(1))


class Attention(nn.Module):
    """Grouped queries: 4 query heads read 2 key/value heads; then a gated MLP and one fused qkv attention."""

    def __init__(self, width: int = 8, size: int = 3) -> None:
        super().__init__()
        self.heads, self.groups, self.size, self.fused_heads = 4, 2, size, 3
        self.q = nn.Linear(width, 4 * size)
        self.k, self.v = nn.Linear(width, 2 * size), nn.Linear(width, 2 * size)
        self.o = nn.Linear(4 * size, width)
        self.gate, self.up, self.down = nn.Linear(width, 10), nn.Linear(width, 10), nn.Linear(10, width)
        self.qkv, self.proj = nn.Linear(width, 9 * size), nn.Linear(3 * size, width)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.size).transpose(1, 2)
        k = self.k(x).view(b, n, self.groups, self.size).transpose(1, 2)
        v = self.v(x).view(b, n, self.groups, self.size).transpose(1, 2)
        repeat = self.heads // self.groups
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        x = x + self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(functional.silu(self.gate(x)) * self.up(x))
        q, k, v = self.qkv(x).view(b, n, 3, self.fused_heads, self.size).permute(2, 0, 3, 1, 4)
        return x + self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


CONVOLUTIONAL = [
    Pair(("blocks.0.conv1",), ("blocks.0.conv2",), ("blocks.0.bn1",), "blocks.0.bn2"),
    Pair(("blocks.1.conv1",), ("blocks.1.conv2",), ("blocks.1.bn1",), "blocks.1.bn2"),
    Pair(("point",), ("flat",), ("depth", "norm")),
    Pair(("flat",), ("head",)),
]
ATTENTION = [
    Pair(("q", "k", "v"), ("o",), units=2, attributes=("heads", "groups")),
    Pair(("gate", "up"), ("down",)),
    Pair(("qkv",), ("proj",), units=3, fused=3, attributes=("fused_heads",)),
]
CASES = {
    "convolutional": (Convolutional, CONVOLUTIONAL, (4, 4, 4), [3, 5, 4, 2]),
    "attention": (Attention, ATTENTION, (5, 8), [1, 6, 2]),
}


def case(name: str):
    torch.manual_seed(0)
    build, pairs, shape, sizes = CASES[name]
    model = build().double()
    data = list(torch.randn(300, *shape, dtype=torch.float64).split(100))
    model.train()
    for batch in data:  # moves the running statistics
        model(batch)
    return model.eval(), pairs, data, sizes


def masked(model, results):
    """The full network with the refitted columns in place and the removed ones at zero."""
    full = copy.deepcopy(model)
    for result in results:
        write_back(full, result)
    return full


@pytest.mark.parametrize("method", sorted(SELECTORS))
@pytest.mark.parametrize("name", sorted(CASES))
def test_narrowed_equals_masked(name, method):
    model, pairs, data, sizes = case(name)
    before = [value.clone() for value in model.state_dict().values()]
    results = prune_layers(model, pairs, data, sizes=sizes, method=method)
    small = narrow(model, results)
    torch.testing.assert_close(small(data[0]), masked(model, results)(data[0]))
    assert [len(result.selection.support) for result in results] == sizes
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    for value, old in zip(model.state_dict().values(), before, strict=True):
        assert torch.equal(value, old)


@pytest.mark.parametrize("name", sorted(CASES))
def test_everything_kept_is_the_dense_network(name):
    model, pairs, data, _ = case(name)
    results = prune_layers(model, pairs, data, sizes=[pair.count(model) for pair in pairs])
    torch.testing.assert_close(narrow(model, results)(data[0]), model(data[0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(CASES))
def test_sequential_correction_helps(name):
    model, pairs, data, sizes = case(name)

    def gap(sequential: bool) -> float:
        small = narrow(model, prune_layers(model, pairs, data, sizes=sizes, sequential=sequential))
        return sum(float((small(x) - model(x)).detach().square().sum()) for x in data)

    assert gap(True) < gap(False)


def test_a_conv_without_norm_or_bias_gains_a_bias():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False)).double()
    results = prune_layers(model, [Pair(("0",), ("2",))], [torch.randn(50, 3, 7, 7).double()], sizes=[5])
    small = narrow(model, results)
    assert small[2].bias is not None
    assert small[2].in_channels == small[0].out_channels == 5


def test_macs_budget_is_met_and_counted():
    model, pairs, data, _ = case("convolutional")
    groups = [(p.count(model), (*p.producers, *p.consumers, *p.via)) for p in pairs]
    cost = mac_cost(model, groups, data[0])
    full = cost([units for units, _ in groups])
    assert full == 16 * (2 * 9 * 24 + 2 * 9 * 32 + 24 + 54 + 30) + 240
    results = prune_layers(model, pairs, data, macs=0.6)
    sizes = [len(result.selection.support) for result in results]
    assert 0.45 * full < cost(sizes) <= 0.6 * full
    small = narrow(model, results)
    again = mac_cost(small, [], data[0])([])
    assert again == pytest.approx(cost(sizes))
    with pytest.raises(ValueError, match="least they can cost"):
        prune_layers(model, pairs, data, macs=0.01)


def test_all_layers_at_once():
    model, pairs, data, sizes = case("convolutional")
    options = AuxiliaryOptions(iterations=4, solver="exact")
    small = narrow(model, prune_together(model, pairs, data, sizes, options))
    plain = narrow(model, prune_layers(model, pairs, data, sizes=sizes, method="ispasp"))

    def gap(network) -> float:
        return sum(float((network(x) - model(x)).detach().square().sum()) for x in data)

    assert gap(small) < gap(plain)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        h = self.a(x).relu()
        return {"out": self.b(h) + 2 * self.c(h)}


def test_several_consumers_are_refused_unless_all_are_named():
    torch.manual_seed(0)
    model, data = Branching().double(), [torch.randn(60, 4).double()]
    with pytest.raises(ValueError, match="also read by a layer other than b"):
        prune_layers(model, [Pair(("a",), ("b",))], data, sizes=[4])
    results = prune_layers(model, [Pair(("a",), ("b", "c"))], data, sizes=[5])
    small = narrow(model, results)
    assert small.a.out_features == small.b.in_features == small.c.in_features == 5
    torch.testing.assert_close(small(data[0]), masked(model, results)(data[0]))


def test_in_place_activations():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), nn.ReLU(inplace=True), nn.Linear(12, 3), nn.ReLU(inplace=True)).double()
    data = [torch.randn(80, 4).double()]
    results = prune_layers(model, [Pair(("0",), ("2",))], data, sizes=[7])
    torch.testing.assert_close(narrow(model, results)(data[0]), masked(model, results)(data[0]))


def test_a_layer_whose_forward_is_never_called_is_refused():
    model = nn.MultiheadAttention(8, 2)
    batch = {name: torch.rand(3, 8) for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match="never calls out_proj"):
        check_pairs(model, [Pair(("out_proj",), ("out_proj",), units=2)], batch)


def test_wrong_pairs_are_refused():
    model, _, data, _ = case("attention")
    with pytest.raises(ValueError, match="does not read"):
        check_pairs(model, [Pair(("down",), ("o",), units=4)], data[0])
    with pytest.raises(ValueError, match="do not divide"):
        check_pairs(model, [Pair(("q",), ("down",))], data[0])
    with pytest.raises(TypeError, match="no weight"):
        check_pairs(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), [Pair(("0",), ("1",))], torch.rand(1, 2))
    with pytest.raises(ValueError, match="either sizes"):
        prune_layers(model, ATTENTION, data)
    with pytest.raises(ValueError, match="3 pairs but 1 sizes"):
        prune_layers(model, ATTENTION, data, sizes=[1])
    with pytest.raises(ValueError, match="unknown method 'best': choose from auxiliary"):
        prune_layers(model, ATTENTION, data, sizes=[1, 1, 1], method="best")
    with pytest.raises(ValueError, match="empty"):
        prune_layers(model, ATTENTION, [], sizes=[1, 1, 1])
    with pytest.raises(ValueError, match="cannot keep 3 of 2"):
        prune_layers(model, ATTENTION, data, sizes=[3, 1, 1])


def test_allocation_against_all_possibilities():
    g = torch.Generator().manual_seed(0)
    for trial in range(20):
        drops = [torch.rand(6, generator=g).sort(descending=True).values for _ in range(3)]
        curves = [torch.cat([drop.flip(0).cumsum(0).flip(0), torch.zeros(1)]) for drop in drops]  # convex
        prices = [1.0, 2.0, 3.0] if trial % 2 else [1.0, 1.0, 1.0]

        def cost(sizes, prices=prices):
            return sum(price * size for price, size in zip(prices, sizes, strict=True))

        def total(sizes, curves=curves):
            return sum(float(curve[size]) for curve, size in zip(curves, sizes, strict=True))

        budget = 0.6 * cost([6, 6, 6])
        found = allocate(curves, cost, budget)
        every = [(i, j, k) for i in range(1, 7) for j in range(1, 7) for k in range(1, 7)]
        best = min(total(sizes) for sizes in every if cost(sizes) <= budget)
        assert cost(found) <= budget
        if trial % 2:
            assert total(found) <= best + 1.0  # at most the last step off
        else:
            assert total(found) == pytest.approx(best)


def test_allocation_options():
    curve = torch.tensor([9.0, 8.9, 1.0, 0.9, 0.0])  # not convex
    sizes = allocate([curve, curve], lambda s: float(sum(s)), 5, minimum=2, multiple=2)
    assert all(size % 2 == 0 for size in sizes)
    assert sum(sizes) <= 5
    unknown = torch.tensor([torch.inf, torch.inf, 3.0, 1.0, 0.0])
    assert min(allocate([unknown, unknown], lambda s: float(sum(s)), 4)) == 2


def test_moments_for_all_layers_take_one_pass():
    model, pairs, data, _ = case("convolutional")
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    collect(model, [pair.consumers[0] for pair in pairs], data)
    assert len(passes) == len(data)
