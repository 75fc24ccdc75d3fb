"""The networks that recipes name."""

from collections.abc import Callable
from dataclasses import replace
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
from espalier.models.mobile import PIXEL1_STAGES
from espalier.models.super_resnet import ZEN_STAGES, SuperStage

__all__ = ["NETWORKS", "build"]


def _darts(cells: int, channels: int, nodes: int, width: float, **options: Any) -> nn.Module:
    return DARTS(max(2, round(width * channels)), cells, nodes, affine=True, **options)


def _few_blocks(**options: Any) -> nn.Module:
    return SuperResNet(stages=(SuperStage(120, 40, 1, 1), SuperStage(176, 32, 2, 2)), **options)


def _two_blocks_a_stage(**options: Any) -> nn.Module:
    return SuperResNet(stages=tuple(replace(stage, depth=2) for stage in ZEN_STAGES), **options)


def _few_stages(**options: Any) -> nn.Module:
    return MobileNet(stages=(PIXEL1_STAGES[1],), **options)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "demonet": DemoNet,
    "stacked-unets": StackedUnets,
    "super-resnet": SuperResNet,
    "darts8": partial(_darts, 8, 24, 4),
    "darts8-2nodes": partial(_darts, 8, 24, 2),
    "darts14": partial(_darts, 14, 48, 4),
    "darts3-1node": partial(_darts, 3, 24, 1),
    "super-resnet-14blocks": _two_blocks_a_stage,
    "super-resnet-3blocks": _few_blocks,
    "mobile-4blocks": _few_stages,
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
    if name.startswith("mobile") and size < 64:
        options["stem_stride"] = 1
    if name == "darts14" and size > 32:
        options["stem"] = "imagenet"
    return NETWORKS[name](width=width, **options)
