"""What a run of nodes yields once its parameters are zero.

A removed structure is one whose parameters are all zero. Its output no longer depends on its input as soon as
the data meets an operator that a zero parameter annihilates (a convolution, a norm's scale, a product). What
the run yields from there on is a constant: mostly zero, but a half after a sigmoid.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from espalier.graph.lift import is_tensor
from espalier.graph.trace import Trace
from espalier.modes import keeping_modes

aten = torch.ops.aten

# Operator → positions of the arguments of which one that is all zeros makes the result independent of the rest.
ANNIHILATING: dict[object, tuple[int, ...]] = {
    aten.conv1d.default: (1,),
    aten.conv2d.default: (1,),
    aten.conv3d.default: (1,),
    aten.conv1d.padding: (1,),
    aten.conv2d.padding: (1,),
    aten.conv3d.padding: (1,),
    aten.conv_transpose1d.default: (1,),
    aten.conv_transpose2d.input: (1,),
    aten.conv_transpose3d.input: (1,),
    aten.linear.default: (1,),
    aten.mul.Tensor: (0, 1),
    aten.div.Tensor: (0,),
    aten.matmul.default: (0, 1),
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.einsum.default: (1,),
    aten.embedding.default: (0,),
    aten.layer_norm.default: (2,),
    aten.group_norm.default: (2,),
    aten.batch_norm.default: (1,),
    aten.instance_norm.default: (1,),
    aten.rms_norm.default: (2,),
    aten.scaled_dot_product_attention.default: (2,),
}

# Operators that keep an all-zero tensor all zero, used to see a zero parameter through its reshapes.
_KEEP_ZERO = {
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.expand.default,
    aten.expand_as.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.flatten.using_ints,
    aten.clone.default,
    aten.neg.default,
    aten.to.dtype,
    aten.repeat.default,
}

_ZERO_WEIGHT = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor that no longer depends on the input, shrunk to size 1 along every axis on which it is uniform.

    Some operators (a batch norm without scale) give one value in eval and another in train mode.
    """

    evaluated: torch.Tensor
    trained: torch.Tensor

    @property
    def is_zero(self) -> bool:
        return not self.evaluated.any() and not self.trained.any()

    @property
    def alike(self) -> bool:
        """Whether both modes give the same value."""
        return self.evaluated.shape == self.trained.shape and torch.equal(self.evaluated, self.trained)


def annihilator(trace: Trace, nodes: Sequence[fx.Node], zeroed: frozenset[str]) -> int | None:
    """Index of the first node of a run whose output is constant once the parameters ``zeroed`` are zero."""
    for i, node in enumerate(nodes):
        if node.op == "call_module":
            if _module_annihilates(trace.graph_module.get_submodule(str(node.target)), str(node.target), zeroed):
                return i
        elif node.target in ANNIHILATING:
            for position in ANNIHILATING[node.target]:
                if position < len(node.args) and _any_zero(node.args[position], zeroed):
                    return i
    return None


def last_annihilator(trace: Trace, nodes: Sequence[fx.Node], zeroed: frozenset[str]) -> int | None:
    """The last of a run's nodes from which on it is constant: the least that is left to evaluate."""
    run = set(nodes)
    for i in range(len(nodes) - 1, -1, -1):
        if annihilator(trace, nodes[i : i + 1], zeroed) is not None:
            return i
        if [n for n in nodes[i].all_input_nodes if n in run] != [*nodes[max(i - 1, 0) : i]]:
            break  # a branch: an earlier annihilator need not lie on all of its ways
    return annihilator(trace, nodes, zeroed)


def _module_annihilates(module: nn.Module, path: str, zeroed: frozenset[str]) -> bool:
    if isinstance(module, _ZERO_WEIGHT):
        return f"{path}.weight" in zeroed
    if isinstance(module, nn.MultiheadAttention):
        return f"{path}.out_proj.weight" in zeroed
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return all(f"{path}.{name}" in zeroed for name, _ in module.named_parameters())
    return False


def _any_zero(argument: object, zeroed: frozenset[str]) -> bool:
    if isinstance(argument, (tuple, list)):
        return any(_any_zero(a, zeroed) for a in argument)
    if not isinstance(argument, fx.Node):
        return False
    if argument.op == "get_attr":
        return argument.target in zeroed
    return argument.target in _KEEP_ZERO and _any_zero(argument.args[0], zeroed)


def constant_output(trace: Trace, nodes: Sequence[fx.Node], zeroed: frozenset[str]) -> Constant | str:
    """What the run ``nodes`` yields once the parameters ``zeroed`` are zero, or why it is not a constant.

    The run is evaluated from an annihilator on, in both modes, on zeros of the example inputs' shape.
    """
    start = last_annihilator(trace, nodes, zeroed)
    if start is None:
        return "its output still depends on its input when its parameters are zero"
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        values = []
        for seed, training in ((0, False), (0, True), (1, True)):
            torch.manual_seed(seed)
            value = Evaluator(trace, zeroed, training).run(nodes[start:])
            if not isinstance(value, torch.Tensor):
                return "it yields several tensors"
            values.append(shrink(value))
    evaluated, trained, again = values
    if trained.shape != again.shape or not torch.equal(trained, again):
        return "its output is random in train mode even when its parameters are zero (dropout of a constant)"
    if not (evaluated.isfinite().all() and trained.isfinite().all()):
        return "its output is not finite when its parameters are zero"
    return Constant(evaluated, trained)


def shrink(tensor: torch.Tensor) -> torch.Tensor:
    """Size 1 along every axis on which the tensor is uniform."""
    for dim in range(tensor.ndim):
        if tensor.shape[dim] > 1 and torch.equal(tensor.narrow(dim, 0, 1).expand_as(tensor), tensor):
            tensor = tensor.narrow(dim, 0, 1)
    return tensor.clone()


class Evaluator:
    """Runs single nodes of a trace on zeros, with some parameters at zero; the model itself stays untouched."""

    def __init__(self, trace: Trace, zeroed: Iterable[str] = (), training: bool = False):
        self.root = trace.graph_module
        self.zeroed = frozenset(zeroed)
        self.training = training
        self.values: dict[fx.Node, object] = {}

    def run(self, nodes: Sequence[fx.Node]) -> object:
        for node in nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
            self.values[node] = self.call(node, args, kwargs)
        return self.values[nodes[-1]]

    def value(self, node: fx.Node) -> Any:
        if node not in self.values:
            self.values[node] = self._outside(node)
        return self.values[node]

    def _outside(self, node: fx.Node) -> object:
        if node.op == "get_attr":
            if node.target == "training":
                return self.training
            return self._attribute(str(node.target))
        if not is_tensor(node):
            return hint(node.meta.get("val"))
        if _rests_on_attributes(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
            return self.call(node, args, kwargs)
        return zeros_like_value(node.meta["val"], next(self.root.parameters()).device)

    def _attribute(self, target: str) -> object:
        value: object = self.root
        for part in target.split("."):
            value = getattr(value, part)
        if target in self.zeroed and isinstance(value, torch.Tensor):
            return torch.zeros_like(value)
        return value.detach().clone() if isinstance(value, torch.Tensor) else value

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        if node.op != "call_module":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        module = self.root.get_submodule(str(node.target))
        if self._yields_zero(node, module):
            return zeros_like_value(node.meta["val"], next(self.root.parameters()).device)
        state = {
            name: torch.zeros_like(t) if f"{node.target}.{name}" in self.zeroed else t.detach().clone()
            for name, t in (*module.named_parameters(), *module.named_buffers())
        }
        with keeping_modes(module):
            module.train(self.training)
            return torch.func.functional_call(module, state, args, kwargs)

    def _yields_zero(self, node: fx.Node, module: nn.Module) -> bool:
        """A layer all of whose parameters are zero need not be run. (Attention may return its weights too.)"""
        names = [f"{node.target}.{name}" for name, _ in module.named_parameters()]
        known = isinstance(module, _ZERO_WEIGHT) and f"{node.target}.weight" in names
        if isinstance(module, nn.MultiheadAttention):
            value = node.meta.get("val")
            known = isinstance(value, torch.Tensor) or (
                isinstance(value, (tuple, list)) and all(v is None for v in value[1:])
            )
        return known and "val" in node.meta and self.zeroed.issuperset(names)


def _rests_on_attributes(node: fx.Node) -> bool:
    """Whether the node can be computed without any input of the model."""
    pending, seen = [node], set()
    while pending:
        at = pending.pop()
        if at.op == "placeholder" and is_tensor(at):
            return False
        if at not in seen and is_tensor(at):
            seen.add(at)
            pending += at.all_input_nodes
    return True


def hint(value: object) -> object:
    """The example's number for a symbolic size."""
    if isinstance(value, torch.SymInt):
        return int(value.node.hint) if value.node.hint is not None else 2
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        return value.node.hint
    return value


def shape_of(value: torch.Tensor) -> list[int]:
    """The example's shape of a traced value, symbols replaced by the example's numbers."""
    return [int(hint(s)) for s in value.shape]  # type: ignore[call-overload]


def zeros_like_value(value: object, device: torch.device) -> object:
    if isinstance(value, (tuple, list)):
        return tuple(zeros_like_value(v, device) for v in value)
    if isinstance(value, torch.Tensor):
        return torch.zeros(shape_of(value), dtype=value.dtype, device=device)
    return hint(value)
