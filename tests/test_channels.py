"""Channels, heads and kernels: exactness on random networks, and what the coupled axes must be."""

import copy
import os
import random

import pytest
import torch
from random_channels import RandomChannels
from torch import Tensor, nn

import espalier

PARTS = 8
NETWORKS = int(os.environ.get("ESPALIER_NETWORKS", "160"))


def outputs(module: nn.Module, x: Tensor, training: bool) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(module).train(training)(x)


def assert_same(a: nn.Module, b: nn.Module, x: Tensor) -> None:
    for training in (False, True):
        torch.testing.assert_close(outputs(a, x, training), outputs(b, x, training), rtol=1e-8, atol=1e-9)


def check(seed: int) -> tuple[int, int]:
    """A random network, three random solutions over all levels; how much was narrowed of how much."""
    rng = random.Random(seed)
    net, x = RandomChannels(seed), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    levels = rng.choice([("channel", "head"), ("segment", "channel", "head"), ("channel", "kernel"), ("head",)])
    space = espalier.search_space(net, (x,), levels=levels)
    larger = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    assert_same(net, space.trace.graph_module, larger)
    full, left = space.cost().params, []
    for share in (0.2, 0.5, 1.0) if len(space) else ():
        names = list(space.structures.names)
        order = rng.sample(names, len(names))
        removed = space.removable_in_order(order, stop_at=max(1, round(share * len(order))))
        solution = space.solution(removed)
        small = espalier.construct(space, solution)
        assert_same(space.masked(solution), small, larger)
        left.append(sum(p.numel() for p in small.parameters()))
    return full, min(left, default=full)


@pytest.mark.parametrize("part", range(PARTS))
def test_random_networks(part: int) -> None:
    narrowed = 0
    for seed in range(part, NETWORKS, PARTS):
        try:
            full, left = check(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        narrowed += left < full
    assert narrowed > NETWORKS // PARTS // 2
