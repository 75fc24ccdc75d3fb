"""Conditional computation for segments: one whose gate is 0 is not computed, its constant takes its place."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from espalier.graph.constants import hint
from espalier.space.search_space import SearchSpace
from espalier.space.structure import Family
from espalier.sparsify.arguments import Arguments


class Skipping:
    """Runs the traced network without some of its segments.

    >>> from espalier import search_space
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
    ...
    ...     def forward(self, x):
    ...         return self.out(self.a(x) + self.b(x))
    >>> net, x = Net(), torch.randn(3, 4)
    >>> run = Skipping(search_space(net, x))
    >>> torch.allclose(run(["b"], {}, (x,), {}), net.out(net.a(x)))
    True

    ``run(closed, parameters, args, kwargs)``: ``closed`` are names of structures, ``parameters`` take the place of the
    network's own, by name. ``args`` and ``kwargs`` are those that the space was made with, by whatever order and
    keyword, at any batch size: others raise :class:`TrainingError` (see :class:`Arguments`). ``names`` are the
    structures that it can leave out: the segments whose value has no free size but the batch's.
    """

    def __init__(self, space: SearchSpace):
        self.space = space
        self._network = _Network(space.trace.graph_module)
        self._nodes: dict[str, dict[fx.Node, Any]] = {}  # structure → its nodes; the last one with its constant
        for family in space.families:
            ends = [space.graph[i].nodes[-1] for i in family.segments]
            if family.segments and all(_batch_only(n) for n in ends):
                nodes: dict[fx.Node, Any] = {n: None for i in family.segments for n in space.graph[i].nodes}
                nodes |= {end: space.constant(i) for end, i in zip(ends, family.segments, strict=True)}
                self._nodes[family.name] = nodes
        self.names = frozenset(self._nodes)
        self._arguments = Arguments(space.trace, "conditional=True runs the network as traced")

    def __call__(self, closed: Collection[str], parameters: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
        skipped = {node: value for name in closed for node, value in self._nodes.get(name, {}).items()}
        self._network.training = self.space.model.training
        named = {f"network.{name}": tensor for name, tensor in parameters.items()}
        return functional_call(self._network, named, (skipped, self._arguments.leaves(args, kwargs)))


def skipping_of(
    space: SearchSpace, families: Sequence[Family], averages: Sequence[str] = (), per_sample: bool = False
) -> Skipping | None:
    """What leaves out the closed segments of these gated families; None where nothing can be left out.

    ``averages`` are modules that average over gated channels. Warns of the families that it does not reach, and why.
    """
    segments = [f.name for f in families if f.segments]
    why, run = "their output has other free sizes than the batch", None
    if per_sample:
        why = "with per_sample=True only some examples close them"
    elif averages:
        why = f"'{averages[0]}' averages over gated channels: gate levels=('segment',) alone"
    elif segments:
        run = Skipping(space)
    left: dict[str, list[str]] = {}
    for family in families:
        if run is None or family.name not in run.names:
            left.setdefault(f"segment: {why}" if family.segments else family.level, []).append(family.name)
    if left:
        listed = "; ".join(f"{_listed(names)} ({reason})" for reason, names in left.items())
        warnings.warn(
            "conditional=True leaves closed segments out of the computation; a closed gate of these families "
            f"multiplies by 0 and saves nothing: {listed}.",
            stacklevel=3,
        )
    return run if run is not None and run.names else None


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


class _Network(nn.Module):
    def __init__(self, network: fx.GraphModule):
        super().__init__()
        self.network = network

    def forward(self, skipped: Mapping[fx.Node, Any], leaves: list[Any]) -> Any:
        self.network.training = self.training
        out = _Walk(self.network, skipped, leaves).run(*leaves, enable_io_processing=False)
        return self.network.graph.process_outputs(out)


class _Walk(fx.Interpreter):
    def __init__(self, network: fx.GraphModule, skipped: Mapping[fx.Node, Any], leaves: list[Any]):
        super().__init__(network)
        first = next(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim)
        self.skipped, self.like, self.mode = skipped, first, network.training

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.skipped:
            return super().run_node(n)
        constant = self.skipped[n]
        if constant is None:
            return None
        value = constant.trained if self.mode else constant.evaluated
        full = n.meta["val"]
        shape = [len(self.like) if isinstance(s, torch.SymInt) else int(s) for s in full.shape]
        return value.to(self.like.device).expand(shape)


def _batch_only(node: fx.Node) -> bool:
    """Whether the value has one free dimension at most, the batch in front."""
    value = node.meta["val"]
    if not isinstance(value, Tensor) or any(isinstance(s, torch.SymInt) for s in value.shape[1:]):
        return False
    inputs = [n.meta.get("val") for n in node.graph.nodes if n.op == "placeholder"]
    given = next((v for v in inputs if isinstance(v, Tensor) and v.ndim), None)
    if given is None or not value.ndim:
        return False
    return not isinstance(value.shape[0], torch.SymInt) or hint(value.shape[0]) == hint(given.shape[0])
