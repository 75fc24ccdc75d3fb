"""Small networks that several tests share."""

import torch
from torch import Tensor, nn


class TwoBranches(nn.Module):
    """``out(a(x) + b(x))``: either branch may go, not both."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x) + self.b(x))


class SqueezeExcite(nn.Module):
    """A gate by sigmoid: without its parameters it is a half, not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.fc1, self.fc2 = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
        self.out = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.out(x * gate)


class Product(nn.Module):
    """``a(x) * b(x) + x``: a factor that becomes zero takes the whole product with it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x) + x


class OnePlus(nn.Module):
    """``x * (1 + b(x))``: without b the factor is one."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x * (1 + self.b(x)))


class Nested(nn.Module):
    """``c(a(x) + b(x)) + x``: without c, the inner sum is dead, and a and b with it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) + self.b(x)) + x


class SharedTwice(nn.Module):
    """One layer on two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.other, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.other(x) + self.shared(x) + self.shared(x.relu()))


class Wide(nn.Module):
    """``count`` parallel branches, summed: a search space of any size."""

    def __init__(self, count: int = 8, width: int = 6):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width + i), nn.ReLU(), nn.Linear(width + i, width)) for i in range(count)
        )
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        total = x
        for branch in self.branches:
            total = total + branch(x)
        return self.out(total)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)) + x)


class Residual(nn.Module):
    """A stem and residual blocks, called through containers."""

    def __init__(self, width: int = 4, depth: int = 3):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def equal_in_both_modes(a: nn.Module, b: nn.Module, *inputs: Tensor) -> bool:
    """Whether two modules agree in eval and in train mode; neither is changed."""
    import copy

    for training in (False, True):
        with torch.no_grad():
            x, y = (copy.deepcopy(m).train(training)(*inputs) for m in (a, b))
        if not torch.allclose(x, y, rtol=1e-9, atol=1e-9):
            return False
    return True
