"""The last linear operators of a segment: multiplied by a gate, they multiply what the segment yields, once."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from espalier.graph.constants import ANNIHILATING
from espalier.graph.lift import is_tensor
from espalier.space.search_space import SearchSpace
from espalier.space.structure import Family, Slices

aten = torch.ops.aten
LINEAR = (
    nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag,
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
)  # fmt: skip
MOVES = {
    aten.view.default, aten.reshape.default, aten.permute.default, aten.transpose.int, aten.clone.default,
    aten.contiguous.default, aten.unflatten.int, aten.flatten.using_ints, aten.squeeze.dim, aten.unsqueeze.default,
    aten.expand.default, aten.select.int, aten.slice.Tensor, aten.to.dtype,
}  # fmt: skip
# Of a multiple they make the same multiple: through them a parameter is seen.
_MULTIPLES = MOVES | {
    aten.t.default, aten.squeeze.default, aten.expand_as.default, aten.repeat.default, aten.neg.default,
}  # fmt: skip
# Of zeros (in their first argument) they make zeros.
_KEEP_ZEROS = _MULTIPLES | {
    aten.relu.default, aten.relu_.default, aten.leaky_relu.default, aten.gelu.default, aten.silu.default,
    aten.tanh.default, aten.dropout.default, aten.mean.dim, aten.sum.dim_IntList, aten.mul.Tensor, aten.div.Tensor,
    operator.getitem,
}  # fmt: skip
_KEEPING_ZEROS = (
    nn.Identity, nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.Flatten, nn.Unflatten, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd, nn.Upsample,
)  # fmt: skip
_BIAS: dict[object, int] = {
    aten.linear.default: 2, aten.addmm.default: 0, aten.baddbmm.default: 0, aten.layer_norm.default: 3,
    aten.group_norm.default: 3, aten.batch_norm.default: 2, aten.instance_norm.default: 2,
    **{t: 2 for t in ANNIHILATING if "conv" in str(t)},
}  # fmt: skip
_SUMS = {aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.cat.default, aten.stack.default}


def last_linear(space: SearchSpace, family: Family) -> tuple[Slices, ...] | None:
    """The slices of a family of segments that its gate multiplies; None where no such set exists.

    >>> from espalier.space.search_space import search_space
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.norm, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True)
    ...         self.out = nn.Linear(4, 2)
    ...
    ...     def forward(self, x):
    ...         y = self.norm(x)
    ...         return self.out(x + self.attention(y, y, y, need_weights=False)[0])
    >>> space = search_space(Net(), torch.randn(2, 3, 4))
    >>> [s.parameter for s in last_linear(space, space.families[0])]
    ['attention.out_proj.weight', 'attention.out_proj.bias']

    They are found on the graph alone, so that training cannot change them: every way from the segment's input to its
    output leads through one operator that is linear in them, and whatever is added behind it is among them. At zero
    they silence the segment exactly as all its parameters do. What lies behind that operator acts on the product: a
    ReLU lets the factor through, a sigmoid does not. An LSTM's output is no multiple of any of its parameters, nor is
    that of one layer used twice in a row: then there is no such set.
    """
    roles = _Roles(space, family)
    multiplied: dict[fx.Node, frozenset[str]] = {}
    for segment in family.segments:
        found = _of_run(roles, space.graph[segment].nodes)
        if found is None:
            return None
        multiplied |= found
    names = frozenset[str]().union(*multiplied.values())
    for segment in family.segments:
        for node in space.graph[segment].nodes:
            if roles.parameters(node) & names != multiplied.get(node, frozenset()):
                return None
    return tuple(s for s in family.slices if s.parameter in names)


@dataclass(frozen=True)
class _Role:
    """What a node of a run does with the gated value, and which of its parameters the gate multiplies."""

    names: frozenset[str] = frozenset()
    ends: bool = False  # it is linear in them: nothing before it need be multiplied
    keeps_zeros: bool = True  # of zeros (where it ends: once ``names`` are zero) it makes zeros
    multiplies: bool = False  # by parameters that the gate leaves alone: they vanish where zeros come in


def _of_run(roles: "_Roles", nodes: Sequence[fx.Node]) -> dict[fx.Node, frozenset[str]] | None:
    """Node → the parameters of it to multiply, from the end of a run back to its last linear operator."""
    behind: list[_Role] = []
    found: dict[fx.Node, frozenset[str]] = {}
    for node in reversed(nodes):
        role = roles(node)
        if role is None:
            return None
        found[node] = role.names
        behind.append(role)
        if role.ends:
            return found if _silent(behind[::-1]) else None
    return None


def _silent(roles: Sequence[_Role]) -> bool:
    """Whether parameters that are not multiplied are met by zeros alone, once those of the first operator are zero."""
    zero = True
    for role in roles:
        if role.multiplies and not zero:
            return False
        zero = zero and role.keeps_zeros
    return True


class _Roles:
    def __init__(self, space: SearchSpace, family: Family):
        self.flow, self.root = space.graph.segment_of, space.trace.graph_module
        wanted = set(family.parameters)
        self.names = {id(p): name for name, p in space.model.named_parameters() if name in wanted}

    def __call__(self, node: fx.Node) -> _Role | None:
        """None where the node reads parameters in a way that is not known to be linear."""
        own = self.parameters(node)
        if node.op == "call_module":
            return self._of_layer(self.root.get_submodule(str(node.target)), own)
        return self._of_operator(node, own) if own else _unparametrized(node)

    def parameters(self, node: fx.Node) -> frozenset[str]:
        """The family's parameters that a node reads, through operators that read parameters alone."""
        if node.op == "get_attr":
            return self._known([_attribute(self.root, str(node.target))])
        layer = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        own = frozenset() if layer is None else self._known(layer.parameters())
        beside = [n for n in node.all_input_nodes if not self._is_data(n)]
        return own.union(*(self.parameters(n) for n in beside))

    def _known(self, tensors: Iterable[object]) -> frozenset[str]:
        return frozenset(self.names[id(t)] for t in tensors if id(t) in self.names)

    def _is_data(self, node: fx.Node) -> bool:
        return node in self.flow or node.op == "placeholder" or not (node.op == "get_attr" or is_tensor(node))

    def _of_layer(self, layer: nn.Module, own: frozenset[str]) -> _Role | None:
        if not own:
            return _Role(keeps_zeros=isinstance(layer, _KEEPING_ZEROS))
        if isinstance(layer, nn.PReLU):
            return _Role(multiplies=True)
        last = layer.out_proj if isinstance(layer, nn.MultiheadAttention) else layer
        if not isinstance(last, LINEAR):
            return None
        names = self._known(last.parameters(recurse=False))
        if self._known([last.weight]):
            return _Role(names, ends=True, keeps_zeros=len(names) == len(list(last.parameters(recurse=False))))
        return _Role(names) if names == own else None

    def _of_operator(self, node: fx.Node, own: frozenset[str]) -> _Role | None:
        if node.target in _SUMS:
            return self._of_sum(node)
        if node.target not in ANNIHILATING:
            return None
        at = _BIAS.get(node.target)
        bias = self._multiple(node.args[at]) if at is not None and at < len(node.args) else frozenset()
        if bias is None:
            return None
        plain = bool(bias) or at is None or at >= len(node.args) or node.args[at] is None  # no bias that stays
        factors = [n for n in _nodes([a for i, a in enumerate(node.args) if i != at]) if not self._is_data(n)]
        candidates = _nodes([node.args[i] for i in ANNIHILATING[node.target] if i < len(node.args)])
        for candidate in candidates:
            weight, others = self._multiple(candidate), [f for f in factors if f is not candidate]
            if weight and not weight & frozenset[str]().union(*map(self.parameters, others)):
                return _Role(weight | bias, ends=True, keeps_zeros=plain)
        return _Role(bias, keeps_zeros=plain, multiplies=own != bias)

    def _of_sum(self, node: fx.Node) -> _Role | None:
        terms = [term for term in _nodes(node.args) if not self._is_data(term)]
        found = [self._multiple(term) for term in terms]
        if None in found:
            return None
        return _Role(frozenset[str]().union(*(f for f in found if f)), keeps_zeros=all(found))

    def _multiple(self, value: object) -> frozenset[str] | None:
        """Parameters of which a value is a multiple; none for a value without parameters, None where unknown."""
        if not isinstance(value, fx.Node) or self._is_data(value):
            return frozenset()
        every = self.parameters(value)
        if value.op == "get_attr" or not every:
            return every
        if value.target in _MULTIPLES:
            return self._multiple(value.args[0])
        if value.target is not aten.mul.Tensor:
            return None
        factors = _nodes(value.args)
        found = next(filter(None, map(self._multiple, factors)), None)
        again = sum(bool(found and found & self.parameters(f)) for f in factors) > 1
        return None if again else found


def _unparametrized(node: fx.Node) -> _Role | None:
    """Of a layer with several outputs only the first is linear in its last weights (attention's weights are not)."""
    if node.target is operator.getitem and node.args[1] != 0 and node.all_input_nodes[0].op == "call_module":
        return None
    return _Role(keeps_zeros=node.target in _KEEP_ZEROS)


def _attribute(root: nn.Module, path: str) -> object:
    value: object = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _nodes(values: object) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(values, found.append)  # type: ignore[arg-type]
    return found
