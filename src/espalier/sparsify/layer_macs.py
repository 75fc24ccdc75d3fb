"""Multiply-accumulates of single layers of a model that is not traced."""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

from espalier.modes import evaluating
from espalier.space.cost import every_product


def layer_macs(
    model: nn.Module, layers: Collection[str], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """MACs of one evaluation on this input: of each layer by its path, and of the whole model under ``""``.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> layer_macs(model, ["2"], (torch.randn(5, 4),))
    {'2': 30, '': 90}

    Counted as by :func:`espalier.space.cost.count_macs`, but for the whole batch; a layer called twice counts twice.
    """
    found = dict.fromkeys(layers, 0)
    with evaluating(model), every_product() as counter, ExitStack() as stack:
        for name in layers:

            def enter(module: nn.Module, inputs: Any, name: str = name) -> None:
                found[name] -= counter.get_total_flops() // 2

            def leave(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                found[name] += counter.get_total_flops() // 2

            layer = model.get_submodule(name)
            stack.callback(layer.register_forward_pre_hook(enter).remove)
            stack.callback(layer.register_forward_hook(leave).remove)
        model(*args, **dict(kwargs or {}))
        return found | {"": counter.get_total_flops() // 2}
