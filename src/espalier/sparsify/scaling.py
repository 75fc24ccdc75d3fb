"""Which parameters a structure's gate multiplies, so that its output is multiplied by the gate once.

A closed gate must leave the masked network: every slice of the structure at zero. Often fewer slices do the same.
Before a batch norm whose scale and shift belong to the structure, the convolution need not be touched (and its
running statistics then stay those of the open structure); in attention the values suffice, without queries and
keys; in a segment its last linear operators.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import fx, nn

from espalier.graph.lift import is_tensor
from espalier.space.search_space import SearchSpace
from espalier.space.structure import Family, Slices
from espalier.sparsify.last_linear import LINEAR, MOVES, last_linear

aten = torch.ops.aten
_PER_CHANNEL = (nn.modules.batchnorm._NormBase,)


def scaled_slices(space: SearchSpace, family: Family) -> tuple[Slices, ...]:
    """The slices of a family that its gates multiply; at zero they silence a structure as all its slices do.

    >>> from espalier.space.search_space import search_space
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    >>> space = search_space(net, torch.randn(2, 3, 5, 5), levels=("channel",))
    >>> [s.parameter for s in space.families[0].slices]
    ['0.weight', '0.bias', '1.weight', '1.bias']
    >>> [s.parameter for s in scaled_slices(space, space.families[0])]
    ['1.weight', '1.bias']
    """
    if family.segments:
        return last_linear(space, family) or family.slices
    if family.components is None:
        return family.slices
    return tuple(_in_channels(space, family))


def _parameters(space: SearchSpace, node: fx.Node) -> list[str]:
    if node.op != "call_module":
        return []
    layer = space.trace.graph_module.get_submodule(str(node.target))
    if not isinstance(layer, LINEAR):
        return []
    own = {id(p): name for name, p in space.model.named_parameters()}
    return [own[id(p)] for p in layer.parameters(recurse=False) if id(p) in own]


def _in_channels(space: SearchSpace, family: Family) -> Iterator[Slices]:
    """Without what every reader sees only through a norm or an attention that the rest has silenced."""
    writers: dict[str, list[fx.Node]] = {}
    for node in space.trace.graph.nodes:
        for name in _parameters(space, node):
            writers.setdefault(name, []).append(node)
    slices = {s.parameter for s in family.slices}
    absorbed: dict[fx.Node, bool] = {}
    modules = dict(space.model.named_modules())
    for s in family.slices:
        parent, _, name = s.parameter.rpartition(".")
        attention = modules.get(parent)
        if isinstance(attention, nn.MultiheadAttention):
            if name in ("q_proj_weight", "k_proj_weight", "bias_k"):
                continue
            if name.startswith("in_proj") and s.owner is not None:
                owner = s.owner.clone()
                owner[: 2 * attention.embed_dim] = -1  # queries and keys
                yield replace(s, owner=owner)
                continue
        nodes = writers.get(s.parameter, [])
        for node in nodes:
            if node not in absorbed:
                absorbed[node] = _absorbed(space, node, slices)
        if not nodes or not all(absorbed[node] for node in nodes):
            yield s


def _absorbed(space: SearchSpace, writer: fx.Node, slices: set[str]) -> bool:
    """Whether all ways from the node lead into a norm or an attention whose own slices yield zeros."""
    pending: list[fx.Node] = [writer]
    while pending:
        node = pending.pop()
        if not node.users:
            return False
        for user in node.users:
            if not is_tensor(user):
                return False
            if _norm_silences(space, user, slices) or _attention_silences(space, node, user, slices):
                continue
            if user.target not in MOVES:
                return False
            pending.append(user)
    return True


def _norm_silences(space: SearchSpace, node: fx.Node, slices: set[str]) -> bool:
    if node.op != "call_module":
        return False
    layer = space.trace.graph_module.get_submodule(str(node.target))
    names = _parameters(space, node)
    return isinstance(layer, _PER_CHANNEL) and len(names) == 2 and slices.issuperset(names)


def _attention_silences(space: SearchSpace, source: fx.Node, node: fx.Node, slices: set[str]) -> bool:
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    query, key, value = node.args[:3]
    return source in (query, key) and source is not value and _zero(space, value, slices)


def _zero(space: SearchSpace, node: object, slices: set[str]) -> bool:
    """Whether the value is all zeros once the slices are: a linear layer's output, moved about."""
    while isinstance(node, fx.Node) and node.target in MOVES:
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return False
    names = _parameters(space, node)
    return bool(names) and slices.issuperset(names)


def elements(slices: Sequence[Slices], shapes: dict[str, torch.Size], count: int) -> torch.Tensor:
    """Number of parameter elements of every structure of a family, float64 [count]."""
    total = torch.zeros(count + 1, dtype=torch.float64)
    for s in slices:
        numel = shapes[s.parameter].numel()
        if s.owner is None:
            total[0] += numel
            continue
        owner = torch.where(s.owner < 0, count, s.owner).flatten()
        total.index_add_(0, owner, torch.full(owner.shape, numel / len(owner), dtype=torch.float64))
    return total[:-1]
