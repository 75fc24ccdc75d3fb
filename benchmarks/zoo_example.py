"""What an entry of the zoo is."""

from typing import Any, NamedTuple

import torch
from torch import nn

BATCH = 2


class Example(NamedTuple):
    """A model and example inputs for it."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def import_torchvision() -> Any:
    """torchvision, also beside a torch without CUDA: its compiled operators are declared, never called."""
    for name in ("nms", "qnms"):
        try:
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:
            break  # declared before, or by torchvision itself
    import torchvision

    return torchvision
