"""Operators that act on every element alike, with broadcasting: constants go through them as well."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from espalier.graph.axes import Coupling, Labels, couples
from espalier.graph.constants import Constant, hint
from espalier.graph.lift import is_tensor
from espalier.graph.module import shallow
from espalier.rules.value import ZERO, Build, Kept, Narrowed, Value, evaluated, full_shape, rule, tensors_of, within

aten = torch.ops.aten
POINTWISE = torch.Tag.pointwise

# Pointwise in effect, though torch does not tag them so.
COPIES = (
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.type_as.default,
    aten.contiguous.default, aten.detach.default, aten.detach_.default, aten.alias.default,
    aten.lift_fresh_copy.default, aten.hardswish.default, aten.log_sigmoid.default,
)  # fmt: skip
CHOICES = (aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
LAYERS = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.LeakyReLU,
    nn.ELU, nn.CELU, nn.SELU, nn.Softplus, nn.Mish, nn.Identity, nn.LogSigmoid, nn.Softsign, nn.Tanhshrink,
    nn.Threshold, nn.Hardshrink, nn.Softshrink,
)  # fmt: skip
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
DROPPING = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)


@couples(*LAYERS, *DROPOUT, *DROPPING, *COPIES)
def same_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels:
    """The result has the axes of what comes in."""
    return inputs[0]


@couples(POINTWISE, *CHOICES)
def broadcast_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels | None:
    """Axes of one size are one axis."""
    shape = coupling.shape(node)
    sources = [n for n in tensors_of(node) if is_tensor(n)]
    result: Labels = [None] * len(shape)
    for dim, size in enumerate(shape):
        meeting = []
        for source, labels in zip(sources, inputs, strict=True):
            at = dim - (len(shape) - len(labels))
            if at >= 0 and coupling.shape(source)[at] == size and size > 1:
                meeting.append(labels[at])
        if meeting:
            result[dim] = meeting[0]
            for other in meeting[1:]:
                result[dim] = coupling.join(result[dim], other, node)
    return result


@couples(nn.PReLU)
def prelu_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels:
    """One slope in all, or one per channel."""
    weight, labels = coupling.own(node, "weight"), list(inputs[0])
    if weight is not None and weight[0] is not None and len(labels) > 1:
        labels[1] = coupling.join(labels[1], weight[0], node)
    return labels


@couples(aten.prelu.default)
def functional_prelu_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels:
    """The same with the slopes as an argument."""
    labels, slope = list(inputs[0]), inputs[1][0] if inputs[1] else None
    if slope is not None and len(labels) > 1:
        labels[1] = coupling.join(labels[1], slope, node)
    return labels


@rule(*LAYERS)
def layer(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """An activation layer."""
    value, module = values[0], build.module(node)
    if not isinstance(value, Narrowed):
        return None
    new = build.copy(node, [value.node])
    return value.with_node(new, evaluated(value.background, lambda t: module(t.clone()), len(value.shape)))


@rule(nn.PReLU)
def prelu(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """Zero stays zero."""
    value, module = values[0], build.module(node)
    if not isinstance(value, Narrowed) or not value.background.is_zero:
        return None
    if module.num_parameters == 1 or 1 not in value.kept:
        return value.with_node(build.copy(node, [value.node]))
    if build.shared(node):
        return None
    narrow = shallow(module)
    narrow.weight = build.slice(node, "weight", {0: value.kept[1]})
    narrow.num_parameters = len(value.kept[1])
    return value.with_node(build.install(node, narrow, value.node))


@rule(*DROPOUT, *DROPPING)
def dropout(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """Zero stays zero; any other constant would become random."""
    value = values[0]
    nothing = node.op == "call_module" and getattr(build.module(node), "p", 1.0) == 0.0
    if not isinstance(value, Narrowed) or not (value.background.is_zero or nothing):
        return None
    return value.with_node(build.copy(node, [value.node, *[v for v in values[1:] if isinstance(v, fx.Node)]]))


@rule(POINTWISE, *COPIES, *CHOICES)
def function(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """Several tensors and numbers, broadcast."""
    ndim, shape = node.meta["val"].ndim, full_shape(node)
    sources = tensors_of(node)
    if not any(isinstance(v, Narrowed) for v in values):
        return None
    if not _spanned(sources, values, shape):
        return None
    values = _to_one_box(build, node, sources, values, ndim, shape)
    box = _box(values, ndim)
    background = _background(node, sources, values, ndim) if box else None
    if background is None:
        values = [build.put_back(v) if isinstance(v, Narrowed) else v for v in values]
    held = {} if background is None else box
    inputs = [_materialised(build, n, v, held, ndim, shape) for n, v in zip(sources, values, strict=True)]
    new = build.copy(node, inputs)
    return new if background is None else Narrowed(new, box, shape, background)


def _spanned(sources: list[fx.Node], values: list[Value], shape: tuple[int, ...]) -> bool:
    """Whether the result has its full shape without the constants, which are stored without uniform axes."""
    shapes = [
        full_shape(n) for n, v in zip(sources, values, strict=True) if is_tensor(n) and not isinstance(v, Constant)
    ]
    return tuple(torch.broadcast_shapes(*shapes)) == shape


def _aligned(dim: int, node: fx.Node, ndim: int) -> int:
    return dim - (ndim - node.meta["val"].ndim)


def _to_one_box(
    build: Build, node: fx.Node, sources: list[fx.Node], values: list[Value], ndim: int, shape: tuple[int, ...]
) -> list[Value]:
    """Put constants back until all inputs agree on what is still computed of every axis."""
    values = list(values)
    wanted = build.kept(node)
    for dim in range(ndim):
        at = [_aligned(dim, n, ndim) if is_tensor(n) else -1 for n in sources]
        holders = [i for i, v in enumerate(values) if isinstance(v, Narrowed) and at[i] in v.kept]
        if not holders:
            continue
        whole = any(
            isinstance(v, (fx.Node, Narrowed))
            and i not in holders
            and at[i] >= 0
            and full_shape(n)[at[i]] == shape[dim] > 1
            for i, (n, v) in enumerate(zip(sources, values, strict=True))
        )
        kepts = [values[i].kept[at[i]] for i in holders]  # type: ignore[union-attr]
        if not whole and all(torch.equal(kepts[0], k) for k in kepts[1:]):
            continue
        target = None if whole else wanted.get(dim)
        for i in holders:
            value = values[i]
            if isinstance(value, Narrowed):
                values[i] = build.widen(value, at[i], target)
    return values


def _box(values: list[Value], ndim: int) -> Kept:
    box: Kept = {}
    for value in values:
        if isinstance(value, Narrowed):
            box |= {d + ndim - len(value.shape): k for d, k in value.kept.items()}
    return box


def _background(node: fx.Node, sources: list[fx.Node], values: list[Value], ndim: int) -> Constant | None:
    """The operator on the backgrounds; None where it rests on what is computed."""
    computed = [i for i, v in enumerate(values) if isinstance(v, fx.Node) and is_tensor(sources[i])]
    constant = [v.background if isinstance(v, Narrowed) else v for v in values if not isinstance(v, fx.Node)]
    if computed:
        if node.target is aten.mul.Tensor and any(c.is_zero for c in constant):
            return ZERO
        if node.target in (aten.div.Tensor, aten.div.Tensor_mode) and 0 not in computed and constant[0].is_zero:
            return ZERO
        if node.target is aten.where.self and computed == [0] and all(c.is_zero for c in constant):
            return ZERO
        return None
    result = []
    for mode in ("evaluated", "trained"):
        tensors = iter([getattr(c, mode) for c in constant])

        def put(n: fx.Node, tensors: Any = tensors) -> Any:
            return next(tensors) if is_tensor(n) else hint(n.meta.get("val"))

        args, kwargs = fx.map_arg((node.args, node.kwargs), put)
        if node.target is aten.contiguous.default:
            kwargs = {}
        with torch.no_grad():
            made: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        result.append(made)
    if len(values) == 1 and not any(r.any() for r in result):
        return ZERO
    return Constant(*[evaluated(Constant(r, r), lambda t: t, ndim).evaluated for r in result])


def _materialised(build: Build, source: fx.Node, value: Value, box: Kept, ndim: int, shape: tuple[int, ...]) -> fx.Node:
    if isinstance(value, Narrowed):
        return value.node
    if isinstance(value, Constant):
        at = {_aligned(d, source, ndim): k for d, k in box.items()}
        own = source.meta["val"].ndim
        return build.constant(within(value, {d: k for d, k in at.items() if d >= 0}, own), source.name)
    return value
