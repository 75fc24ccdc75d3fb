"""What may lie on an edge of a cell: the operations of DARTS, RobustDARTS (noise) and NAS-Bench-201."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["NAMES", "OPERATIONS", "FactorizedReduce", "Noise", "Scaled", "drop_path", "operation", "relu_conv_bn"]


class FactorizedReduce(nn.Module):
    """Halves height and width: two 1×1 convolutions of stride 2, on even and on odd pixels, concatenated.

    >>> FactorizedReduce(4, 8)(torch.zeros(1, 4, 6, 6)).shape
    torch.Size([1, 8, 3, 3])
    """

    def __init__(self, inputs: int, outputs: int, affine: bool = False) -> None:
        super().__init__()
        self.even = nn.Conv2d(inputs, outputs // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(inputs, outputs - outputs // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(outputs, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        return self.bn(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], dim=1))


class Noise(nn.Module):
    """Standard normal noise in the input's shape, whatever the input is; every `stride`-th pixel of it.

    >>> Noise(2)(torch.zeros(1, 4, 6, 6)).shape
    torch.Size([1, 4, 3, 3])
    """

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.randn_like(x[:, :, :: self.stride, :: self.stride])


class Scaled(nn.Module):
    """An operation times a trainable number, 1 at first: what can be driven to zero where there are no weights.

    >>> Scaled(nn.Identity())(torch.ones(2)).tolist()
    [1.0, 1.0]
    """

    def __init__(self, op: nn.Module) -> None:
        super().__init__()
        self.op = op
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x) * self.scale


def relu_conv_bn(inputs: int, outputs: int, affine: bool, kernel: int = 1, bias: bool = False) -> nn.Sequential:
    """ReLU, a convolution that keeps the size, batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(outputs, affine=affine))


def _depthwise(channels: int, kernel: int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    padding = dilation * (kernel - 1) // 2
    return [
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    ]


def _separable(channels: int, kernel: int, stride: int, affine: bool) -> nn.Module:
    twice = _depthwise(channels, kernel, stride, 1, affine) + _depthwise(channels, kernel, 1, 1, affine)
    return nn.Sequential(*twice)


def _dilated(channels: int, kernel: int, stride: int, affine: bool) -> nn.Module:
    return nn.Sequential(*_depthwise(channels, kernel, stride, 2, affine))


def _skip(channels: int, stride: int, affine: bool) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine)


_MAKE: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "max_pool_3x3": lambda c, s, affine: nn.MaxPool2d(3, s, 1),
    "avg_pool_3x3": lambda c, s, affine: nn.AvgPool2d(3, s, 1, count_include_pad=False),
    "skip": _skip,
    "sep_conv_3x3": lambda c, s, affine: _separable(c, 3, s, affine),
    "sep_conv_5x5": lambda c, s, affine: _separable(c, 5, s, affine),
    "dil_conv_3x3": lambda c, s, affine: _dilated(c, 3, s, affine),
    "dil_conv_5x5": lambda c, s, affine: _dilated(c, 5, s, affine),
    "noise": lambda c, s, affine: Noise(s),
    "nor_conv_1x1": lambda c, s, affine: relu_conv_bn(c, c, affine, 1, bias=not affine),
    "nor_conv_3x3": lambda c, s, affine: relu_conv_bn(c, c, affine, 3, bias=not affine),
}
OPERATIONS = tuple(_MAKE)[:7]
"""The operations of DARTS that add something to a sum: all but `none`."""
NAMES = (*_MAKE, "none")
"""Every operation by name. `none` adds nothing to a sum: no module stands for it."""
WITHOUT_WEIGHTS = ("max_pool_3x3", "avg_pool_3x3", "skip", "noise")
"""What a trainable number of its own is for; a skip of stride 2 has weights and gets one all the same."""


def operation(
    name: str, channels: int, stride: int = 1, affine: bool = False, pool_norm: bool = True, scaled: bool = False
) -> nn.Module:
    """One operation that keeps the channels.

    >>> operation("dil_conv_5x5", 8, stride=2)(torch.zeros(1, 8, 6, 6)).shape
    torch.Size([1, 8, 3, 3])

    Args:
        affine: scale and shift in batch norms (never in the pools').
        pool_norm: a batch norm after a pool, as in DARTS's search network; its evaluation network has none.
        scaled: a trainable number behind what has no weights, as GSparsity has it.

    Raises ValueError for another name, and for `none`.
    """
    if name not in _MAKE:
        raise ValueError(
            f"{name!r} is no operation of DARTS or NAS-Bench-201 that adds anything; there are {', '.join(_MAKE)}"
        )
    if stride > 1 and name.startswith("nor_conv"):
        raise ValueError(f"{name!r} has no stride: NAS-Bench-201 reduces between its cells")
    op = _MAKE[name](channels, stride, affine)
    if pool_norm and "pool" in name:
        op = nn.Sequential(op, nn.BatchNorm2d(channels, affine=False))
    return Scaled(op) if scaled and name in WITHOUT_WEIGHTS else op


def drop_path(x: Tensor, probability: float) -> Tensor:
    """Drop whole examples with this probability and scale the rest up (Larsson et al., 2016); [N, ...] → same.

    >>> drop_path(torch.ones(2, 3), 0.0).sum().item()
    6.0
    """
    keep = 1.0 - probability
    mask = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) < keep
    return x * mask.to(x.dtype) / keep
