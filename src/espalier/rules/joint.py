"""Joint vertices: what is left of a sum, a product or a concatenation when some of its inputs are constants."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from espalier.graph.axes import Coupling, Labels, couples
from espalier.rules.elementwise import function as pointwise
from espalier.rules.value import Build, Constant, Kept, Narrowed, Value, both2, full_shape, rule

aten = torch.ops.aten
CONCATENATIONS = (aten.cat.default, aten.concat.default, aten.concatenate.default)


@rule(aten.add.Tensor)
def add(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """``a + alpha b``: a zero term vanishes, another constant is added."""
    alpha: Any = node.kwargs.get("alpha", 1)
    if len(values) == 2:
        a, b = values
        if isinstance(a, Constant) and isinstance(b, Constant):
            return both2(a, b, lambda x, y: torch.add(x, y, alpha=alpha))
        if isinstance(b, Constant) and b.is_zero and _is_result(node, a):
            return a
        if isinstance(a, Constant) and a.is_zero and alpha == 1 and _is_result(node, b):
            return b
    return pointwise(build, node, values) or _spread(build, node, values)


@rule(aten.mul.Tensor)
def mul(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """``a b``: a factor of one vanishes, another constant is multiplied."""
    if len(values) == 2:
        a, b = values
        if isinstance(a, Constant) and isinstance(b, Constant):
            return both2(a, b, torch.mul)
        for one, other in ((a, b), (b, a)):
            if isinstance(one, Constant) and _is_one(one) and _is_result(node, other):
                return other
    return pointwise(build, node, values) or _spread(build, node, values)


def _is_one(value: Constant) -> bool:
    return bool((value.evaluated == 1).all() and (value.trained == 1).all())


def _is_result(node: fx.Node, value: Value) -> bool:
    """Whether the value has the result's shape and type."""
    if isinstance(value, Constant):
        return False
    wanted, val = node.meta["val"], (value.node if isinstance(value, Narrowed) else value).meta["val"]
    shape = str(value.shape if isinstance(value, Narrowed) else tuple(val.shape))
    return val.dtype == wanted.dtype and shape == str(
        full_shape(node) if isinstance(value, Narrowed) else tuple(wanted.shape)
    )


def _spread(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """A tensor and a constant that has the larger shape: spread the tensor first."""
    whole = [i for i, v in enumerate(values) if isinstance(v, fx.Node)]
    if len(values) != 2 or len(whole) != 1 or not isinstance(values[1 - whole[0]], Constant):
        return None
    tensor, constant = values[whole[0]], values[1 - whole[0]]
    assert isinstance(tensor, fx.Node)
    assert isinstance(constant, Constant)
    wanted = node.meta["val"]
    if str(tuple(tensor.meta["val"].shape)) != str(tuple(wanted.shape)):
        sizes = _sizes(tensor, wanted)
        if sizes is None:
            return None
        tensor = build.call(aten.expand.default, tensor, sizes)
    if tensor.meta["val"].dtype != wanted.dtype:
        tensor = build.call(aten.to.dtype, tensor, wanted.dtype)
    inputs = [tensor, build.constant(constant, node.name)]
    return build.copy(node, inputs if whole[0] == 0 else inputs[::-1])


def _sizes(a: fx.Node, wanted: torch.Tensor) -> list[object] | None:
    """``wanted``'s shape for an expand of ``a``: sizes of the batch are read off ``a``."""
    shape = a.meta["val"].shape
    lead = len(wanted.shape) - len(shape)
    sizes: list[object] = []
    for i, size in enumerate(wanted.shape):
        if i >= lead and str(shape[i - lead]) == str(size):
            sizes.append(-1)
        elif isinstance(size, int):
            sizes.append(size)
        else:
            return None
    return sizes


def _dim(node: fx.Node) -> int:
    """The axis along which a concatenation or a stack joins."""
    args: Any = node.args
    dim: Any = args[1] if len(args) > 1 else node.kwargs.get("dim", 0)
    return int(dim) % node.meta["val"].ndim


@couples(*CONCATENATIONS)
def cat_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels:
    """The joined axis is one after the other; the others are one."""
    dim, result = _dim(node), list(inputs[0])
    sources: Any = node.args[0]
    for k in range(len(result)):
        if k == dim:
            continue
        for labels in inputs[1:]:
            if result[k] is not None or labels[k] is not None:
                result[k] = coupling.join(result[k], labels[k], node)
    if all(labels[dim] is None for labels in inputs):
        result[dim] = None
        return result
    parts = []
    for source, labels in zip(sources, inputs, strict=True):
        axis = labels[dim]
        if axis is None:
            axis = coupling.atoms.fresh(coupling.shape(source)[dim])
            coupling.fix([axis], f"part of what {coupling.at(node)} joins stays whole")
        parts.append(axis)
    result[dim] = np.concatenate(parts)
    return result


@couples(aten.stack.default)
def stack_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels:
    """A new axis, which stays; the others are one."""
    result = list(inputs[0])
    for labels in inputs[1:]:
        for k, axis in enumerate(labels):
            if result[k] is not None or axis is not None:
                result[k] = coupling.join(result[k], axis, node)
    result.insert(_dim(node), None)
    return result


@rule(*CONCATENATIONS)
def cat(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """Constants leave the concatenation; what reads it is narrowed to the rest."""
    sources: Any = node.args[0]
    return _joined(build, node, values, _dim(node), [full_shape(n) for n in sources])


@rule(aten.stack.default)
def stack(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """As a concatenation along a new axis."""
    dim, wide = _dim(node), full_shape(node)
    shape = (*wide[:dim], 1, *wide[dim + 1 :])
    lifted: list[Value] = []
    for value in values:
        if isinstance(value, Constant):
            rank = len(wide) - 1
            lifted.append(Constant(*[_ranked(t, rank).unsqueeze(dim) for t in (value.evaluated, value.trained)]))
            continue
        old = value.node if isinstance(value, Narrowed) else value
        new = build.call(aten.unsqueeze.default, old, dim)
        if isinstance(value, Narrowed):
            background = Constant(
                *[
                    t if t.ndim == 0 else _ranked(t, len(wide) - 1).unsqueeze(dim)
                    for t in (value.background.evaluated, value.background.trained)
                ]
            )
            lifted.append(Narrowed(new, {d + (d >= dim): k for d, k in value.kept.items()}, shape, background))
        else:
            lifted.append(new)
    return _joined(build, node, lifted, dim, [shape] * len(values))


def _joined(build: Build, node: fx.Node, values: list[Value], dim: int, shapes: list[tuple[int, ...]]) -> Value | None:
    wanted, wide = build.kept(node), full_shape(node)
    values = [_alike_elsewhere(build, v, values, dim, wanted) for v in values]
    pieces = [v.node if isinstance(v, Narrowed) else v for v in values if not isinstance(v, Constant)]
    if not pieces:
        return None
    box: Kept = {}
    kept, offset = [], 0
    for value, shape in zip(values, shapes, strict=True):
        if isinstance(value, Narrowed):
            box |= {d: k for d, k in value.kept.items() if d != dim}
        if not isinstance(value, Constant):
            own = value.kept.get(dim) if isinstance(value, Narrowed) else None
            kept.append((torch.arange(shape[dim]) if own is None else own) + offset)
        offset += shape[dim]
    index = torch.cat(kept)
    if len(index) < offset:
        box[dim] = index
    new = pieces[0] if len(pieces) == 1 else build.call(aten.cat.default, pieces, dim)
    if not box:
        return new
    return Narrowed(new, box, wide, _joined_background(values, shapes, dim))


def _alike_elsewhere(build: Build, value: Value, values: list[Value], dim: int, wanted: Kept) -> Value:
    """Widen a piece along the other axes, unless all pieces are computed on the same indices."""
    if not isinstance(value, Narrowed):
        return value
    others = [v for v in values if not isinstance(v, Constant)]
    for d in list(value.kept):
        if d == dim or not isinstance(value, Narrowed):
            continue
        alike = all(isinstance(o, Narrowed) and d in o.kept and torch.equal(o.kept[d], value.kept[d]) for o in others)
        if not alike:
            whole = any(not isinstance(o, Narrowed) or d not in o.kept for o in others)
            value = build.widen(value, d, None if whole else wanted.get(d))
    return value


def _joined_background(values: list[Value], shapes: list[tuple[int, ...]], dim: int) -> Constant:
    modes = []
    for mode in ("evaluated", "trained"):
        parts: list[Tensor] = []
        for value, shape in zip(values, shapes, strict=True):
            if isinstance(value, fx.Node):
                tensor = torch.zeros(())
            else:
                tensor = getattr(value.background if isinstance(value, Narrowed) else value, mode)
            tensor = _ranked(tensor, len(shape))
            parts.append(tensor.expand(*[shape[d] if d == dim else n for d, n in enumerate(tensor.shape)]))
        common = torch.broadcast_shapes(*[[1 if d == dim else n for d, n in enumerate(p.shape)] for p in parts])
        dtype = torch.promote_types(parts[0].dtype, parts[-1].dtype)
        for part in parts:
            dtype = torch.promote_types(dtype, part.dtype)
        parts = [p.to(dtype).expand(*[p.shape[d] if d == dim else n for d, n in enumerate(common)]) for p in parts]
        modes.append(torch.cat(parts, dim))
    return Constant(*modes)


def _ranked(tensor: Tensor, ndim: int) -> Tensor:
    return tensor.reshape((1,) * (ndim - tensor.ndim) + tuple(tensor.shape))
