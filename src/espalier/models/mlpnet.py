"""MLPNet: the 784-40-20-10 network without biases of the one-shot pruning papers."""

from __future__ import annotations

from torch import Tensor, nn


class MLPNet(nn.Module):
    """Three linear layers with ReLU between them; 32,360 weights.

    >>> import torch
    >>> MLPNet()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 40, bias=False)
        self.fc2 = nn.Linear(40, 20, bias=False)
        self.fc3 = nn.Linear(20, 10, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.fc1(x.flatten(1)))
        return self.fc3(self.relu(self.fc2(x)))
