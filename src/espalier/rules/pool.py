"""Windows, pools and resizing over the axes behind the channels: a uniform channel stays what it is."""

import re

import torch
from torch import fx, nn

from espalier.graph.axes import Coupling, Labels, couples
from espalier.graph.constants import Constant
from espalier.rules.norm import uniform_along
from espalier.rules.value import Build, Narrowed, Value, full_shape, rule

aten = torch.ops.aten

LAYERS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d,
)  # fmt: skip
FUNCTIONS = (
    aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.avg_pool1d.default,
    aten.avg_pool2d.default, aten.avg_pool3d.default, aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default,
    aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec,
    aten.upsample_nearest1d.vec, aten.upsample_linear1d.vec, aten.upsample_nearest3d.vec,
    aten.upsample_trilinear3d.vec, aten.reflection_pad1d.default, aten.reflection_pad2d.default,
    aten.replication_pad2d.default,
)  # fmt: skip


@couples(*LAYERS, *FUNCTIONS)
def window_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels | None:
    """The window's axes stay; batch and channels pass."""
    if isinstance(node.meta["val"], (tuple, list)):
        return None
    count = _window(coupling, node)
    labels = inputs[0]
    coupling.fix(labels[-count:], f"{coupling.at(node)} moves a window along it")
    return [*labels[:-count], *[None] * count]


@couples(aten.constant_pad_nd.default, aten.pad.default)
def padded_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> Labels | None:
    """A padded axis has indices of its own at its ends."""
    if _filler(node) is None:
        return None
    pads, labels = _pads(node), list(inputs[0])
    for k in range(len(pads) // 2):
        if pads[2 * k] or pads[2 * k + 1]:
            dim = len(labels) - 1 - k
            axis = labels[dim]
            if axis is None or min(pads[2 * k : 2 * k + 2]) < 0:
                coupling.fix([axis], f"{coupling.at(node)} crops it")
                labels[dim] = None
                continue
            before, after = (coupling.atoms.fresh(n) for n in pads[2 * k : 2 * k + 2])
            labels[dim] = torch.cat([torch.from_numpy(a) for a in (before, axis, after)]).numpy()
    return labels


def _filler(node: fx.Node) -> float | None:
    """The constant that is padded with; None if it is none."""
    rest = list(node.args[2:])
    if node.target is aten.pad.default:
        mode = rest.pop(0) if rest else node.kwargs.get("mode", "constant")
        if mode != "constant":
            return None
    value = rest[0] if rest else node.kwargs.get("value")
    return float(value or 0.0)  # type: ignore[arg-type]


def _pads(node: fx.Node) -> list[int]:
    pads = node.args[1]
    return [p if isinstance(p, int) else 1 for p in pads]  # type: ignore[union-attr]


def _window(coupling: Coupling, node: fx.Node) -> int:
    name = type(coupling.module(node)).__name__ if node.op == "call_module" else str(node.target)
    found = re.search(r"(\d)d", name)
    return int(found.group(1)) if found else len(coupling.shape(node)) - 2


@rule(*LAYERS, *FUNCTIONS)
def pool(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """Of the channels that are left."""
    value = values[0]
    if not isinstance(value, Narrowed) or set(value.kept) != {1} or any(isinstance(v, Constant) for v in values):
        return None
    uniform = isinstance(node.target, str) and _keeps_constants(build.module(node))
    if not value.background.is_zero and not (uniform and uniform_along(value, 1)):
        return None
    shape = (*value.shape[:2], *full_shape(node)[2:])
    new = build.copy(node, [value.node, *[v for v in values[1:] if isinstance(v, fx.Node)]])
    return Narrowed(new, value.kept, shape, value.background)


def _keeps_constants(layer: nn.Module) -> bool:
    """An average over zero padding does not keep a constant other than zero."""
    padding = getattr(layer, "padding", 0)
    padded = any(padding) if isinstance(padding, tuple) else bool(padding)
    average = isinstance(layer, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d))
    return not (average and padded and layer.count_include_pad) and not isinstance(layer, (nn.Upsample, nn.ZeroPad2d))


@rule(aten.constant_pad_nd.default, aten.pad.default)
def pad(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """Zeros around zeros; a narrowed axis is padded with as many indices as the solution leaves of the padding."""
    value, pads = values[0], list(node.args[1])  # type: ignore[arg-type]
    if not isinstance(value, Narrowed) or len(values) > 1 or not value.background.is_zero or _filler(node) != 0.0:
        return None
    kept, ndim = dict(value.kept), len(value.shape)
    for k in range(len(pads) // 2):
        dim = ndim - 1 - k
        if dim not in kept or not (pads[2 * k] or pads[2 * k + 1]):
            continue
        left, wide = build.kept(node).get(dim), pads[2 * k] + value.shape[dim] + pads[2 * k + 1]
        left = torch.arange(wide) if left is None else left
        inside = (left >= pads[2 * k]) & (left < pads[2 * k] + value.shape[dim])
        if not torch.equal(left[inside] - pads[2 * k], kept[dim]):
            return None
        pads[2 * k : 2 * k + 2] = [int((left < pads[2 * k]).sum()), int((left >= pads[2 * k] + value.shape[dim]).sum())]
        kept[dim] = left
    new = build.copy(node, [value.node])
    new.args = (new.args[0], pads, *new.args[2:])
    return Narrowed(new, kept, full_shape(node), value.background)
