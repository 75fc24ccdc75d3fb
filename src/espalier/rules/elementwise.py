"""Operators that act on every element alike: the constants of a narrowed axis go through them as well."""

import torch
from torch import fx, nn

from espalier.rules.value import RULES, Build, Narrowed, Value, both, rule

aten = torch.ops.aten

_FUNCTIONS = (
    "relu", "relu6", "gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "elu",
    "celu", "selu", "softplus", "mish", "exp", "neg", "abs", "sqrt", "rsqrt", "log", "square", "sin", "cos",
    "log_sigmoid", "erf", "clone", "contiguous",
)  # fmt: skip
_LAYERS = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.LeakyReLU,
    nn.ELU, nn.CELU, nn.SELU, nn.Softplus, nn.Mish, nn.Identity, nn.LogSigmoid, nn.Softsign, nn.Tanhshrink,
    nn.Threshold, nn.Hardshrink, nn.Softshrink,
)  # fmt: skip


@rule(
    *(getattr(aten, name).default for name in _FUNCTIONS),
    aten.pow.Tensor_Scalar,
    aten.to.dtype,
    aten.clamp.default,
)
def function(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """One tensor and numbers."""
    (value,) = values
    if not isinstance(value, Narrowed) or not isinstance(node.args[0], fx.Node):
        return None

    def on_fill(tensor: torch.Tensor) -> torch.Tensor:
        return node.target(tensor, *node.args[1:], **node.kwargs)  # type: ignore[operator]

    new = build.copy(node, [value.node])
    return Narrowed(new, value.dim, value.kept, value.total, both(value.fill, on_fill))


@rule(*_LAYERS)
def layer(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """An activation layer."""
    (value,) = values
    module = build.module(node)
    if not isinstance(value, Narrowed):
        return None
    new = build.copy(node, [value.node])
    return Narrowed(new, value.dim, value.kept, value.total, both(value.fill, lambda t: module(t.clone())))


@rule(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, aten.dropout.default, aten.feature_dropout.default)
def dropout(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    """Zero stays zero; any other constant would become random."""
    value = values[0]
    if not isinstance(value, Narrowed) or not value.fill.is_zero:
        return None
    return Narrowed(build.copy(node, [value.node]), value.dim, value.kept, value.total, value.fill)


def _with_number(build: Build, node: fx.Node, values: list[Value]) -> Value | None:
    return function(build, node, values) if len(values) == 1 else None


for _target in (aten.div.Tensor, aten.sub.Tensor):
    RULES[_target] = _with_number
