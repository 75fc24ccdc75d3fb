"""Convolutions, linear layers and embeddings.

A removed output row is gone with its bias. Constant inputs leave the weight, and go into the bias where they count.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from espalier.graph.axes import Coupling, Labels, couples
from espalier.graph.constants import Constant
from espalier.graph.module import shallow
from espalier.rules.norm import uniform_along
from espalier.rules.value import ZERO, Build, Kept, Narrowed, Value, both, evaluated, full_shape, part, rule, within

aten = torch.ops.aten
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


# How they couple axes.


@couples(*CONVOLUTIONS, *TRANSPOSED)
def conv_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels:
    """Weight [out, in / groups, ...] (transposed: [in, out / groups, ...]); the axes behind the channels stay."""
    layer = coupling.module(node)
    weight, bias = coupling.own(node, "weight"), coupling.own(node, "bias")
    assert weight is not None
    at = len(coupling.shape(node)) - len(weight) + 1
    labels = inputs[0]
    coupling.fix([*labels[:at], *labels[at + 1 :], *weight[2:]], f"{coupling.at(node)} moves a window along it")
    transposed = isinstance(layer, TRANSPOSED)
    source, result = (weight[0], weight[1]) if transposed else (weight[1], weight[0])
    if layer.groups == 1:
        coupling.join(labels[at], source, node)
    else:
        why = f"the groups of {coupling.at(node)} have one width"
        inner = coupling.split(labels[at], (layer.groups, layer.in_channels // layer.groups), why)
        if transposed:
            rows = coupling.split(weight[0], (layer.groups, layer.in_channels // layer.groups), why)
            coupling.join(inner[0], rows[0], node)
            coupling.join(inner[1], rows[1], node)
            coupling.fix([*inner, *rows, weight[1]], f"{coupling.at(node)} is transposed and grouped")
        else:
            outer = coupling.split(weight[0], (layer.groups, layer.out_channels // layer.groups), why)
            coupling.join(inner[0], outer[0], node)
            if source is not None or inner[1] is not None:
                coupling.join(inner[1], source, node)
    if bias is not None:
        coupling.join(result, bias[0], node)
        coupling.written(bias[0])
    coupling.written(result)
    coupling.contracted(source)
    out: Labels = [None] * len(labels)
    out[at] = result if not (transposed and layer.groups > 1) else None
    return out


@couples(nn.Linear)
def linear_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels:
    """Weight [out, in], over the last axis."""
    weight, bias = coupling.own(node, "weight"), coupling.own(node, "bias")
    assert weight is not None
    coupling.join(inputs[0][-1], weight[1], node)
    if bias is not None:
        coupling.join(weight[0], bias[0], node)
        coupling.written(bias[0])
    coupling.written(weight[0])
    coupling.contracted(weight[1])
    return [*inputs[0][:-1], weight[0]]


@couples(nn.Embedding)
def embedding_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels:
    """Weight [entries, width]: the entries stay."""
    weight = coupling.own(node, "weight")
    assert weight is not None
    coupling.fix([weight[0], *inputs[0]], f"{coupling.at(node)} looks its entries up")
    coupling.written(weight[1])
    return [*[None] * len(inputs[0]), weight[1]]


# How they act on what is narrowed.


@rule(*CONVOLUTIONS)
def conv(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """``W x + b``, the constant channels' part going into the bias unless it meets zero padding."""
    layer = build.module(node)
    at = node.meta["val"].ndim - layer.weight.ndim + 1
    value = values[0]
    if isinstance(value, Narrowed) and set(value.kept) != {at}:
        return None
    padded = layer.padding_mode == "zeros" and (isinstance(layer.padding, str) or any(layer.padding))
    if isinstance(value, Narrowed) and not value.background.is_zero and (padded or not uniform_along(value, at)):
        value = build.widen(value, at)
    if layer.groups == 1:
        return _dense(build, node, layer, value, at)
    return _grouped(build, node, layer, value, at)


@rule(*TRANSPOSED)
def conv_transposed(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """Weight [in, out, ...]: channels at zero leave it."""
    layer, value = build.module(node), values[0]
    at = node.meta["val"].ndim - layer.weight.ndim + 1
    if layer.groups > 1 or isinstance(value, Constant) or (isinstance(value, Narrowed) and set(value.kept) != {at}):
        return None
    if isinstance(value, Narrowed) and not value.background.is_zero:
        value = build.widen(value, at)
    if isinstance(value, Narrowed) and build.shared(node):
        value = _as_the_solution_leaves_it(build, node, value, at)
    rows, columns = build.kept(node).get(at), value.kept.get(at) if isinstance(value, Narrowed) else None
    if rows is None and columns is None:
        return None
    box: Kept = ({0: columns} if columns is not None else {}) | ({1: rows} if rows is not None else {})
    narrow = shallow(layer)
    narrow.weight = build.slice(node, "weight", box)
    if rows is not None and layer.bias is not None:
        narrow.bias = build.slice(node, "bias", {0: rows})
    narrow.in_channels, narrow.out_channels = narrow.weight.shape[:2]
    new = build.install(node, narrow, value.node if isinstance(value, Narrowed) else value)
    return new if rows is None else Narrowed(new, {at: rows}, full_shape(node), ZERO)


@rule(nn.Linear)
def linear(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """The same over the last axis; other axes may be narrowed, too."""
    return _dense(build, node, build.module(node), values[0], node.meta["val"].ndim - 1)


@rule(nn.Embedding)
def embedding(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """A narrower table."""
    layer, last = build.module(node), node.meta["val"].ndim - 1
    columns = build.kept(node).get(last)
    (source,) = values
    if columns is None or not isinstance(source, fx.Node) or layer.max_norm is not None:
        return None
    narrow = shallow(layer)
    narrow.weight = build.slice(node, "weight", {1: columns})
    narrow.embedding_dim = len(columns)
    return Narrowed(build.install(node, narrow, source), {last: columns}, full_shape(node), ZERO)


def _dense(build: Build, node: fx.Node, layer: Any, value: Value, at: int) -> Value | None:
    """A layer that mixes all of axis ``at``."""
    if isinstance(value, Constant):
        return None
    rows, shape = build.kept(node).get(at), full_shape(node)
    if isinstance(value, Narrowed) and at in value.kept and build.shared(node):
        value = _as_the_solution_leaves_it(build, node, value, at)
    source = value.node if isinstance(value, Narrowed) else value
    columns = value.kept.get(at) if isinstance(value, Narrowed) else None
    if rows is None and columns is None:
        if not isinstance(value, Narrowed):
            return None
        return Narrowed(build.copy(node, [source]), value.kept, shape, _through(layer, value, node))
    box: Kept = ({0: rows} if rows is not None else {}) | ({1: columns} if columns is not None else {})
    narrow = shallow(layer)
    narrow.weight = build.slice(node, "weight", box)
    if rows is not None and layer.bias is not None:
        narrow.bias = build.slice(node, "bias", {0: rows})
    _set_widths(narrow)
    shift = _shift(layer, value, at, rows) if isinstance(value, Narrowed) and columns is not None else None
    if shift is not None and _fits_bias(shift, at, value) and not build.shared(node):
        narrow.bias = _moved(narrow.bias, shift.evaluated.flatten(), layer)
        shift = None
    new = build.install(node, narrow, source)
    if shift is not None:
        new = build.call(aten.add.Tensor, new, build.constant(shift, node.name))
    others = {d: k for d, k in value.kept.items() if d != at} if isinstance(value, Narrowed) else {}
    kept = others | ({at: rows} if rows is not None else {})
    if not kept:
        return new
    background = _through(layer, value, node) if others and isinstance(value, Narrowed) else ZERO
    return Narrowed(new, kept, shape, background)


def _as_the_solution_leaves_it(build: Build, node: fx.Node, value: Narrowed, at: int) -> "fx.Node | Narrowed":
    """A shared layer is narrowed as the solution says, whatever else is constant here."""
    wanted = build.kept(node.all_input_nodes[0]).get(at)
    if wanted is not None and torch.equal(wanted, value.kept[at]):
        return value
    return build.widen(value, at, wanted)


def _grouped(build: Build, node: fx.Node, layer: Any, value: Value, at: int) -> Value | None:
    """Groups go as a whole, or each loses as many channels as the others."""
    if isinstance(value, Constant):
        return None
    depthwise = layer.groups == layer.in_channels == layer.out_channels
    rows = build.kept(node).get(at)
    if isinstance(value, Narrowed) and (build.shared(node) or not depthwise):
        value = _as_the_solution_leaves_it(build, node, value, at)
    if not isinstance(value, Narrowed):
        return None if rows is None else _narrow_groups(build, node, layer, value, None, rows, at)
    if depthwise:
        rows = value.kept[at] if rows is None else value.kept[at][torch.isin(value.kept[at], rows)]
        if len(rows) < len(value.kept[at]):
            return None
    return _narrow_groups(build, node, layer, value, value.kept[at], rows, at)


def _narrow_groups(
    build: Build, node: fx.Node, layer: Any, value: Value, columns: Tensor | None, rows: Tensor | None, at: int
) -> Value | None:
    wide_in, wide_out = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    columns = torch.arange(layer.in_channels) if columns is None else columns
    rows = torch.arange(layer.out_channels) if rows is None else rows
    groups_in, inside = columns // wide_in, (columns % wide_in)
    groups_out = rows // wide_out
    groups = groups_out.unique()
    counts = [len(columns) / max(len(groups), 1), len(rows) / max(len(groups), 1)]
    columns_of = inside.reshape(len(groups), -1) if counts[0].is_integer() and len(groups) else None
    if not torch.equal(groups_in.unique(), groups) or columns_of is None or not counts[1].is_integer():
        return None
    even = (columns_of == columns_of[:1]).all() and all(c == counts[1] for c in groups_out.bincount()[groups])
    if not even or any(c != counts[0] for c in groups_in.bincount()[groups]):
        return None
    narrow = shallow(layer)
    narrow.weight = build.slice(node, "weight", {0: rows, 1: columns_of[0]})
    if layer.bias is not None:
        narrow.bias = build.slice(node, "bias", {0: rows})
    narrow.groups, narrow.in_channels, narrow.out_channels = len(groups), len(columns), len(rows)
    shift = None
    if isinstance(value, Narrowed) and not value.background.is_zero and columns_of.shape[1] < wide_in:
        shift = _shift(layer, value, at, rows)
    source = value.node if isinstance(value, Narrowed) else value
    assert isinstance(source, fx.Node)
    new = build.install(node, narrow, source)
    if shift is not None:
        new = build.call(aten.add.Tensor, new, build.constant(shift, node.name))
    background = _through(layer, value, node) if isinstance(value, Narrowed) else ZERO
    return Narrowed(new, {at: rows}, full_shape(node), background)


def _through(layer: Any, value: Narrowed, node: fx.Node) -> Constant:
    """What the layer makes of the background."""
    shape = list(value.shape)
    if not isinstance(layer, nn.Linear):
        shape[2:] = [1] * (len(shape) - 2)  # a uniform image without padding

    def apply(background: Tensor) -> Tensor:
        x = background.to(layer.weight).expand(*[1 if i == 0 else n for i, n in enumerate(shape)])
        if isinstance(layer, nn.Linear):
            return layer(x)
        return _without_window(layer, x)

    with torch.no_grad():
        return evaluated(value.background, apply, node.meta["val"].ndim)


def _without_window(layer: Any, x: Tensor) -> Tensor:
    """The convolution of a uniform image, as a 1 x 1 convolution."""
    ones = (1,) * (layer.weight.ndim - 2)
    weight = layer.weight.flatten(2).sum(2).reshape(*layer.weight.shape[:2], *ones)
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[layer.weight.ndim]
    return function(x, weight, layer.bias, groups=layer.groups)


def _shift(layer: Any, value: Narrowed, at: int, rows: Tensor | None) -> Constant | None:
    """What the constants of axis ``at`` add to the result on the box; None if nothing."""
    if value.background.is_zero:
        return None
    others = {d: k for d, k in value.kept.items() if d != at}
    ndim = len(value.shape)
    constants = within(value.background, others, ndim)

    def apply(background: Tensor) -> Tensor:
        x = background.reshape((1,) * (ndim - background.ndim) + tuple(background.shape))
        x = x.expand(*[value.shape[d] if d == at else n for d, n in enumerate(x.shape)]).clone()
        x.index_fill_(at, value.kept[at].to(x.device), 0.0)
        x = x.to(layer.weight)
        if isinstance(layer, nn.Linear):
            return F.linear(x, layer.weight)
        return _without_window(_Unbiased(layer), x)

    with torch.no_grad():
        shift = both(constants, apply)
    shift = shift if rows is None else part(shift, at, rows, ndim)
    return None if shift.is_zero else shift


class _Unbiased:
    """The weight of a convolution and its groups."""

    def __init__(self, layer: Any):
        self.weight, self.groups, self.bias = layer.weight, layer.groups, None


def _fits_bias(shift: Constant, at: int, value: Value) -> bool:
    tensor = shift.evaluated
    uniform = tensor.ndim > 0 and tensor.numel() == tensor.shape[at - (len(value.shape) - tensor.ndim)]  # type: ignore[union-attr]
    return shift.alike and uniform


def _moved(bias: Tensor | None, shift: Tensor, layer: Any) -> nn.Parameter:
    frozen = layer.bias is None or not layer.bias.requires_grad
    return nn.Parameter((shift if bias is None else bias + shift).detach().clone(), requires_grad=not frozen)


def _set_widths(layer: Any) -> None:
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    else:
        layer.out_channels, layer.in_channels = layer.weight.shape[:2]
