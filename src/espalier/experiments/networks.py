"""The networks that recipes name."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from espalier.models import (
    DARTS,
    DemoNet,
    MobileNet,
    StackedUnets,
    SuperResNet,
    regnet_x_200m,
    regnet_x_400m,
    regnet_x_600m,
    regnet_x_800m,
)

__all__ = ["NETWORKS", "build"]


def _darts(cells: int, channels: int, stem: str, width: float, **options: Any) -> nn.Module:
    return DARTS(max(2, round(width * channels)), cells, affine=True, stem=stem, **options)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "demonet": DemoNet,
    "stacked-unets": StackedUnets,
    "super-resnet": SuperResNet,
    "darts8": partial(_darts, 8, 24, "cifar"),
    "darts14": partial(_darts, 14, 48, "imagenet"),
    "regnet-200m": regnet_x_200m,
    "regnet-400m": regnet_x_400m,
    "regnet-600m": regnet_x_600m,
    "regnet-800m": regnet_x_800m,
    "mobile": MobileNet,
}


def build(name: str, width: float, in_channels: int, num_classes: int, size: int) -> nn.Module:
    """A network for images of side ``size``; its weights come from torch's global generator.

    >>> type(build("darts8", 0.1, 3, 10, 32)).__name__
    'DARTS'
    """
    if name not in NETWORKS:
        raise ValueError(f"no network is called {name!r}; there are {', '.join(NETWORKS)}")
    options: dict[str, Any] = {"in_channels": in_channels, "num_classes": num_classes}
    if name == "mobile" and size < 128:
        options["stem_stride"] = 1
    if name == "darts14" and size < 128:
        name = "darts14-small"
    factory = NETWORKS.get(name) or partial(_darts, 14, 48, "cifar")
    return factory(width=width, **options)
