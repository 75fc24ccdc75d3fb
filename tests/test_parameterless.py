"""Skips, pools and identities as structures of one scalar: the same function, exact removal, exact folding."""

import copy
import os
import random
from collections.abc import Iterable

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from networks import Residual, SqueezeExcite, Wide
from random_networks import CHANNELS, SIZE, Program, network, programs
from torch import Tensor, nn

import espalier
from espalier.errors import InvalidSolution, SpaceError
from espalier.models import DARTS
from espalier.space.search_space import SearchSpace

NETWORKS = int(os.environ.get("ESPALIER_NETWORKS", "24"))


def outputs(module: nn.Module, inputs: Iterable[Tensor], training: bool) -> list[Tensor]:
    with torch.no_grad():
        found = copy.deepcopy(module).train(training)(*[x.clone() for x in inputs])
    return list(found) if isinstance(found, tuple) else [found]


def difference(a: nn.Module, b: nn.Module, *inputs: Tensor) -> float:
    """The largest difference in either mode, relative to the output's size."""
    worst = 0.0
    for training in (False, True):
        for x, y in zip(outputs(a, inputs, training), outputs(b, inputs, training), strict=True):
            assert x.shape == y.shape
            worst = max(worst, float((x - y).abs().max() / x.abs().max().clamp_min(1.0)))
    return worst


def draw_scalars(space: SearchSpace, seed: int, share: float = 1.0) -> None:
    """Numbers of either sign, as training might leave them."""
    rng = random.Random(seed)
    with torch.no_grad():
        for name in space.trace.scalars:
            if rng.random() < share:
                space.model.get_parameter(name).fill_(rng.choice([-1.0, 1.0]) * rng.uniform(0.3, 2.0))


def check(program: Program) -> None:
    net, inputs = network(program)
    default = espalier.search_space(net, inputs)
    before = copy.deepcopy(net.state_dict())
    space = espalier.search_space(net, inputs, parameterless=True)
    larger = tuple(torch.randn(3, CHANNELS, SIZE, SIZE, dtype=torch.float64) for _ in inputs)
    for training in (False, True):  # bit for bit, with scalars of 1
        for x, y in zip(outputs(net, larger, training), outputs(space.model, larger, training), strict=True):
            torch.testing.assert_close(x, y, rtol=0.0, atol=0.0)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    kept = {s.name: s.parameters for s in space.structures}
    assert {s.name: s.parameters for s in default.structures}.items() <= kept.items()
    assert set(space.trace.scalars) == {n for s in space.structures for n in s.parameters if "scalars." in n}
    plain = espalier.construct(space, space.solution([]))
    assert not [n for n, _ in plain.named_parameters() if "scalars." in n]
    assert difference(net, plain, *larger) == 0.0
    rng = random.Random(program.seed)
    draw_scalars(space, program.seed, share=rng.choice([0.5, 1.0]))
    names = [s.name for s in space.structures]
    for _ in range(4 if names else 1):
        order = rng.sample(names, len(names))
        solution = space.solution(space.removable_in_order(order, stop_at=rng.randint(0, len(names))))
        small = espalier.construct(space, solution)
        assert difference(space.masked(solution), small, *larger) < 1e-10
        assert sum(p.numel() for p in small.parameters()) <= space.cost(solution.removed).params
        any_set = order[: rng.randint(1, len(order))] if names else []
        if space.is_valid(any_set):
            chosen = space.solution(any_set)
            assert difference(space.masked(chosen), espalier.construct(space, chosen), *larger) < 1e-10
        else:
            with pytest.raises(InvalidSolution):
                space.solution(any_set)


@pytest.mark.parametrize("part", range(4))
def test_random_networks(part: int) -> None:
    @seed(100 + part)
    @settings(
        max_examples=max(1, NETWORKS // 4),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
    )
    @given(programs())
    def run(program: Program) -> None:
        check(program)

    run()


def test_darts_cells() -> None:
    torch.manual_seed(0)
    net = DARTS(channels=4, cells=3, nodes=2).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    space = espalier.search_space(net, (x,), parameterless=True)
    assert difference(net, space.model, x) == 0.0
    scaled = [s.name for s in space.structures if "scalars." in s.parameters[0]]
    assert len([n for n in scaled if "max_pool" in n]) == len([n for n in scaled if "avg_pool" in n]) == 3 * 5
    identities = [n for n in scaled if "->" in n]
    # Per cell five edges, of which the reduction cells 1 and 2 read their inputs with stride 2 (FactorizedReduce);
    # and the sum that both the second node and the cell's concatenation read.
    assert len([n for n in identities if "->cat" not in n]) == 3 * 5 - 2 * 4
    assert len([n for n in scaled if "skip.bn" in n]) == 2 * 4
    assert len(scaled) == 15 + 15 + len(identities) + 8
    draw_scalars(space, 0)
    rng = random.Random(0)
    for _ in range(6):
        order = rng.sample([s.name for s in space.structures], len(space))
        solution = space.solution(space.removable_in_order(order, stop_at=rng.randint(1, len(order))))
        assert difference(space.masked(solution), espalier.construct(space, solution), x) < 1e-12
    pool = next(n for n in scaled if "max_pool" in n)
    gone = space.cost() - space.cost([pool])
    assert (gone.params, gone.macs) == (1, 0)


def test_a_residual_skip_is_removed_and_its_neighbour_folded() -> None:
    torch.manual_seed(0)
    net = Residual().double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    space = espalier.search_space(net, (x,), parameterless=True)
    skips = ["stem->add", "blocks.0.relu->add_1", "blocks.1.relu->add_2"]
    assert [s.name for s in space.structures if s.name in skips] == skips
    with torch.no_grad():
        for name in space.trace.scalars:
            space.model.get_parameter(name).fill_(0.7)
    solution = space.solution(["stem->add", "blocks.1.conv-bn", "blocks.2.conv-bn"])
    small = espalier.construct(space, solution)
    assert difference(space.masked(solution), small, x) < 1e-12
    # relu(0.7 relu(0.7 y)) folds into the head behind it; nothing of the scalars is left.
    assert [n for n, _ in small.named_parameters() if "scalars" in n] == []
    assert "aten.mul" not in str(getattr(small, "graph"))  # noqa: B009
    reason = space.explain(["stem->add", "blocks.0.conv-bn"])
    assert "keeps no input" in reason
    assert "'stem->add'" in reason


def test_a_scalar_that_nothing_can_take_stays_as_one_parameter() -> None:
    net = Residual().double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    space = espalier.search_space(net, (x,), parameterless=True)
    with torch.no_grad():
        for name in space.trace.scalars[:2]:
            space.model.get_parameter(name).fill_(-0.7)
    small = espalier.construct(space, space.solution([]))
    assert [n for n, _ in small.named_parameters() if "scalars" in n] == list(space.trace.scalars[:2])
    assert difference(space.model, small, x) < 1e-12


class Pools(nn.Module):
    """A pool and two convolutions into a concatenation, a gate, and a protected skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.pool, self.conv = nn.AvgPool2d(3, 1, 1), nn.Conv2d(4, 4, 1)
        self.mix = nn.Conv2d(8, 4, 3, padding=1)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.mix(torch.cat([self.pool(x), self.conv(x)], 1))
        return self.out(y * y.sigmoid() + x)


def test_scalars_fold_across_a_concatenation_into_the_columns_of_a_convolution() -> None:
    torch.manual_seed(0)
    net = Pools().double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    space = espalier.search_space(net, (x,), parameterless=True)
    with torch.no_grad():
        space.model.get_parameter("scalars.pool").fill_(-1.7)
    small = espalier.construct(space, space.solution([]))
    assert difference(space.model, small, x) < 1e-12
    assert {n for n, _ in small.named_parameters()} == {n for n, _ in net.named_parameters()}
    torch.testing.assert_close(small.get_parameter("mix.weight")[:, :4], -1.7 * net.mix.weight[:, :4])
    assert torch.equal(small.get_parameter("mix.weight")[:, 4:], net.mix.weight[:, 4:])
    assert torch.equal(net.mix.weight, space.model.get_parameter("mix.weight"))


def test_reasons_of_what_cannot_go() -> None:
    x = torch.randn(2, 3, 6, 6)
    space = espalier.search_space(Pools(), (x,), parameterless=True)
    assert {s.name for s in space.structures} == {"pool", "conv", "stem->add"}
    assert space.kept["mix->mul"] == "the product 'mul' would vanish without it"
    assert space.kept["sigmoid"] == "the product 'mul' would vanish without it"
    assert "the product 'mul' would vanish" in str(space.summary())
    with pytest.raises(SpaceError, match="would vanish"):
        space["mix->mul"]
    keeping = espalier.search_space(Pools(), (x,), parameterless=True, keep=["pool"])
    assert keeping.kept["pool"] == "protected by keep= ('pool')"
    assert {s.name for s in keeping.structures} == {"conv", "stem->add"}
    assert keeping.trace.scalars == ("scalars.stem_to_add",)
    gate = espalier.search_space(SqueezeExcite(), (x,), parameterless=True)
    assert gate.kept["stem->mul"] == "the product 'mul' would vanish without it"
    blocks = espalier.search_space(Residual(), (x,), parameterless=True, keep=["blocks"])
    assert len(blocks) == 0


def test_a_model_with_scalars_of_its_own() -> None:
    net = Residual()
    net.scalars = nn.Linear(2, 2)
    with pytest.raises(SpaceError, match="rename it"):
        espalier.search_space(net, (torch.randn(2, 3, 6, 6),), parameterless=True)


def test_the_default_is_the_papers_setting() -> None:
    net = DARTS(channels=4, cells=2, nodes=2)
    space = espalier.search_space(net, (torch.randn(2, 3, 16, 16),))
    assert space.model is net
    assert space.trace.scalars == ()
    assert not [s.name for s in space.structures if "pool" in s.name]


def test_training_saving_and_loading(tmp_path: object) -> None:
    """H2SPG drives skips to zero as it does branches, and the small network survives a round trip."""
    torch.manual_seed(0)
    net = Wide(count=3).double()
    x, y = torch.randn(16, 6).double(), torch.randint(0, 3, (16,))
    space = espalier.search_space(net, (x,), parameterless=True)
    assert [s.name for s in space.structures if "->" in s.name] == ["x->add"]
    model = space.model
    before = net.out.weight.detach().clone()

    def toward_skips(space: SearchSpace, state: object) -> Tensor:
        return torch.tensor([0.0 if "->" in s.name else 1.0 + i for i, s in enumerate(space.structures)])

    opt = espalier.H2SPG(
        space, budget=espalier.Budget(structures=0.5), lr=0.05, momentum=0.9, warmup_steps=3, projection_steps=4,
        saliency=toward_skips,
    )  # fmt: skip
    for _ in range(9):
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
    assert opt.redundant[0] == "x->add"
    assert float(model.get_parameter("scalars.x_to_add")) == 0.0
    assert not torch.equal(before, net.out.weight)  # the user's own parameters are the ones that train
    solution = opt.solution()
    small = espalier.construct(space, solution)
    assert difference(model, small, x) < 1e-12
    assert not [n for n, _ in small.named_parameters() if "scalars" in n]
    for one in (small, model):
        espalier.save(one, f"{tmp_path}/x.espalier")
        assert difference(one, espalier.load(f"{tmp_path}/x.espalier"), x) == 0.0
