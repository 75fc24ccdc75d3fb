"""``nn.MultiheadAttention``: its heads, and the widths of what it reads and returns. Recurrent layers stay whole.

The layer's own forward insists on ``embed_dim == num_heads * head_dim``: a narrowed one is written out as its
operators.
"""

import operator
from typing import Any

import torch
from torch import fx, nn

from espalier.graph.axes import Coupling, Labels, couples
from espalier.graph.constants import Constant
from espalier.graph.lift import is_tensor
from espalier.rules.value import ZERO, Build, Narrowed, Value, rule, tensors_of

aten = torch.ops.aten
PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


@couples(nn.RNNBase, nn.RNNCellBase)
def recurrent_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> "list[Labels] | Labels":
    """Kept whole, and what they read with them."""
    reason = f"{coupling.at(node)} is recurrent: it is kept whole"
    for name, _ in coupling.module(node).named_parameters():
        coupling.fix(coupling.own(node, name) or (), reason)
    for labels in inputs:
        coupling.fix(labels, reason)
    value = node.meta["val"]
    if isinstance(value, (tuple, list)):
        return [[None] * v.ndim for v in value]
    return [None] * value.ndim


@couples(nn.MultiheadAttention)
def attention_axes(coupling: Coupling, node: fx.Node, inputs: list[Labels]) -> "list[Labels] | Labels | None":
    """The rows of the projections and the columns of the last one are [heads, width]; the heads are free."""
    layer: nn.MultiheadAttention = coupling.module(node)
    out, out_bias = coupling.own(node, "out_proj.weight"), coupling.own(node, "out_proj.bias")
    if layer.bias_k is not None or layer.add_zero_attn or out is None or len(inputs) < 3:
        return None
    grid = (layer.num_heads, layer.head_dim)
    why = f"the width of a head of {coupling.at(node)}"
    heads = coupling.split(out[1], grid, why)
    coupling.contracted(out[1])
    coupling.heads(heads[0])
    coupling.fix([heads[1]], why)
    packed, bias = coupling.own(node, "in_proj_weight"), coupling.own(node, "in_proj_bias")
    for k in range(3):
        weight = packed if packed is not None else coupling.own(node, PROJECTIONS[k])
        assert weight is not None
        rows = slice(k * layer.embed_dim, (k + 1) * layer.embed_dim) if packed is not None else slice(None)
        for axis in (weight[0], bias[0] if bias is not None else None):
            if axis is None:
                continue
            part = axis[rows] if axis is weight[0] else axis[k * layer.embed_dim : (k + 1) * layer.embed_dim]
            own = coupling.split(part, grid, why)
            coupling.join(own[0], heads[0], node)
            coupling.fix([own[1]], why)
            coupling.written(axis)
        coupling.join(inputs[k][-1], weight[1], node)
        coupling.contracted(weight[1])
        coupling.fix(inputs[k][:-1], f"{coupling.at(node)} attends along it")
    if out_bias is not None:
        coupling.join(out[0], out_bias[0], node)
        coupling.written(out_bias[0])
    coupling.written(out[0])
    first: Labels = [*[None] * (len(inputs[0]) - 1), out[0]]
    value = node.meta["val"]
    if isinstance(value, (tuple, list)):
        return [first, *[[None] * v.ndim for v in value[1:]]]
    return first


@rule(nn.MultiheadAttention)
def attention(build: Build, node: fx.Node, values: list[Value]) -> Any:
    """Written out as projections, scaled dot products and a projection."""
    layer: nn.MultiheadAttention = build.module(node)
    value = node.meta["val"]
    several = isinstance(value, (tuple, list))
    if several and any(n.target is operator.getitem and n.args[1] != 0 for n in node.users):
        return None
    shape = tuple(int(s) if isinstance(s, int) else 2 for s in (value[0] if several else value).shape)
    last = len(shape) - 1
    fits = all(isinstance(v, fx.Node) or (isinstance(v, Narrowed) and set(v.kept) == {last}) for v in values[:3])
    if build.shared(node) or last != 2 or not fits or layer.bias_k is not None or layer.add_zero_attn:
        return None
    values = [build.put_back(v) if isinstance(v, Narrowed) and not v.background.is_zero else v for v in values]
    mask, known = _mask(build, node, values)
    if not known:
        return None
    kept_out = build.kept_of(node, "out_proj.weight")
    columns = kept_out.get(1, torch.arange(layer.embed_dim))
    heads = len(columns) // layer.head_dim
    rows = [_project(build, node, layer, k, values[k], columns) for k in range(3)]
    if not layer.batch_first:
        rows = [build.call(aten.transpose.int, r, 0, 1) for r in rows]
    split = [build.call(aten.unflatten.int, r, 2, [heads, layer.head_dim]) for r in rows]
    query, key, val = (build.call(aten.transpose.int, s, 1, 2) for s in split)
    drop: Any = 0.0
    if layer.dropout:
        drop = build.call(operator.getitem, (0.0, layer.dropout), build.training(), val=0.0)
    out = build.call(aten.scaled_dot_product_attention.default, query, key, val, mask, drop)
    out = build.call(aten.flatten.using_ints, build.call(aten.transpose.int, out, 1, 2), 2)
    if not layer.batch_first:
        out = build.call(aten.transpose.int, out, 0, 1)
    weight = build.slice(node, "out_proj.weight", kept_out)
    bias = layer.out_proj.bias
    if bias is not None:
        bias = build.slice(node, "out_proj.bias", build.kept_of(node, "out_proj.bias"))
    out = _linear(build, out, f"{node.target}.out_proj", weight, bias, value[0] if several else value)
    made: Value = Narrowed(out, {last: kept_out[0]}, shape, ZERO) if 0 in kept_out else out
    return [made] if several else made


def _project(
    build: Build, node: fx.Node, layer: nn.MultiheadAttention, k: int, value: Value, columns: torch.Tensor
) -> fx.Node:
    """One of the three projections, of the heads that are left."""
    name = "in_proj_weight" if layer.in_proj_weight is not None else PROJECTIONS[k]
    rows = columns + (k * layer.embed_dim if layer.in_proj_weight is not None else 0)
    assert not isinstance(value, Constant)
    source, read = (value.node, value.kept) if isinstance(value, Narrowed) else (value, {})
    weight = build.slice(node, name, {0: rows} | ({1: read[2]} if read else {}))
    bias = None
    if layer.in_proj_bias is not None:
        bias = build.slice(node, "in_proj_bias", {0: columns + k * layer.embed_dim})
    return _linear(build, source, f"{node.target}.{'qkv'[k]}_proj", weight, bias, None)


def _linear(
    build: Build, source: fx.Node, path: str, weight: nn.Parameter, bias: nn.Parameter | None, val: Any
) -> fx.Node:
    layer = nn.Linear(1, 1, bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
    layer.out_features, layer.in_features = weight.shape
    return build.added_layer(path, layer, source, val)


def _mask(build: Build, node: fx.Node, values: list[Value]) -> tuple[Any, bool]:
    """The mask that ``scaled_dot_product_attention`` takes, and whether it could be told."""
    given = {"key_padding_mask": None, "attn_mask": None} | dict(node.kwargs)
    for name, position in (("key_padding_mask", 3), ("attn_mask", 5)):
        if len(node.args) > position:
            given[name] = node.args[position]
    padding, mask = given["key_padding_mask"], given["attn_mask"]
    if given.get("is_causal") and mask is None:
        return None, False
    known = dict(zip([n for n in tensors_of(node) if is_tensor(n)], values, strict=True))
    if padding is not None or (mask is not None and mask.meta["val"].ndim != 2):  # type: ignore[union-attr]
        return None, False
    if mask is None:
        return None, True
    now = known.get(mask)  # type: ignore[call-overload]
    if not isinstance(now, fx.Node):
        return None, False
    if mask.meta["val"].dtype == torch.bool:  # type: ignore[union-attr]
        return build.call(aten.logical_not.default, now, val=mask.meta["val"]), True  # type: ignore[union-attr]
    return now, True
