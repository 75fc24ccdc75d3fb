"""Invariants 1 to 4 over random networks: round trip, exactness, validity, budget.

``ESPALIER_NETWORKS=10000`` makes the run longer; the default is 300 networks with 5 solutions each.
"""

import copy
import os
import random

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from random_networks import CHANNELS, SIZE, Program, network, programs
from torch import Tensor, nn

import espalier
from espalier.errors import BudgetError, InvalidSolution

PARTS = 10
NETWORKS = int(os.environ.get("ESPALIER_NETWORKS", "300"))
SOLUTIONS = 5


def outputs(module: nn.Module, inputs: tuple[Tensor, ...], training: bool) -> tuple[Tensor, ...]:
    """Outputs of a copy, so that running statistics stay as they are."""
    with torch.no_grad():
        return copy.deepcopy(module).train(training)(*[x.clone() for x in inputs])


def assert_same(a: nn.Module, b: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    for training in (False, True):
        for x, y in zip(outputs(a, inputs, training), outputs(b, inputs, training), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def check(program: Program) -> None:
    net, inputs = network(program)
    space = espalier.search_space(net, inputs)
    larger = tuple(torch.randn(3, CHANNELS, SIZE, SIZE, dtype=torch.float64) for _ in inputs)
    whole = espalier.construct(space, space.solution([]))
    for training in (False, True):
        traced = outputs(space.trace.graph_module, larger, training)
        for x, y in zip(outputs(net, larger, training), traced, strict=True):
            torch.testing.assert_close(x, y, rtol=0.0, atol=0.0)
    assert_same(net, whole, larger)
    net.load_state_dict(whole.state_dict())
    whole.load_state_dict(net.state_dict())
    names = [s.name for s in space.structures]
    read = {name for name, _ in space.trace.graph_module.named_parameters()}  # not all layers are called
    rng = random.Random(program.seed)
    for _ in range(SOLUTIONS if names else 0):
        order = rng.sample(names, len(names))
        removed = space.removable_in_order(order, stop_at=rng.randint(1, len(names)))
        solution = space.solution(removed)
        small = espalier.construct(space, solution)
        assert_same(space.masked(solution), small, larger)
        cost = space.cost(removed)
        assert sum(p.numel() for name, p in small.named_parameters() if name in read) == cost.params
        assert cost.params < space.cost().params or not removed
        any_set = order[: rng.randint(1, len(order))]
        reason = space.explain(any_set)
        if reason:
            with pytest.raises(InvalidSolution):
                space.solution(any_set)
        else:
            assert_same(
                space.masked(space.solution(any_set)),
                espalier.construct(space, space.solution(any_set)),
                larger,
            )
    if names:
        share = rng.choice([0.3, 0.5, 0.8])
        try:
            solution = space.sample(espalier.Budget(params=share), torch.Generator().manual_seed(program.seed))
        except BudgetError as error:
            if "nearest" not in str(error):
                raise
        else:
            assert space.cost(solution.removed).params <= share * space.cost().params
            if solution.removed:
                assert space.cost(solution.removed[:-1]).params > share * space.cost().params


@pytest.mark.parametrize("part", range(PARTS))
def test_random_networks(part: int) -> None:
    @seed(part)
    @settings(
        max_examples=max(1, NETWORKS // PARTS),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(programs())
    def run(program: Program) -> None:
        check(program)

    run()
