"""LeNet-5-Caffe, 20-50-800-500, of Table 2 of L0-ARM.

Source: https://github.com/BVLC/caffe/tree/master/examples/mnist, with the initialisation of the L0-ARM authors' code:
normal, fan-out for convolutions and fan-in for linear layers, biases 0. 431,080 parameters, 430,500 of them weights.
"""

import torch
from torch import Tensor, nn

__all__ = ["LeNet5"]


class LeNet5(nn.Module):
    """Two 5×5 convolutions with ReLU and max pooling, two linear layers.

    >>> LeNet5()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])

    Shapes: float [N, 1, 28, 28] → [N, num_classes].
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, num_classes)
        for layer in (self.conv1, self.conv2, self.fc1, self.fc2):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out" if isinstance(layer, nn.Conv2d) else "fan_in")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(torch.max_pool2d(self.conv1(x), 2))  # in this order ReLU has a quarter of the values to do
        x = torch.relu(torch.max_pool2d(self.conv2(x), 2))
        x = torch.relu(self.fc1(x.flatten(1)))
        return self.fc2(x)
