"""Operators that move data, pool it, or reduce it over other axes.

Where each index of a narrowed axis goes is not written down per operator: the operator is run on a tensor of
index labels, and the labels are read off its result.
"""

from typing import Any

import torch
from torch import fx, nn

from espalier.graph.constants import hint, shape_of
from espalier.rules.value import Build, Constant, Narrowed, Value, both, rule

aten = torch.ops.aten

_SIZED = (aten.view.default, aten.reshape.default)


@rule(
    *_SIZED, aten.flatten.using_ints, aten.permute.default, aten.transpose.int, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.t.default, aten.movedim.int, nn.Flatten,
)  # fmt: skip
def move(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """Reshapes and transpositions."""
    value = values[0]
    if not isinstance(value, Narrowed) or not all(isinstance(v, (fx.Node, Narrowed)) for v in values):
        return None
    owner = _owner(build, node, value)
    if owner is None:
        return None
    dim, label = owner
    stays = torch.isin(label, value.kept)
    position = torch.full((value.total,), -1)
    position[value.gone] = torch.arange(len(value.gone))
    new = build.copy(node, [value.node, *[v for v in values[1:] if isinstance(v, fx.Node)]])
    if node.target in _SIZED:
        sizes = list(new.args[1])  # type: ignore[arg-type]
        if isinstance(sizes[dim], int) and sizes[dim] != -1:
            sizes[dim] = int(stays.sum())
        elif not isinstance(sizes[dim], int):
            return None
        new.args = (new.args[0], sizes)
    fill = both(value.fill, lambda f: f[position[label[~stays]]])
    return Narrowed(new, dim, stays.nonzero().flatten(), len(label), fill)


def _owner(build: Build, node: fx.Node, value: Narrowed) -> tuple[int, torch.Tensor] | None:
    """The output axis along which the narrowed axis lies, and the input index behind each of its indices."""
    source = node.all_input_nodes[0]
    shape = shape_of(source.meta["val"])
    view = [1] * len(shape)
    view[value.dim] = -1
    labels = torch.arange(value.total).view(view).expand(shape)
    if node.op == "call_module":
        moved = build.module(node)(labels)
    else:
        args = fx.map_arg(node.args[1:], lambda n: _number(n))
        moved = node.target(labels.contiguous(), *args, **node.kwargs)  # type: ignore[operator]
    for dim in range(moved.ndim):
        rows = moved.movedim(dim, 0).reshape(moved.shape[dim], -1)
        if (rows == rows[:, :1]).all():
            return dim, rows[:, 0]
    return None


def _number(node: fx.Node) -> Any:
    return hint(node.meta.get("val"))


@rule(
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.Upsample, aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default,
    aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec,
)  # fmt: skip
def pool(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """Pools and interpolations over the axes behind the channels: a uniform channel stays what it is."""
    value = values[0]
    if not isinstance(value, Narrowed) or value.dim != 1 or len(values) > 1:
        return None
    uniform = isinstance(node.target, str) and _keeps_constants(build.module(node))
    if not value.fill.is_zero and not uniform:
        return None
    return Narrowed(build.copy(node, [value.node]), 1, value.kept, value.total, value.fill)


def _keeps_constants(layer: nn.Module) -> bool:
    """An average over zero padding does not keep a constant other than zero."""
    padding = getattr(layer, "padding", 0)
    padded = any(padding) if isinstance(padding, tuple) else bool(padding)
    average = isinstance(layer, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d))
    return not (average and padded and layer.count_include_pad) and not isinstance(layer, nn.Upsample)


@rule(aten.mean.dim, aten.sum.dim_IntList)
def reduce(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """Sums and means: over other axes, or over the narrowed axis alone."""
    (value,) = values
    if not isinstance(value, Narrowed) or len(node.args) < 2 or not isinstance(node.args[1], (list, tuple)):
        return None
    source = node.all_input_nodes[0].meta["val"]
    dims = {d % source.ndim for d in node.args[1]}  # type: ignore[operator]
    keepdim = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
    mean = node.target is aten.mean.dim
    if dims == {value.dim}:
        total = build.call(aten.sum.dim_IntList, value.node, [value.dim], keepdim)
        rest = both(value.fill, lambda f: f.sum().reshape(()))
        if not rest.is_zero:
            total = build.call(aten.add.Tensor, total, build.constant(rest, node.name))
        return build.call(aten.div.Tensor, total, value.total) if mean else total
    if value.dim in dims:
        return None
    sizes = [shape_of(source)[d] for d in dims]
    if not mean and not all(isinstance(source.shape[d], int) for d in dims):
        return None
    count = 1 if mean else int(torch.tensor(sizes).prod())
    dim = value.dim if keepdim else value.dim - sum(d < value.dim for d in dims)
    fill: Constant = both(value.fill, lambda f: f * count)
    return Narrowed(build.copy(node, [value.node]), dim, value.kept, value.total, fill)
