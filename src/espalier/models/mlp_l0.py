"""The multi-layer perceptron 784-300-100 of Table 2 of L0-ARM.

Source: LeCun et al. (1998), with the initialisation of the authors' code: normal, fan-in (their weights are
stored transposed), biases 0.
266,610 parameters, 266,200 of them weights.
"""

import itertools

import torch
from torch import Tensor, nn

__all__ = ["MLP"]


class MLP(nn.Module):
    """Linear layers with ReLU between; images are flattened.

    >>> MLP()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])

    Shapes: float [N, ...] → [N, sizes[-1]], with sizes[0] values per example.
    """

    def __init__(self, sizes: tuple[int, ...] = (784, 300, 100, 10)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_normal_(layer.weight, mode="fan_in")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for i, layer in enumerate(self.layers):
            x = layer(torch.relu(x) if i else x)
        return x
