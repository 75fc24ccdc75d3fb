"""Operators that move data.

Where each index goes is not written down per operator: the operator is run on index labels, and the labels are
read off its result. So is the narrowed operator, whose labels must be those of the box that stays.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from espalier.graph.axes import Coupling, Labels, couples, numbers
from espalier.graph.constants import hint
from espalier.graph.lift import is_tensor
from espalier.graph.movement import labelled
from espalier.rules.value import Build, Kept, Narrowed, Value, evaluated, rule

aten = torch.ops.aten

SIZED = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default)
SPLITS = (
    aten.split.Tensor, aten.split.default, aten.split_with_sizes.default, aten.chunk.default,
    aten.tensor_split.sections, aten.tensor_split.indices, aten.split.sizes, aten.unbind.int,
)  # fmt: skip
MOVES = (
    *SIZED, aten.unflatten.int, aten.flatten.using_ints, aten.permute.default, aten.transpose.int, aten.t.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.movedim.int,
    aten.movedim.intlist, aten.swapaxes.default, aten.slice.Tensor, aten.select.int, aten.narrow.default,
    aten.roll.default, aten.flip.default, aten.pixel_shuffle.default, aten.pixel_unshuffle.default,
    aten.repeat.default, aten.repeat_interleave.self_int, aten.expand_as.default, aten.view_as.default,
    aten.reshape_as.default, aten.channel_shuffle.default, aten.unfold.default, aten.tile.default,
    aten.numpy_T.default, aten.mT.default,
    nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
)  # fmt: skip


@couples(*MOVES)
def moved_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels | None:
    """By index labels."""
    function = _function(coupling, node)
    return coupling.moved(node, inputs[0], function)[0]


@couples(*SPLITS)
def split_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> list[Labels]:
    """By index labels, several results."""
    return coupling.moved(node, inputs[0], _function(coupling, node))


@couples(aten.index.Tensor, aten.index_select.default)
def indexed_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels | None:
    """Constant indices move data. Others pick along axes that stay; the axes beside them pass."""
    labels = inputs[0]
    if node.target is aten.index_select.default:
        at: Any = int(node.args[1]) % len(labels)  # type: ignore[call-overload]
        coupling.fix([labels[at]], f"{coupling.at(node)} picks along it")
        return [*labels[:at], None, *labels[at + 1 :]]
    indices: Any = node.args[1]
    used = [i for i, index in enumerate(indices) if index is not None]
    if used != list(range(used[0], used[-1] + 1)):
        return None
    coupling.fix(labels[used[0] : used[-1] + 1], f"{coupling.at(node)} picks along it")
    made = len(coupling.shape(node)) - (len(labels) - len(used))
    return [*labels[: used[0]], *[None] * made, *labels[used[-1] + 1 :]]


@couples(aten.cumsum.default, aten.argsort.default)
def along_axis(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels | None:
    """Work along one axis, which stays."""
    if isinstance(node.meta["val"], (tuple, list)):
        return None
    args, _ = numbers(node)
    dims = args[0] if args and isinstance(args[0], (list, tuple)) else [args[0] if args else -1]
    labels = list(inputs[0])
    for dim in dims:
        coupling.fix([labels[dim]], f"{coupling.at(node)} works along it")
        labels[dim] = None
    return labels


def _function(coupling: Any, node: fx.Node) -> Any:
    if node.op == "call_module":
        return coupling.module(node)
    args, kwargs = _evaluable(node)
    return lambda t: node.target(t, *args, **kwargs)  # type: ignore[operator]


def _evaluable(node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    def value(n: fx.Node) -> Any:
        val = n.meta.get("val")
        return torch.empty([int(hint(s)) for s in val.shape]) if isinstance(val, Tensor) else hint(val)  # type: ignore[call-overload]

    return fx.map_arg((list(node.args[1:]), dict(node.kwargs)), value)


@rule(*MOVES)
def move(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """The same operator on the box, its literal sizes narrowed; what it does is checked on labels."""
    value = values[0]
    if not isinstance(value, Narrowed) or any(is_tensor(n) for n in node.all_input_nodes[1:]):
        return None
    full = _function(build, node)(labelled(value.shape))
    kept = _box_of(full, value)
    if kept is None:
        return None
    target = full
    for dim, index in kept.items():
        target = target.index_select(dim, index)
    for args in _candidates(node, value, kept, target.ndim):
        if _does(build, node, args, value, target):
            new = build.copy(node, [value.node, *[v for v in values[1:] if isinstance(v, fx.Node)]])
            if args is not None:
                new.args = (new.args[0], *_with_nodes(args, new.args[1:]))
            return _moved(build, node, value, new, kept, full)
    return _picked(build, node, value, kept, full, target)


@rule(*SPLITS)
def split(build: Build, node: fx.Node, values: list[Value]) -> Any:
    """Each piece, as narrow as its share of the box."""
    value = values[0]
    if not isinstance(value, Narrowed):
        return None
    pieces = _function(build, node)(labelled(value.shape))
    boxes = [_box_of(piece, value) for piece in pieces]
    if any(box is None or any(len(k) == 0 for k in box.values()) for box in boxes):
        return None
    args, kwargs = _evaluable(node)
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if node.target is aten.unbind.int:
        dim = args[0] if args else 0
    dim %= len(value.shape)
    if dim in value.kept:
        if node.target is aten.unbind.int:
            return None
        sizes = [len(box[dim]) if dim in box else piece.shape[dim] for box, piece in zip(boxes, pieces, strict=True)]  # type: ignore[index,operator]
        new = build.call(aten.split_with_sizes.default, value.node, sizes, dim, val=node.meta["val"])
    else:
        new = build.copy(node, [value.node])
    results: list[Value] = []
    for i, (piece, box) in enumerate(zip(pieces, boxes, strict=True)):
        part = build.call(operator.getitem, new, i, val=node.meta["val"][i])
        assert box is not None
        results.append(_as_value(build, node, value, part, box, piece) if box else part)
    return results


def _box_of(labels: Tensor, value: Narrowed) -> Kept | None:
    """What of the result comes from the box, if that is a box again: axis → indices, for narrowed axes."""
    inside = torch.ones(value.shape, dtype=torch.bool)
    for dim in value.kept:
        shape = [1] * len(value.shape)
        shape[dim] = -1
        mask = torch.zeros(value.shape[dim], dtype=torch.bool)
        mask[value.kept[dim]] = True
        inside &= mask.view(shape)
    here = inside.flatten()[labels]
    kept: Kept = {}
    box = torch.ones((), dtype=torch.bool)
    for dim in range(here.ndim):
        along = here.movedim(dim, 0).flatten(1).any(1) if here.ndim > 1 else here
        shape = [1] * here.ndim
        shape[dim] = -1
        box = box & along.view(shape)
        if not along.all():
            kept[dim] = along.nonzero().flatten()
    return kept if torch.equal(box.expand_as(here), here) else None


def _candidates(node: fx.Node, value: Narrowed, kept: Kept, ndim: int) -> list[list[Any] | None]:
    """Arguments behind the tensor that may do on the box what the node does; None stands for its own."""
    args = list(node.args[1:])
    if node.target in SIZED or node.target is aten.unflatten.int:
        place, first = (1, int(args[0]) % len(value.shape)) if node.target is aten.unflatten.int else (0, 0)  # type: ignore[call-overload]
        sizes = list(args[place])  # type: ignore[arg-type]
        for dim, index in kept.items():
            if 0 <= dim - first < len(sizes) and isinstance(sizes[dim - first], int) and sizes[dim - first] != -1:
                sizes[dim - first] = len(index)
        args[place] = sizes
        return [args, None]
    if node.target is aten.slice.Tensor and (dim := int(args[0]) % len(value.shape)) in value.kept:  # type: ignore[call-overload]
        start, end = (hint(a.meta["val"]) if isinstance(a, fx.Node) else a for a in (*args[1:3], None, None)[:2])
        picked = torch.arange(value.shape[dim])[slice(start, end)]
        there = torch.isin(value.kept[dim], picked).nonzero().flatten()
        if len(there):
            return [[dim, int(there[0]), int(there[-1]) + 1, *args[3:]]]
    return [None]


def _does(build: Build, node: fx.Node, args: list[Any] | None, value: Narrowed, target: Tensor) -> bool:
    """Whether the operator with these arguments takes the box of labels to ``target``."""
    box = labelled(value.shape)
    for dim, index in value.kept.items():
        box = box.index_select(dim, index)
    try:
        if node.op == "call_module":
            made = build.module(node)(box)
        else:
            own, kwargs = _evaluable(node)
            if args is not None:
                own = list(fx.map_arg(args, _number))
            made = node.target(box, *own, **kwargs)  # type: ignore[operator]
    except (RuntimeError, IndexError, ValueError):
        return False
    return torch.equal(made, target)


def _number(node: fx.Node) -> Any:
    return hint(node.meta.get("val"))


def _with_nodes(args: Sequence[Any], copied: Sequence[Any]) -> list[Any]:
    """``args`` with the old graph's nodes replaced by those that stand at the same place in ``copied``."""
    result: list[Any] = []
    for mine, theirs in zip(args, [*copied, *[None] * (len(args) - len(copied))], strict=True):
        if isinstance(mine, fx.Node):
            result.append(theirs)
        elif isinstance(mine, list):
            pairs = zip(mine, theirs or [], strict=True)
            result.append([t if isinstance(m, fx.Node) else m for m, t in pairs])
        else:
            result.append(mine)
    return result


def _picked(build: Build, node: fx.Node, value: Narrowed, kept: Kept, full: Tensor, target: Tensor) -> Value | None:
    """Along one axis, any rearrangement is an ``index_select``."""
    if full.ndim != len(value.shape) or len(kept) != 1 or kept.keys() != value.kept.keys():
        return None
    ((dim, _),) = kept.items()
    if not target.shape[dim]:
        return None
    stride = labelled(value.shape).stride(dim)
    old = _line(target, dim) // stride % value.shape[dim]
    order = torch.searchsorted(value.kept[dim], old)
    box = labelled(value.shape).index_select(dim, value.kept[dim])
    if int(order.max()) >= box.shape[dim] or not torch.equal(box.index_select(dim, order), target):
        return None
    index = build.attribute(f"{node.name}_order", order)  # type: ignore[attr-defined]
    new = build.call(aten.index_select.default, value.node, dim, index)
    return _moved(build, node, value, new, kept, full)


def _line(tensor: Tensor, dim: int) -> Tensor:
    return tensor.movedim(dim, 0).flatten(1)[:, 0].contiguous() if tensor.ndim > 1 else tensor


def _moved(build: Build, node: fx.Node, value: Narrowed, new: fx.Node, kept: Kept, full: Tensor) -> Value:
    return _as_value(build, node, value, new, kept, full) if kept else new


def _as_value(build: Build, node: fx.Node, value: Narrowed, new: fx.Node, kept: Kept, labels: Tensor) -> Narrowed:
    def background(tensor: Tensor) -> Tensor:
        return tensor.expand(value.shape).flatten()[labels]

    if value.background.is_zero:
        return Narrowed(new, kept, tuple(labels.shape), value.background)
    return Narrowed(new, kept, tuple(labels.shape), evaluated(value.background, background, labels.ndim))
