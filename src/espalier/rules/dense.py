"""Convolutions and linear layers: constant inputs leave the weight, and go into the bias where they count."""

from typing import Any

import torch
from torch import fx, nn

from espalier.graph.constants import Constant
from espalier.graph.module import shallow
from espalier.rules.value import Build, Narrowed, Value, both, rule

aten = torch.ops.aten


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def conv(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """``W x + b`` with the channels ``gone`` at ``fill``: their part is a constant, unless it meets zero padding."""
    (value,) = values
    layer: Any = build.module(node)
    if not isinstance(value, Narrowed) or value.dim != node.meta["val"].ndim - layer.weight.ndim + 1:
        return None
    padded = layer.padding_mode == "zeros" and (isinstance(layer.padding, str) or any(layer.padding))
    if padded and not value.fill.is_zero:
        return None
    if layer.groups == 1:
        return _narrow_inputs(build, node, layer, value, layer.weight.flatten(2).sum(2))
    if layer.groups == layer.in_channels == layer.out_channels:
        return _narrow_depthwise(build, node, layer, value)
    return None


@rule(nn.Linear)
def linear(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """The same over the last axis."""
    (value,) = values
    layer: Any = build.module(node)
    if not isinstance(value, Narrowed) or value.dim != node.meta["val"].ndim - 1:
        return None
    return _narrow_inputs(build, node, layer, value, layer.weight)


def _narrow_inputs(build: Build, node: fx.Node, layer: Any, value: Narrowed, columns: torch.Tensor) -> fx.Node | None:
    weight = layer.weight
    kept, gone = value.kept.to(weight.device), value.gone.to(weight.device)
    shift = both(value.fill, lambda f: columns.detach()[:, gone] @ f.to(weight))
    narrow = _with_weight(layer, weight[:, kept])
    _set_width(narrow, len(kept))
    if not shift.is_zero and shift.alike:
        bias = shift.evaluated if layer.bias is None else layer.bias + shift.evaluated
        frozen = layer.bias is None or not layer.bias.requires_grad
        narrow.bias = nn.Parameter(bias.detach().clone(), requires_grad=not frozen)
    new = build.narrow_module(node, narrow, value.node)
    if new is None or shift.is_zero or shift.alike:
        return new
    trailing = (1,) * (weight.ndim - 2)
    return build.call(aten.add.Tensor, new, build.constant(both(shift, lambda t: t.reshape(-1, *trailing)), node.name))


def _narrow_depthwise(build: Build, node: fx.Node, layer: Any, value: Narrowed) -> Value | None:
    weight, bias = layer.weight, layer.bias
    kept, gone = value.kept.to(weight.device), value.gone.to(weight.device)
    narrow = _with_weight(layer, weight[kept])
    narrow.in_channels = narrow.out_channels = narrow.groups = len(kept)
    if bias is not None:
        narrow.bias = nn.Parameter(bias[kept].detach().clone(), requires_grad=bias.requires_grad)
    new = build.narrow_module(node, narrow, value.node)
    if new is None:
        return None
    sums = weight.detach().flatten(1).sum(1)[gone]
    offset = torch.zeros_like(sums) if bias is None else bias.detach()[gone]
    fill = both(value.fill, lambda f: sums * f.to(sums) + offset)
    return Narrowed(new, value.dim, value.kept, value.total, Constant(fill.evaluated, fill.trained))


def _with_weight(layer: Any, weight: torch.Tensor) -> Any:
    """A shallow copy of the layer (same class, settings, hooks) with another weight."""
    narrow = shallow(layer)
    narrow.weight = nn.Parameter(weight.detach().clone(), requires_grad=layer.weight.requires_grad)
    return narrow


def _set_width(layer: Any, width: int) -> None:
    if isinstance(layer, nn.Linear):
        layer.in_features = width
    else:
        layer.in_channels = width
