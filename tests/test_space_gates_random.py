"""Gates on random networks with every kind of coupled axes: a closed gate is the structure removed, exactly."""

import copy
import random

import pytest
import torch
from random_channels import RandomChannels

import espalier
from espalier.sparsify import SpaceGates

LEVELS = (("channel", "head"), ("segment", "channel", "head"), ("channel", "kernel"), ("segment",))


@pytest.mark.parametrize("seed", range(16))
def test_gates_equal_the_masked_and_the_constructed_network(seed: int) -> None:
    rng = random.Random(seed)
    net, x = RandomChannels(seed), torch.randn(3, 3, 4, 4, dtype=torch.float64)
    space = espalier.search_space(net, (x,), levels=LEVELS[seed % len(LEVELS)])
    if not len(space):
        return
    gates, names = SpaceGates(space).double(), list(space.structures.names)
    for share in (0.3, 0.8):
        order = rng.sample(names, len(names))
        removed = space.removable_in_order(order, stop_at=max(1, round(share * len(names))))
        gates._z = torch.ones(len(names), dtype=torch.float64)
        gates._z[[space.position(n) for n in removed]] = 0.0
        masked, before = space.masked(space.solution(removed)), copy.deepcopy(net.state_dict())
        for training in (False, True):
            net.train(training)
            with torch.no_grad():
                torch.testing.assert_close(gates(x), masked.train(training)(x), rtol=1e-8, atol=1e-9)
            net.load_state_dict(before)
    gates._z = None
    net.eval()
    with torch.no_grad():
        gates.phi.copy_(0.3 * torch.randn(gates.phi.shape))
        gated, solution = gates(x), gates.solution()
        for network in (gates.finish(), espalier.construct(space, solution), gates):
            torch.testing.assert_close(network(x), gated, rtol=1e-8, atol=1e-9)
