"""The masked network: the full model with the removed structures at zero. What every sub-network must equal.

Made from parameter names and plain formulas, on another way than the sub-network. A norm over a narrowed axis
takes its statistics over what stays of it, and yields zeros elsewhere.
"""

import copy
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx, nn

from espalier.errors import InvalidSolution
from espalier.graph.module import graph_module
from espalier.graph.trace import Trace, root_for
from espalier.space.narrowing import Narrowing
from espalier.space.structure import Slices

aten = torch.ops.aten


def with_zeros(model: nn.Module, slices: Iterable[tuple[Slices, Tensor]], masks: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model with slices at zero: each with the removed positions of its family.

    Raises :class:`InvalidSolution` for a mask of another shape, or of a parameter that the model does not have.
    """
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in parameters:
            raise InvalidSolution(
                f"the solution has a mask for '{name}', but {type(model).__name__} has no such parameter"
            )
        if parameters[name].shape != mask.shape:
            shape = tuple(parameters[name].shape)
            raise InvalidSolution(f"the mask of '{name}' has shape {tuple(mask.shape)}, the parameter {shape}")
    with torch.no_grad():
        for piece, removed in slices:
            parameter = parameters[piece.parameter]
            if piece.owner is None:
                parameter.zero_()
                continue
            assert piece.dim is not None
            gone = torch.isin(piece.owner, removed)
            shape = [1] * piece.dim + list(gone.shape) + [1] * (parameter.ndim - piece.dim - gone.ndim)
            parameter.masked_fill_(gone.view(shape).to(parameter.device), 0.0)
        for name, mask in masks.items():  # filled, not multiplied: no -0.0, and no NaN from what is not finite
            parameters[name].masked_fill_(~mask.to(parameters[name].device, torch.bool), 0.0)
    return model


def with_statistics_over_what_stays(trace: Trace, model: nn.Module, narrowing: Narrowing) -> nn.Module:
    """``model`` (a masked copy) with every norm over a narrowed axis replaced; itself where there is none."""
    affected: dict[fx.Node, dict[int, Tensor]] = {}
    for node, dims in narrowing.axes.statistics.items():
        source = node.all_input_nodes[0]
        kept = {d: k for d, k in narrowing.of(source).items() if d in dims}
        if kept:
            affected[node] = kept
    if not affected:
        return model
    by_path: dict[str, list[dict[int, Tensor]]] = {}
    for node, kept in affected.items():
        if node.op == "call_module":
            by_path.setdefault(str(node.target), []).append(kept)
    calls = [str(n.target) for n in trace.graph.nodes if n.op == "call_module" and str(n.target) in by_path]
    modules_suffice = all(n.op == "call_module" for n in affected) and len(calls) == len(affected) == len(by_path)
    if modules_suffice:
        for node, kept in affected.items():
            path = str(node.target)
            _set(model, path, _StatisticsOverKept(model.get_submodule(path), kept, node.meta["val"].ndim))
        return model
    return _as_graph(trace, model, affected)


def _set(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def _as_graph(trace: Trace, model: nn.Module, affected: Mapping[fx.Node, dict[int, Tensor]]) -> nn.Module:
    graph = fx.Graph()
    graph.set_codegen(copy.copy(trace.graph._codegen))
    root = root_for(model, trace.graph)
    new: dict[fx.Node, fx.Node] = {}
    for node in trace.graph.nodes:
        new[node] = graph.node_copy(node, lambda n: new[n])
        if node in affected:
            ndim = node.all_input_nodes[0].meta["val"].ndim
            layer = root.get_submodule(str(node.target)) if node.op == "call_module" else node.target
            name = f"{node.name}_over_what_stays"
            root.add_module(name, _StatisticsOverKept(layer, affected[node], ndim))
            with graph.inserting_after(new[node]):
                replacement = graph.create_node("call_module", name, new[node].args, new[node].kwargs)
            graph.erase_node(new[node])
            new[node] = replacement
    small = graph_module(root, graph, type(model).__name__)
    small.training = model.training
    return small


class _StatisticsOverKept(nn.Module):
    """Applies a norm or a mean to what stays, and yields zeros elsewhere (or one value, where the axis vanishes)."""

    eps = math.nan  # equal to no other: nn.TransformerEncoderLayer then leaves its fused kernel, which knows no axes

    def __init__(self, operator: object, kept: dict[int, Tensor], ndim: int):
        super().__init__()
        self.operator = operator
        self.kept, self.ndim = kept, ndim

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        inner = x
        for dim, index in self.kept.items():
            inner = inner.index_select(dim, index)
        if isinstance(self.operator, nn.GroupNorm):
            return _group_norm(x, self.kept[1], self.operator.num_groups, self.operator.weight, self.operator.bias,
                               self.operator.eps)  # fmt: skip
        if self.operator is aten.group_norm.default:
            groups, weight, bias, eps = [*args, None, None, 1e-5][:4] if len(args) < 4 else args[:4]  # type: ignore[misc]
            return _group_norm(x, self.kept[1], groups, weight, bias, eps)  # type: ignore[arg-type]
        if isinstance(self.operator, (nn.LayerNorm, nn.RMSNorm)):
            norm = self.operator
            affine = (norm.weight, getattr(norm, "bias", None))
            rms, shape, eps = isinstance(norm, nn.RMSNorm), norm.normalized_shape, norm.eps
            return self._scattered(x, _normalised(inner, len(shape), eps, rms), affine)
        if self.operator in (aten.layer_norm.default, aten.rms_norm.default):
            rms = self.operator is aten.rms_norm.default
            shape, *rest = args
            affine = (rest[0] if rest else None, rest[1] if len(rest) > 1 and not rms else None)
            eps = rest[1 if rms else 2] if len(rest) > (1 if rms else 2) else (None if rms else 1e-5)
            return self._scattered(x, _normalised(inner, len(shape), eps, rms), affine)  # type: ignore[arg-type]
        return self.operator(inner, *args, **kwargs)  # type: ignore[operator]  # a mean: the axis vanishes

    def _scattered(self, x: Tensor, inner: Tensor, affine: tuple[object, object]) -> Tensor:
        weight, bias = affine
        y = torch.zeros_like(x)
        grid = torch.meshgrid(
            *[self.kept.get(d, torch.arange(n)).to(x.device) for d, n in enumerate(x.shape)], indexing="ij"
        )
        y = y.index_put(grid, inner.to(y.dtype))
        y = y * weight if isinstance(weight, Tensor) else y
        return y + bias if isinstance(bias, Tensor) else y


def _normalised(x: Tensor, count: int, eps: float | None, rms: bool) -> Tensor:
    dims = tuple(range(x.ndim - count, x.ndim))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    if not rms:
        x = x - x.mean(dims, keepdim=True)
    return x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)


def _group_norm(x: Tensor, kept: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``x`` [batch, channels, ...], each group's mean and variance over the kept channels alone."""
    width = x.shape[1] // groups
    y = torch.zeros_like(x)
    for group in range(groups):
        own = kept[(kept >= group * width) & (kept < (group + 1) * width)].to(x.device)
        if len(own):
            inner = x.index_select(1, own)
            y = y.index_copy(1, own, _normalised(inner, inner.ndim - 1, eps, rms=False))
    shape = (1, -1, *[1] * (x.ndim - 2))
    y = y * weight.view(shape) if weight is not None else y
    return y + bias.view(shape) if bias is not None else y
