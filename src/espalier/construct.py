"""The sub-network of a solution, as an ordinary module."""

import copy

from torch import fx, nn

from espalier.graph.fold import fold_scalars
from espalier.own_class import in_own_class
from espalier.space.reduce import reduced
from espalier.space.search_space import SearchSpace
from espalier.space.solution import Solution


def construct(space: SearchSpace, solution: Solution) -> nn.Module:
    """The network without the removed structures, as an ordinary ``nn.Module`` with parameters of its own.

    >>> import torch
    >>> from espalier import search_space
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
    ...
    ...     def forward(self, x):
    ...         return self.out(self.a(x) + self.b(x))
    >>> space = search_space(Net(), (torch.randn(3, 4),))
    >>> small = construct(space, space.solution(removed=["b"]))
    >>> sum(p.numel() for p in small.parameters())
    30

    Its output equals that of ``space.masked(solution)``, in eval and in train mode. It is an instance of the
    model's own class where that class can express the result, else an ``fx.GraphModule`` over the model's own
    layers. Raises :class:`InvalidSolution` if the solution is of another space or not valid.
    """
    space.check(solution)
    model = space.masked(solution) if solution.masks else copy.deepcopy(space.model)
    scalars = space.trace.scalars
    if not solution.removed and not scalars:
        return model
    lifted = reduced(space.trace, space.graph, space.segments_of(solution.removed), space.constant, model)
    _out_of_place(lifted.module)
    if scalars:  # the model is a graph already: there is no class to keep
        fold_scalars(lifted.module, scalars)
    small = lifted.module if scalars else in_own_class(space.trace, model, lifted) or lifted.module
    _forget_shapes(small)
    return small


def _out_of_place(small: fx.GraphModule) -> None:
    """A layer that writes in place must not write into what something else reads."""
    for node in small.graph.nodes:
        if node.op != "call_module":
            continue
        layer, source = small.get_submodule(str(node.target)), node.args[0] if node.args else None
        private = isinstance(source, fx.Node) and len(source.users) == 1 and source.op == "call_module"
        if getattr(layer, "inplace", False) and not private:
            layer.inplace = False  # type: ignore[assignment]


def _forget_shapes(small: nn.Module) -> None:
    """The traced values hang on the full network: keep only where each node comes from."""
    for module in small.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
