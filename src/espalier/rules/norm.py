"""Norms.

Batch and instance norms treat each channel alone. Layer, group and RMS norms take statistics over an axis: where
the solution narrows it, over what stays.
"""

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from espalier.graph.axes import Coupling, Labels, couples
from espalier.graph.constants import Constant
from espalier.graph.module import shallow
from espalier.rules.value import ZERO, Build, Narrowed, Value, evaluated, full_shape, rule

aten = torch.ops.aten
PER_CHANNEL = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.modules.batchnorm._BatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip


@couples(*PER_CHANNEL)
def per_channel_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels:
    """Weight and bias [channels]; the other axes stay."""
    labels = inputs[0]
    coupling.fix([labels[0], *labels[2:]], f"{coupling.at(node)} averages over it")
    return _affine(coupling, node, [None, labels[1], *[None] * (len(labels) - 2)], 1)


@couples(nn.LayerNorm, nn.RMSNorm)
def last_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels:
    """Statistics over the last axes."""
    count = len(coupling.module(node).normalized_shape)
    first = len(inputs[0]) - count
    coupling.statistic(node, *range(first, len(inputs[0])))
    return _affine(coupling, node, inputs[0], first)


@couples(nn.GroupNorm)
def group_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels:
    """Statistics over each group of channels: a group goes as a whole, or all lose as many channels."""
    labels, groups = inputs[0], coupling.module(node).num_groups
    coupling.fix(labels[2:], f"{coupling.at(node)} averages over it")
    if labels[1] is not None:
        coupling.split(
            labels[1], (groups, len(labels[1]) // groups), f"the groups of {coupling.at(node)} have one width"
        )
    coupling.statistic(node, 1)
    return _affine(coupling, node, [labels[0], labels[1], *[None] * (len(labels) - 2)], 1)


def _affine(coupling: Coupling, node: fx.Node, labels: Labels, first: int) -> Labels:
    labels = list(labels)
    for name in ("weight", "bias"):
        own = coupling.own(node, name)
        for k, axis in enumerate(own or ()):
            labels[first + k] = coupling.join(labels[first + k], axis, node) if _wide(axis, labels, first + k) else None
            coupling.written(axis)
    return labels


def _wide(axis: Any, labels: Labels, dim: int) -> bool:
    return axis is not None or labels[dim] is not None


@rule(*PER_CHANNEL)
def per_channel(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """``gamma (x - mean) / std + beta``; in train mode a constant channel is its own mean, which leaves beta."""
    value, layer = values[0], build.module(node)
    if not isinstance(value, Narrowed) or set(value.kept) != {1}:
        return None
    if build.shared(node):
        wanted = build.kept(node).get(1)
        if wanted is None or not torch.equal(wanted, value.kept[1]):
            value = build.widen(value, 1, wanted)
            if not isinstance(value, Narrowed):
                return build.copy(node, [value])
    kept = value.kept[1]
    narrow = shallow(layer)
    narrow.num_features = len(kept)
    _slice_affine(build, node, narrow, layer, {0: kept})
    for name in ("running_mean", "running_var"):
        if getattr(layer, name) is not None:
            setattr(narrow, name, getattr(layer, name)[kept.to(getattr(layer, name).device)].clone())
    if uniform_along(value, 1):
        background = _channels_alone(layer, value)
    elif _silent(layer, value.gone(1)):
        background = ZERO
    else:
        return build.copy(node, [build.put_back(value)])
    return Narrowed(build.install(node, narrow, value.node), {1: kept}, value.shape, background)


def uniform_along(value: Narrowed, at: int) -> bool:
    """Whether the background varies along axis ``at`` alone."""
    for tensor in (value.background.evaluated, value.background.trained):
        axis = at - (len(value.shape) - tensor.ndim)
        if tensor.numel() != (tensor.shape[axis] if axis >= 0 and tensor.ndim else 1):
            return False
    return True


def _silent(layer: Any, channels: Tensor) -> bool:
    """Whether scale and shift of these channels are zero, so that they yield zeros whatever comes in."""
    own = type(layer).forward.__module__.startswith("torch.nn.modules") and layer.weight is not None
    tensors = [t for t in (layer.weight, layer.bias) if t is not None]
    return own and all(not t[channels.to(t.device)].any() for t in tensors)


def _channels_alone(layer: Any, value: Narrowed) -> Constant:
    """What the layer makes of channels that are constant, in either mode."""
    ndim = len(value.shape)
    run = _formula if type(layer).forward.__module__.startswith("torch.nn.modules") else _run
    return Constant(
        evaluated(value.background, lambda t: run(layer, t, value.shape, False), ndim).evaluated,
        evaluated(value.background, lambda t: run(layer, t, value.shape, True), ndim).trained,
    )


def _formula(layer: Any, background: Tensor, shape: tuple[int, ...], training: bool) -> Tensor:
    like = next((t for t in (layer.weight, layer.running_mean) if t is not None), background)
    x = background.to(like).expand(1, shape[1], *[1] * (len(shape) - 2))
    if training or layer.running_mean is None or isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        y = torch.zeros_like(x)
    else:
        y = (x - _as_channels(layer.running_mean, x)) * _as_channels(layer.running_var + layer.eps, x).rsqrt()
    y = y if layer.weight is None else y * _as_channels(layer.weight.detach(), x)
    return y if layer.bias is None else y + _as_channels(layer.bias.detach(), x)


def _as_channels(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (like.ndim - 2))


def _run(layer: Any, background: Tensor, shape: tuple[int, ...], training: bool) -> Tensor:
    """The same for a batch norm with a forward of its own."""
    like = next((t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()), background)
    x = background.to(like).expand(2, shape[1], *[1] * (len(shape) - 2))
    with torch.no_grad():
        return copy.deepcopy(layer).train(training)(x.clone())


@rule(nn.LayerNorm, nn.RMSNorm)
def over_last_axes(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """Statistics over what the solution leaves; other constants are put back first."""
    value, layer = values[0], build.module(node)
    if isinstance(value, Constant):
        return None
    ndim = node.meta["val"].ndim
    first = ndim - len(layer.normalized_shape)
    narrowed = as_the_solution_leaves(build, node, value, range(first, ndim))
    if not isinstance(narrowed, Narrowed):
        return build.copy(node, [narrowed])
    box = {d - first: k for d, k in narrowed.kept.items() if d >= first}
    others = {d: k for d, k in narrowed.kept.items() if d < first}
    if others and not narrowed.background.is_zero:
        return None
    new = narrow = None
    if box:
        narrow = shallow(layer)
        sizes = list(layer.normalized_shape)
        for d, k in box.items():
            sizes[d] = len(k)
        narrow.normalized_shape = tuple(sizes)
        _slice_affine(build, node, narrow, layer, box)
        new = build.install(node, narrow, narrowed.node)
    else:
        new = build.copy(node, [narrowed.node])
    bias = getattr(layer, "bias", None)
    if others and bias is not None:
        return Narrowed(new, narrowed.kept, narrowed.shape, evaluated(ZERO, lambda t: bias.detach() + t.to(bias), ndim))
    return Narrowed(new, narrowed.kept, narrowed.shape, ZERO)


@rule(nn.GroupNorm)
def over_groups(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """Whole groups gone, or the same channels of each."""
    value, layer = values[0], build.module(node)
    if isinstance(value, Constant):
        return None
    value = as_the_solution_leaves(build, node, value, (1,))
    if not isinstance(value, Narrowed):
        return build.copy(node, [value])
    kept = value.kept[1]
    width = layer.num_channels // layer.num_groups
    counts = (kept // width).bincount(minlength=layer.num_groups)
    counts = counts[counts > 0]
    if set(value.kept) != {1} or (counts != counts[0]).any():
        return None
    narrow = shallow(layer)
    narrow.num_groups, narrow.num_channels = len(counts), len(kept)
    _slice_affine(build, node, narrow, layer, {0: kept})
    return Narrowed(build.install(node, narrow, value.node), {1: kept}, full_shape(node), ZERO)


def as_the_solution_leaves(build: Build, node: fx.Node, value: Value, dims: Any) -> "fx.Node | Narrowed":
    """Exactly what the solution leaves of these axes: other constants are put back, computed values left out."""
    assert not isinstance(value, Constant)
    wanted = {d: k for d, k in build.kept(node.all_input_nodes[0]).items() if d in dims}
    now: fx.Node | Narrowed = value
    for dim in dims:
        if isinstance(now, Narrowed) and dim in now.kept:
            there = wanted.get(dim)
            if there is None or not torch.equal(there, now.kept[dim]):
                now = build.widen(now, dim, there)
    before = now.kept if isinstance(now, Narrowed) else {}
    more = {d: k for d, k in wanted.items() if d not in before}
    if not more:
        return now
    old = now.node if isinstance(now, Narrowed) else now
    background = now.background if isinstance(now, Narrowed) else ZERO
    shape = tuple(full_shape(node.all_input_nodes[0]))
    return Narrowed(build.select(old, more), {**before, **more}, shape, background)


def _slice_affine(build: Build, node: fx.Node, narrow: Any, layer: Any, box: dict[int, Tensor]) -> None:
    for name in ("weight", "bias"):
        if getattr(layer, name, None) is not None:
            setattr(narrow, name, build.slice(node, name, box))
