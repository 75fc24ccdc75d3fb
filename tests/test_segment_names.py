"""Segments are named after the layers whose parameters they hold, whether those are called or read."""

import torch
import torch.nn.functional as F
from torch import nn

import espalier


class Net(nn.Module):
    """One branch reads a layer's weight by a functional operator, one a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.scale = nn.Parameter(torch.randn(4))
        self.out = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner[0](x)
        return self.out(y + F.linear(y, self.inner[1].weight).relu() + torch.sigmoid(y * self.scale))


def test_read_parameters_name_their_layer():
    space = espalier.search_space(Net(), (torch.randn(3, 4),))
    assert [s.name for s in space.structures] == ["inner.1", "scale"]
