"""Reductions and normalisations over axes: sums run over zeros, means over what the solution leaves."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from espalier.graph.axes import Coupling, Labels, couples, numbers
from espalier.graph.lift import is_tensor
from espalier.rules.norm import as_the_solution_leaves
from espalier.rules.value import ZERO, Build, Narrowed, Value, both, evaluated, full_shape, part, rule, within

aten = torch.ops.aten
SUMS = (aten.sum.dim_IntList, aten.sum.default)
MEANS = (aten.mean.dim, aten.mean.default)
SPREADS = (aten.var.correction, aten.std.correction, aten.var.dim, aten.std.dim, aten.var_mean.correction)
OTHERS = (
    aten.amax.default, aten.amin.default, aten.linalg_vector_norm.default, aten.logsumexp.default,
    aten.argmax.default, aten.argmin.default, aten.any.dim, aten.all.dim, aten.prod.dim_int, aten.norm.ScalarOpt_dim,
)  # fmt: skip
SOFTMAX = (
    aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default,
    aten._safe_softmax.default,
)  # fmt: skip


def _dims(node: fx.Node) -> tuple[set[int], bool]:
    """The axes that the node reduces, and whether they stay as axes of size one."""
    ndim = node.all_input_nodes[0].meta["val"].ndim
    args, kwargs = numbers(node)
    if node.target in (aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim):
        args = args[1:]
    dims = args[0] if args else kwargs.get("dim")
    keep = args[1] if len(args) > 1 and isinstance(args[1], bool) else kwargs.get("keepdim", False)
    if node.target in (aten.var.correction, aten.std.correction, aten.var_mean.correction):
        keep = kwargs.get("keepdim", False)
    if node.target in (aten.var.dim, aten.std.dim):
        keep = args[2] if len(args) > 2 else False
    if dims is None or dims == []:
        return set(range(ndim)), bool(keep)
    return {d % ndim for d in (dims if isinstance(dims, (list, tuple)) else [dims])}, bool(keep)


def _left(labels: Labels, dims: set[int], keep: bool) -> Labels:
    return [None if d in dims else axis for d, axis in enumerate(labels) if keep or d not in dims]


@couples(*SUMS, *MEANS, *SPREADS, *OTHERS)
def reduced_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> "Labels | list[Labels]":
    """The reduced axes vanish."""
    dims, keep = _dims(node)
    labels = inputs[0]
    if node.target in OTHERS:
        coupling.fix([labels[d] for d in dims], f"{coupling.at(node)} works along it")
    elif node.target in (*MEANS, *SPREADS):
        coupling.statistic(node, *[d for d in dims if labels[d] is not None])
    left = _left(labels, dims, keep)
    return [list(left), list(left)] if isinstance(node.meta["val"], (tuple, list)) else left


@couples(*SOFTMAX, nn.Softmax, nn.LogSoftmax, nn.Softmin)
def softmax_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels:
    """The axis that sums to one stays."""
    dim = _softmax_dim(coupling, node)
    labels = list(inputs[0])
    coupling.fix([labels[dim]], f"{coupling.at(node)} makes it sum to one")
    labels[dim] = None
    return labels


def _softmax_dim(owner: Any, node: fx.Node) -> int:
    if node.op == "call_module":
        dim = owner.module(node).dim
        return int(dim) if dim is not None else (0 if node.meta["val"].ndim in (0, 1, 3) else 1)
    args, kwargs = numbers(node)
    return int(args[0] if args else kwargs["dim"])


@couples(nn.GLU, aten.glu.default)
def glu_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels:
    """The first half, gated by the second."""
    labels, dim = list(inputs[0]), _glu_dim(coupling, node)
    axis = labels[dim]
    if axis is not None:
        half = len(axis) // 2
        labels[dim] = coupling.join(axis[:half], axis[half:], node)
    return labels


def _glu_dim(owner: Any, node: fx.Node) -> int:
    if node.op == "call_module":
        return int(owner.module(node).dim) % node.meta["val"].ndim
    return int(node.args[1] if len(node.args) > 1 else -1) % node.meta["val"].ndim  # type: ignore[call-overload]


@rule(*SUMS, *MEANS, *SPREADS, *OTHERS)
def reduction(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """On the box. Other constants than zeros along a reduced axis are added (sums) or put back."""
    value: Any = values[0]
    dims, keep = _dims(node)
    averaged = node.target in (*MEANS, *SPREADS) and any(d in dims for d in build.kept(node.all_input_nodes[0]))
    if isinstance(node.meta["val"], (tuple, list)) or not (isinstance(value, Narrowed) or averaged):
        return None
    narrow = [d for d in dims if averaged or d in value.kept]
    rest = None
    if node.target in SUMS:
        rest = _constants_sum(value, dims, keep) if narrow else None
    elif narrow and node.target in OTHERS:
        value = _widened(build, value, narrow)
    elif narrow:
        value = as_the_solution_leaves(build, node, value, narrow)
    if not isinstance(value, Narrowed):
        return build.copy(node, [value])
    others = {d: k for d, k in value.kept.items() if d not in dims}
    new = build.copy(node, [value.node])
    if rest is not None and not rest.is_zero:
        new = build.call(aten.add.Tensor, new, build.constant(rest, node.name))
    if not others:
        return new
    shape = list(value.shape)
    background = value.background
    if not background.is_zero or node.target not in (*SUMS, *MEANS):

        def apply(tensor: Tensor) -> Tensor:
            return node.target(tensor.expand(shape), *node.args[1:], **node.kwargs)  # type: ignore[operator]

        background = evaluated(background, apply, node.meta["val"].ndim)
    kept = {d if keep else d - sum(r < d for r in dims): k for d, k in others.items()}
    return Narrowed(new, kept, full_shape(node), background)


def _widened(build: Build, value: Narrowed, dims: list[int]) -> "fx.Node | Narrowed":
    now: Any = value
    for dim in dims:
        if isinstance(now, Narrowed):
            now = build.widen(now, dim)
    return now


def _constants_sum(value: Narrowed, dims: set[int], keep: bool) -> Any:
    """What the constants outside of the box add to the sums on it."""
    if value.background.is_zero:
        return None
    ndim = len(value.shape)
    others = {d: k for d, k in value.kept.items() if d not in dims}
    constants = within(value.background, others, ndim)
    inside = torch.ones((), dtype=torch.bool)
    for d in dims:
        mask = torch.ones(value.shape[d], dtype=torch.bool)
        if d in value.kept:
            mask[:] = False
            mask[value.kept[d]] = True
        shape = [1] * ndim
        shape[d] = -1
        inside = inside & mask.view(shape)

    def total(tensor: Tensor) -> Tensor:
        tensor = tensor.reshape((1,) * (ndim - tensor.ndim) + tuple(tensor.shape))
        tensor = tensor.expand(*[value.shape[d] if d in dims else n for d, n in enumerate(tensor.shape)])
        return tensor.masked_fill(inside.to(tensor.device), 0.0).sum(sorted(dims), keepdim=keep)

    return both(constants, total)


@rule(*SOFTMAX, nn.Softmax, nn.LogSoftmax, nn.Softmin)
def softmax(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """Beside the axis that sums to one."""
    value = values[0]
    if not isinstance(value, Narrowed):
        return None
    dim = _softmax_dim(build, node) % len(value.shape)
    if dim in value.kept:
        return None
    function = build.module(node) if node.op == "call_module" else None

    def apply(tensor: Tensor) -> Tensor:
        full = tensor.expand(value.shape).to(node.meta["val"].dtype)
        return function(full) if function is not None else torch.softmax(full, dim)

    if "log" in str(node.target):
        return None
    background = evaluated(value.background, apply, len(value.shape))
    return Narrowed(build.copy(node, [value.node]), value.kept, value.shape, background)


@rule(nn.GLU, aten.glu.default)
def glu(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """Both halves alike."""
    value = values[0]
    if not isinstance(value, Narrowed) or not value.background.is_zero:
        return None
    dim = _glu_dim(build, node)
    kept = dict(value.kept)
    if dim in kept:
        half = value.shape[dim] // 2
        first, second = kept[dim][kept[dim] < half], kept[dim][kept[dim] >= half] - half
        if not torch.equal(first, second):
            return None
        kept[dim] = first
    return Narrowed(build.copy(node, [value.node]), kept, full_shape(node), ZERO)


def zero_at(value: Value, dim: int) -> bool:
    """Whether what is gone of the axis is all zeros."""
    if not isinstance(value, Narrowed) or dim not in value.kept:
        return False
    return part(value.background, dim, value.gone(dim), len(value.shape)).is_zero


def only_tensor(node: fx.Node) -> bool:
    return sum(is_tensor(n) for n in node.all_input_nodes) == 1
