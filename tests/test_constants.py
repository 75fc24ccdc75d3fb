"""What a segment yields once its parameters are zero."""

import pytest
import torch
from torch import nn

from espalier.graph.constants import annihilator, constant_output, last_annihilator
from espalier.graph.segments import segment_graph
from espalier.graph.trace import trace
from espalier.space.search_space import search_space

X = torch.randn(2, 6, 8, dtype=torch.float64)


class Residual(nn.Module):
    def __init__(self, branch: nn.Module):
        super().__init__()
        self.branch, self.out = branch, nn.Linear(8, 3)

    def forward(self, x):
        return self.out(x + self.branch(x))


def branch(*layers: nn.Module) -> Residual:
    return Residual(nn.Sequential(*layers)).double()


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


LAST = {"two layers": 3, "sigmoid behind": 1, "attention": 1, "convolution": 1}
CASES = {
    "two layers": lambda: branch(nn.Linear(8, 16), nn.GELU(), nn.Dropout(), nn.Linear(16, 8), nn.Dropout()),
    "sigmoid behind": lambda: branch(nn.LayerNorm(8), nn.Linear(8, 8), nn.Sigmoid()),
    "attention": lambda: branch(nn.LayerNorm(8), SelfAttention(), nn.Dropout()),
    "convolution": lambda: branch(nn.Conv1d(6, 6, 1), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_last_annihilator_gives_what_the_first_one_gives(name, monkeypatch):
    traced = trace(CASES[name]().eval(), X)
    (segment,) = [s for s in segment_graph(traced) if "branch" in s.name]
    zeroed = frozenset(segment.parameters)
    first, last = annihilator(traced, segment.nodes, zeroed), last_annihilator(traced, segment.nodes, zeroed)
    assert first == 0
    assert last == LAST[name]
    short = constant_output(traced, segment.nodes, zeroed)
    monkeypatch.setattr("espalier.graph.constants.last_annihilator", annihilator)
    long = constant_output(traced, segment.nodes, zeroed)
    assert not isinstance(short, str)
    assert not isinstance(long, str)
    assert short.evaluated.equal(long.evaluated)
    assert short.trained.equal(long.trained)
    model = traced.model.eval()
    with torch.no_grad():
        for parameter in zeroed:
            model.get_parameter(parameter).zero_()
        torch.testing.assert_close(model.branch(X), short.evaluated.expand_as(X))


def test_layers_without_parameters_other_than_zero_are_not_run(monkeypatch):
    traced = trace(CASES["two layers"]().eval(), X)
    (segment,) = [s for s in segment_graph(traced) if "branch" in s.name]

    def run(*args, **kwargs):
        raise AssertionError("it ran")

    monkeypatch.setattr(nn.Linear, "forward", run)
    value = constant_output(traced, segment.nodes, frozenset(segment.parameters))
    assert not isinstance(value, str)
    assert value.is_zero


def test_a_bias_that_stays_is_a_constant_that_dropout_makes_random():
    model = branch(nn.Linear(8, 8), nn.Dropout(0.5))
    model.branch[0].bias.requires_grad_(False)
    space = search_space(model, X)
    assert "random" in space.kept["branch.0-1"]
