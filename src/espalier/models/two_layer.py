"""The two-layer network of the i-SpaSP papers."""

from __future__ import annotations

from torch import Tensor, nn


class TwoLayer(nn.Module):
    """``W1 σ(W0 x + b0) + b1``, on flattened inputs.

    >>> import torch
    >>> TwoLayer(784, 1000, 10)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, hidden)
        self.activation = nn.ReLU()
        self.output = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.activation(self.hidden(x.flatten(1))))
