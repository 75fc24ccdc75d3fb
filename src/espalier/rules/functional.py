"""Functional layers whose parameters the model passes itself."""

from typing import Any

import torch
from torch import Tensor, fx

from espalier.graph.axes import Coupling, Labels, couples
from espalier.graph.constants import Constant, hint
from espalier.graph.lift import is_tensor
from espalier.rules.norm import as_the_solution_leaves
from espalier.rules.reduction import zero_at
from espalier.rules.value import ZERO, Build, Narrowed, Value, full_shape, rule, tensors_of

aten = torch.ops.aten
CONVOLUTIONS = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
    aten.conv3d.padding,
)  # fmt: skip
CREATED = (
    aten.zeros.default, aten.ones.default, aten.full.default, aten.zeros_like.default, aten.ones_like.default,
    aten.full_like.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default,
    aten.empty.memory_format, aten.new_empty.default,
)  # fmt: skip


@couples(*CREATED)
def created_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels:
    """A constant tensor takes any width."""
    if "like" in str(node.target) and inputs:
        return inputs[0]
    return [coupling.fresh(n) for n in coupling.shape(node)]


@couples(*CONVOLUTIONS)
def conv_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels | None:
    """One group, or one channel each."""
    labels, weight, *bias = inputs
    groups = _groups(node)
    at = len(labels) - len(weight) + 1
    if groups > 1 and (weight[1] is not None or groups != coupling.shape(node)[at]):
        return None
    coupling.fix([*labels[:at], *labels[at + 1 :], *weight[2:]], f"{coupling.at(node)} moves a window along it")
    if groups == 1:
        coupling.join(labels[at], weight[1], node)
        coupling.contracted(weight[1])
    else:
        coupling.join(labels[at], weight[0], node)
    if bias:
        coupling.join(weight[0], bias[0][0], node)
        coupling.written(bias[0][0])
    coupling.written(weight[0])
    out: Labels = [None] * len(labels)
    out[at] = weight[0]
    return out


def _groups(node: fx.Node) -> int:
    args: Any = node.args
    return int(args[6]) if len(args) > 6 else int(node.kwargs.get("groups", 1))  # type: ignore[call-overload]


@couples(aten.embedding.default)
def embedding_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels:
    """Table [entries, width]: the entries stay."""
    weight, ids = inputs
    coupling.fix([weight[0], *ids], f"{coupling.at(node)} looks its entries up")
    coupling.written(weight[1])
    return [*[None] * len(ids), weight[1]]


@couples(aten.layer_norm.default, aten.rms_norm.default)
def last_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels:
    """Statistics over the last axes."""
    labels, *affine = (list(each) for each in inputs)
    first = len(labels) - len(node.args[1])  # type: ignore[arg-type]
    coupling.statistic(node, *range(first, len(labels)))
    return _joined(coupling, node, labels, affine, first)


@couples(aten.group_norm.default)
def group_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels:
    """Statistics over each group of channels."""
    labels, *affine = (list(each) for each in inputs)
    coupling.fix(labels[2:], f"{coupling.at(node)} averages over it")
    groups = int(node.args[1])  # type: ignore[call-overload]
    if labels[1] is not None:
        coupling.split(
            labels[1], (groups, len(labels[1]) // groups), f"the groups of {coupling.at(node)} have one width"
        )
    coupling.statistic(node, 1)
    return _joined(coupling, node, [labels[0], labels[1], *[None] * (len(labels) - 2)], affine, 1)


@couples(aten.batch_norm.default, aten.instance_norm.default)
def channel_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels:
    """Each channel alone."""
    labels, *affine = (list(each) for each in inputs)
    coupling.fix([labels[0], *labels[2:]], f"{coupling.at(node)} averages over it")
    return _joined(coupling, node, [None, labels[1], *[None] * (len(labels) - 2)], affine, 1)


def _joined(coupling: Coupling, node: fx.Node, labels: Labels, affine: list[Labels], first: int) -> Labels:
    for own in affine:
        for k, axis in enumerate(own):
            if axis is not None or labels[first + k] is not None:
                labels[first + k] = coupling.join(labels[first + k], axis, node)
            coupling.written(axis)
    return labels


@rule(*CREATED)
def created(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """As wide as the solution leaves it."""
    kept, args = build.kept(node), list(node.args)
    if "like" in str(node.target):
        return _created_like(build, node, values)
    if not kept:
        return build.copy(node, [_any_width(build, v) for v in values])
    place = 1 if "new_" in str(node.target) else 0
    sizes: list[Any] = list(args[place])  # type: ignore[arg-type]
    if any(isinstance(sizes[d], fx.Node) for d in kept):
        return None
    new = build.copy(node, [_any_width(build, v) for v in values])
    sizes = list(new.args[place])  # type: ignore[arg-type]
    for dim, index in kept.items():
        sizes[dim] = len(index)
    new.args = (*new.args[:place], sizes, *new.args[place + 1 :])
    return Narrowed(new, kept, full_shape(node), _filling(node))


def _any_width(build: Build, value: Value) -> fx.Node:
    """A tensor of which only type and device are read."""
    if isinstance(value, Constant):
        return build.constant(value, "like")
    return value.node if isinstance(value, Narrowed) else value


def _created_like(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    if not values or not isinstance(values[0], Narrowed):
        return None
    return Narrowed(build.copy(node, [values[0].node]), values[0].kept, values[0].shape, _filling(node))


def _filling(node: fx.Node) -> Constant:
    name = str(node.target)
    if "zeros" in name or "empty" in name:
        return ZERO
    value = torch.ones(()) if "ones" in name else torch.tensor(hint(node.args[-1] if "full" in name else 1.0))
    value = value.to(node.meta["val"].dtype)
    return Constant(value, value)


@rule(*CONVOLUTIONS)
def conv(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """Where what is gone of the input is zero."""
    value, weight, *bias = values
    at = node.meta["val"].ndim - len(full_shape(node.all_input_nodes[1])) + 1
    if any(isinstance(v, Constant) for v in values) or isinstance(weight, Constant):
        return None
    rows = weight.kept.get(0) if isinstance(weight, Narrowed) else None
    columns = weight.kept.get(1) if isinstance(weight, Narrowed) else None
    mine = value.kept if isinstance(value, Narrowed) else {}
    depthwise = _groups(node) > 1
    wanted = rows if depthwise else columns
    if (
        (set(mine) - {at})
        or (wanted is None) != (at not in mine)
        or (bias and _rows(bias[0], 0) is not _same(rows, bias[0]))
    ):
        return None
    if wanted is not None and (not torch.equal(mine[at], wanted) or not zero_at(value, at)):
        return None
    new = build.copy(node, [v.node if isinstance(v, Narrowed) else v for v in values])  # type: ignore[union-attr,misc]
    if depthwise and rows is not None:
        new.args = (*new.args[:6], len(rows), *new.args[7:])
    return Narrowed(new, {at: rows}, full_shape(node), ZERO) if rows is not None else new


def _rows(value: Value, dim: int) -> Tensor | None:
    return value.kept.get(dim) if isinstance(value, Narrowed) else None


def _same(rows: Tensor | None, value: Value) -> Tensor | None:
    """The value's own indices if they equal ``rows``."""
    own = _rows(value, 0)
    return own if (own is None) == (rows is None) and (own is None or torch.equal(own, rows)) else torch.empty(0)  # type: ignore[arg-type]


@rule(aten.embedding.default)
def embedding(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """A narrower table."""
    table, ids = values
    if (
        not isinstance(table, Narrowed)
        or set(table.kept) != {1}
        or not isinstance(ids, fx.Node)
        or not zero_at(table, 1)
    ):
        return None
    last = node.meta["val"].ndim - 1
    return Narrowed(build.copy(node, [table.node, ids]), {last: table.kept[1]}, full_shape(node), ZERO)


@rule(aten.layer_norm.default, aten.rms_norm.default)
def over_last_axes(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """Statistics over what the solution leaves."""
    sources = [n for n in tensors_of(node) if is_tensor(n)]
    if any(isinstance(v, Constant) for v in values) or len(sources) != len(values):
        return None
    ndim = node.meta["val"].ndim
    first = ndim - len(node.args[1])  # type: ignore[arg-type]
    value = as_the_solution_leaves(build, node, values[0], range(first, ndim))
    if not isinstance(value, Narrowed):
        return None
    box = {d: k for d, k in value.kept.items() if d >= first}
    if any(d < first for d in value.kept) or not _affine_fits(values[1:], box, first):
        return None
    new = build.copy(node, [value.node, *[v.node if isinstance(v, Narrowed) else v for v in values[1:]]])  # type: ignore[union-attr,misc]
    sizes = list(node.args[1])  # type: ignore[arg-type]
    for d, k in box.items():
        sizes[d - first] = len(k)
    new.args = (new.args[0], sizes, *new.args[2:])
    return Narrowed(new, box, value.shape, ZERO)


def _affine_fits(values: list[Value], box: dict[int, Tensor], first: int) -> bool:
    for value in values:
        own = {d + first: k for d, k in value.kept.items()} if isinstance(value, Narrowed) else {}
        if own.keys() != box.keys() or any(not torch.equal(own[d], box[d]) for d in own):
            return False
    return True


@rule(aten.group_norm.default)
def over_groups(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """Whole groups gone, or the same channels of each."""
    if any(isinstance(v, Constant) for v in values):
        return None
    value = as_the_solution_leaves(build, node, values[0], (1,))
    if not isinstance(value, Narrowed) or set(value.kept) != {1} or not _affine_fits(values[1:], {1: value.kept[1]}, 1):
        return None
    groups = int(node.args[1])  # type: ignore[call-overload]
    counts = (value.kept[1] // (value.shape[1] // groups)).bincount(minlength=groups)
    counts = counts[counts > 0]
    if (counts != counts[0]).any():
        return None
    new = build.copy(node, [value.node, *[v.node if isinstance(v, Narrowed) else v for v in values[1:]]])  # type: ignore[union-attr,misc]
    new.args = (new.args[0], len(counts), *new.args[2:])
    return Narrowed(new, value.kept, value.shape, ZERO)


@rule(aten.batch_norm.default, aten.instance_norm.default)
def per_channel(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """Channels with their scale, shift and running averages."""
    value = values[0]
    boxes = [v.kept for v in values if isinstance(v, Narrowed)]
    if not isinstance(value, Narrowed) or set(value.kept) != {1} or len(boxes) != len(values):
        return None
    if any(not torch.equal(next(iter(b.values())), value.kept[1]) for b in boxes):
        return None
    if len(values) == 1:  # neither scale nor running averages: a channel of zeros stays zero
        zero = zero_at(value, 1)
    else:
        scale = values[1]
        zero = isinstance(scale, Narrowed) and zero_at(scale, 0) and all(zero_at(v, 0) for v in values[2:3])
    if not zero:
        return None
    new = build.copy(node, [v.node for v in values if isinstance(v, Narrowed)])
    return Narrowed(new, value.kept, value.shape, ZERO)
