"""The traced network whose norms and means over gated axes take their statistics over the open structures."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from espalier.errors import TrainingError
from espalier.graph.lift import stack_of
from espalier.graph.module import graph_module
from espalier.graph.trace import root_for
from espalier.space.search_space import SearchSpace
from espalier.space.solution import Solution
from espalier.sparsify.arguments import Arguments

aten = torch.ops.aten


def over_what_stays(space: SearchSpace, solution: Solution) -> nn.Module:
    """What computes as the sub-network of a solution will, over the full model's own parameters.

    >>> from espalier import construct, search_space
    >>> model, x = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), torch.randn(3, 4)
    >>> space = search_space(model, x, levels=("channel",))
    >>> solution = space.solution(["0[0]", "0[5]"])
    >>> model.load_state_dict(space.zero_parameters(solution).state_dict())
    <All keys matched successfully>
    >>> torch.allclose(over_what_stays(space, solution)(x), construct(space, solution)(x), atol=1e-6)
    True

    A model whose removed structures are at zero computes that already, unless a norm or a mean goes over one of the
    removed axes: it counts the zeros, and the sub-network does not. So after any method that leaves zeros in the model
    (``SpaceGates.finish``, ``ProxSGD.snap``, H2SPG), this is what to evaluate. It is the model itself where there is
    no such norm, else the traced network, whose norms and means take their statistics over what stays.

    It shares the model's parameters, so that unlike ``space.masked`` it copies nothing and puts nothing at zero. The
    traced network takes the arguments that the space was made with, at any batch size; others raise
    :class:`TrainingError`, as does another operator that averages over such an axis. Raises
    :class:`InvalidSolution` for a solution of another space.
    """
    space.check(solution)
    stays = torch.ones(len(space) + 1, dtype=torch.bool, device=next(space.model.parameters()).device)
    stays[[space.position(name) for name in solution.removed]] = False
    network = statistics_over_open(space, ~stays.cpu(), lambda: stays)
    return space.model if network is None else network


def statistics_over_open(space: SearchSpace, closable: Tensor, is_open: Callable[[], Tensor]) -> fx.GraphModule | None:
    """The traced network, over the model's own parameters; None where no norm averages over an axis that may close.

    ``closable`` and ``is_open()`` have one bool per structure of the space, and a last one: false, and true.
    """
    affected = _affected(space, closable)
    if not affected:
        return None
    graph, new = fx.Graph(), {}
    graph.set_codegen(copy.copy(space.trace.graph._codegen))
    root = root_for(space.model, space.trace.graph)
    for node in space.trace.graph.nodes:
        if node not in affected:
            new[node] = graph.node_copy(node, lambda n: new[n])
            if node.target is aten.sym_size.int:
                new[node].target = size_of  # the operator has no rule for vmap
            continue
        name = f"{node.name}_over_open"
        layer = root.get_submodule(str(node.target)) if node.op == "call_module" else None
        root.add_module(name, _OverOpen(_formula(node, layer), affected[node], node, is_open))
        affine = [
            graph.get_attr(f"{node.target}.{part}") if getattr(layer, part, None) is not None else None
            for part in ("weight", "bias")
        ]
        if layer is None:
            affine = list(fx.map_arg(_affine_of(node), lambda n: new[n]))
        new[node] = graph.call_module(name, (new[node.all_input_nodes[0]], *affine))
    made = graph_module(root, graph, type(space.model).__name__)
    made.training = space.model.training
    bound = Arguments(
        space.trace,
        f"'{averages(space, closable)[0]}' averages over channels that close, and then the network runs as traced",
    )
    made.register_forward_pre_hook(lambda _, args, kwargs: bound.call(args, kwargs), with_kwargs=True)
    return made


def averages(space: SearchSpace, closable: Tensor) -> list[str]:
    """Dotted paths of the modules that average over an axis that may close."""
    stacks = [stack_of(node)[-1:] for node in _affected(space, closable)]
    return list(dict.fromkeys(".".join(path for _, path in stack) or "<root>" for stack in stacks))


def size_of(x: Tensor, dim: int) -> int:
    """``x.shape[dim]``."""
    return x.shape[dim]


def _affected(space: SearchSpace, closable: Tensor) -> dict[fx.Node, dict[int, Tensor]]:
    """Norm or mean → axis → the structure of each index, ``len(space)`` for what cannot close."""
    found: dict[fx.Node, dict[int, Tensor]] = {}
    structure_of = _structure_of_component(space)
    for node, dims in space.axes.statistics.items():
        labels = space.axes.labels.get(node.all_input_nodes[0])
        if labels is None or structure_of is None:
            continue
        own = {d: structure_of[torch.from_numpy(labels[d])] for d in dims if labels[d] is not None}
        own = {d: torch.where(closable[s], s, len(space)) for d, s in own.items() if bool(closable[s].any())}
        if own:
            found[node] = own
    return found


def _structure_of_component(space: SearchSpace) -> Tensor | None:
    """Component → structure, ``len(space)`` for what no structure holds."""
    pairs = [
        (torch.from_numpy(f.components), int(at))
        for f, at in zip(space.families, space.structures.offsets, strict=False)
        if f.components is not None
    ]
    if not pairs:
        return None
    labelled = [int(a.max()) for n in space.axes.statistics for a in space.axes.labels.get(n.all_input_nodes[0], [])
                if a is not None]  # fmt: skip
    count = 1 + max([*(int(c.max()) for c, _ in pairs), *labelled])
    structure = torch.full((count,), len(space))
    for components, at in pairs:
        structure[components] = torch.arange(len(components)) + at
    return structure


Formula = Callable[[Tensor, Tensor, "Tensor | None", "Tensor | None"], Tensor]


class _OverOpen(nn.Module):
    def __init__(self, formula: Formula, gates: dict[int, Tensor], node: fx.Node, is_open: Callable[[], Tensor]):
        super().__init__()
        self.formula, self.gates, self.is_open = formula, gates, is_open
        self.ndim = node.all_input_nodes[0].meta["val"].ndim

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)  # torch's own norms sum half precision up in single
        is_open, mask = self.is_open(), torch.ones((), dtype=wide, device=x.device)
        for dim, gates in self.gates.items():
            if gates.device != is_open.device:
                gates = self.gates[dim] = gates.to(is_open.device)  # once
            shape = [1] * self.ndim
            shape[dim] = -1
            mask = mask * is_open[gates].to(mask).view(shape)
        y, kind = self.formula(x, mask, weight, bias), x.dtype
        for given in (weight, bias):
            kind = kind if given is None else torch.promote_types(kind, given.dtype)
        return y.to(kind)


def _formula(node: fx.Node, layer: nn.Module | None) -> Formula:
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return _last_axes(len(layer.normalized_shape), layer.eps, isinstance(layer, nn.RMSNorm))
    if isinstance(layer, nn.GroupNorm):
        return _groups(layer.num_groups, layer.eps)
    if node.target is aten.layer_norm.default:
        eps = node.args[4] if len(node.args) > 4 else 1e-5
        return _last_axes(len(node.args[1]), eps, False)  # type: ignore[arg-type]
    if node.target is aten.rms_norm.default:
        eps = node.args[3] if len(node.args) > 3 else None
        return _last_axes(len(node.args[1]), eps, True)  # type: ignore[arg-type]
    if node.target is aten.group_norm.default:
        return _groups(node.args[1], node.args[4] if len(node.args) > 4 else 1e-5)  # type: ignore[arg-type]
    if node.target is aten.mean.dim:
        keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
        return _mean(tuple(node.args[1]), keep)  # type: ignore[arg-type]
    where = ".".join(path for _, path in stack_of(node)[-1:]) or "<root>"
    raise TrainingError(
        f"module '{where}': {node.target} averages over an axis that gates would close, and gates know layer, group "
        f"and RMS norms and means only: protect it with keep=['{where}'] in search_space()."
    )


def _affine_of(node: fx.Node) -> list[Any]:
    if node.target is aten.mean.dim:
        return [None, None]
    args = [*node.args[2:], None, None]
    return [args[0], None if node.target is aten.rms_norm.default else args[1]]


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _count(mask: Tensor, x: Tensor, dims: Sequence[int]) -> Tensor:
    """How many open elements each statistic is over, without expanding the mask."""
    shape = [1] * (x.ndim - mask.ndim) + list(mask.shape)
    closed = 1
    for d in dims:
        closed *= x.shape[d] if shape[d % x.ndim] == 1 else 1
    return mask.reshape(shape).sum(tuple(dims), keepdim=True).clamp_min(1.0) * closed


def _normalised(x: Tensor, mask: Tensor, dims: tuple[int, ...], eps: float | None, rms: bool) -> Tensor:
    count, x = _count(mask, x, dims), x.to(mask)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    if not rms:
        x = x - (x * mask).sum(dims, keepdim=True) / count
    x = x * mask
    return x * torch.rsqrt(x.square().sum(dims, keepdim=True) / count + eps)


def _last_axes(count: int, eps: float | None, rms: bool) -> Formula:
    dims = tuple(range(-count, 0))
    return lambda x, mask, weight, bias: _affine(_normalised(x, mask, dims, eps, rms), weight, bias)


def _groups(groups: int, eps: float) -> Formula:
    def apply(x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        grid = (groups, x.shape[1] // groups)
        inner, own = x.unflatten(1, grid), mask.expand(*mask.shape).unflatten(1, grid)
        y = _normalised(inner, own, tuple(range(2, inner.ndim)), eps, False).flatten(1, 2)
        shape = (1, -1, *[1] * (x.ndim - 2))
        return _affine(y, None if weight is None else weight.view(shape), None if bias is None else bias.view(shape))

    return apply


def _mean(dims: tuple[int, ...], keep: bool) -> Formula:
    def apply(x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        mean = (x.to(mask) * mask).sum(dims, keepdim=True) / _count(mask, x, dims)
        return mean if keep else mean.squeeze(dims)

    return apply
