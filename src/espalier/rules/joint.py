"""Joint vertices: what is left of a sum, a product or a concatenation when some of its inputs are constants."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from espalier.graph.constants import shape_of
from espalier.rules.elementwise import function as elementwise
from espalier.rules.value import Build, Constant, Narrowed, Value, along, both, both2, rule

aten = torch.ops.aten


@rule(aten.add.Tensor)
def add(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """``a + alpha b``: a zero term vanishes, another constant is added."""
    if len(values) == 1:
        return elementwise(build, node, values)
    a, b = values
    alpha: Any = node.kwargs.get("alpha", 1)
    if alpha != 1:
        scaled = both(b, lambda t: t * alpha) if isinstance(b, Constant) else None
        if scaled is None:
            if not isinstance(a, Constant) or not isinstance(b, fx.Node):
                return None
            b = build.call(aten.mul.Tensor, b, alpha, val=b.meta["val"])
        else:
            b = scaled
    return _pointwise(build, node, a, b, aten.add.Tensor, torch.add, neutral=0.0)


@rule(aten.mul.Tensor)
def mul(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """``a b``: a factor of one vanishes, another constant is multiplied."""
    if len(values) == 1:
        return elementwise(build, node, values)
    a, b = values
    if isinstance(a, Narrowed) and isinstance(b, fx.Node) and _ndim(b) == 0 and a.fill.is_zero:
        return Narrowed(build.call(aten.mul.Tensor, a.node, b), a.dim, a.kept, a.total, a.fill)  # a trainable scalar
    return _pointwise(build, node, a, b, aten.mul.Tensor, torch.mul, neutral=1.0)


def _pointwise(
    build: Build,
    node: fx.Node,
    a: Value,
    b: Value,
    operator: Callable[..., object],
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    neutral: float,
) -> Value | None:
    if isinstance(a, Constant) and isinstance(b, Constant):
        return both2(a, b, function)
    if isinstance(a, Constant):
        a, b = b, a
    if isinstance(a, Narrowed) and isinstance(b, Narrowed):
        if not a.same_axis(b) or _ndim(a.node) != _ndim(b.node):
            return None
        return Narrowed(build.call(operator, a.node, b.node), a.dim, a.kept, a.total, both2(a.fill, b.fill, function))
    if not isinstance(b, Constant):
        return None
    if isinstance(a, Narrowed):
        vector = along(b, a.dim, a.total, _ndim(a.node))
        if vector is None or _ndim(node) != _ndim(a.node):
            return None
        kept, gone = both(vector, lambda t: t[a.kept]), both(vector, lambda t: t[a.gone])
        shape = [1] * _ndim(a.node)
        shape[a.dim] = -1
        new = _apply(build, a.node, both(kept, lambda t: t.reshape(shape)), operator, neutral, node.name)
        return Narrowed(new, a.dim, a.kept, a.total, both2(a.fill, gone, function))
    assert isinstance(a, fx.Node)
    wanted = node.meta["val"]
    if str(tuple(a.meta["val"].shape)) != str(tuple(wanted.shape)):
        sizes = _sizes(build, a, wanted)
        if sizes is None:
            return None
        a = build.call(aten.expand.default, a, sizes)
    if a.meta["val"].dtype != wanted.dtype:
        a = build.call(aten.to.dtype, a, wanted.dtype)
    return _apply(build, a, b, operator, neutral, node.name)


def _apply(
    build: Build, a: fx.Node, b: Constant, operator: Callable[..., object], neutral: float, name: str
) -> fx.Node:
    if (b.evaluated == neutral).all() and (b.trained == neutral).all():
        return a
    return build.call(operator, a, build.constant(b, name))


def _sizes(build: Build, a: fx.Node, wanted: torch.Tensor) -> list[object] | None:
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


def _ndim(node: fx.Node) -> int:
    return node.meta["val"].ndim


def _dim(node: fx.Node) -> int:
    """The axis along which a concatenation or a stack joins."""
    args: Any = node.args
    dim: Any = args[1] if len(args) > 1 else node.kwargs.get("dim", 0)
    return int(dim) % _ndim(node)


@rule(aten.cat.default, aten.concat.default, aten.concatenate.default)
def cat(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """Constants leave the concatenation; what reads it is narrowed to the rest."""
    ndim, dim = _ndim(node), _dim(node)
    sources: Any = node.args[0]
    pieces: list[fx.Node] = []
    kept: list[torch.Tensor] = []
    fill: list[Constant] = []
    offset = 0
    for source, value in zip(sources, values, strict=True):
        size = shape_of(source.meta["val"])[dim]
        if isinstance(value, Constant):
            vector = along(value, dim, size, ndim)
            if vector is None:
                return None
            fill.append(vector)
        elif isinstance(value, Narrowed):
            if value.dim != dim:
                return None
            pieces.append(value.node)
            kept.append(value.kept + offset)
            fill.append(value.fill)
        else:
            pieces.append(value)
            kept.append(torch.arange(offset, offset + size))
        offset += size
    if not pieces:
        return None
    new = pieces[0] if len(pieces) == 1 else build.call(node.target, pieces, dim)  # type: ignore[arg-type]
    joined = Constant(torch.cat([f.evaluated for f in fill]), torch.cat([f.trained for f in fill]))
    return Narrowed(new, dim, torch.cat(kept), offset, joined)


@rule(aten.stack.default)
def stack(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """As a concatenation along a new axis."""
    dim = _dim(node)
    kept = [i for i, value in enumerate(values) if isinstance(value, fx.Node)]
    constants = [v for v in values if isinstance(v, Constant) and v.evaluated.numel() == v.trained.numel() == 1]
    if not kept or len(kept) + len(constants) != len(values):
        return None
    nodes = [values[i] for i in kept]
    if len(nodes) == 1:
        new = build.call(aten.unsqueeze.default, nodes[0], dim)
    else:
        new = build.call(aten.stack.default, nodes, dim)
    fill = Constant(
        torch.stack([c.evaluated.flatten()[0] for c in constants]),
        torch.stack([c.trained.flatten()[0] for c in constants]),
    )
    return Narrowed(new, dim, torch.tensor(kept), len(values), fill)
