"""A call's arguments in the places of the trace's examples: bound by name, and refused where they are others."""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from espalier.errors import TrainingError
from espalier.graph.trace import Trace, signature_of


class Arguments:
    """Brings the arguments of a call into the order in which the trace takes them.

    >>> from torch import nn
    >>> from espalier.graph.trace import trace
    >>> class Net(nn.Module):
    ...     def forward(self, a, b=None):
    ...         return self.f(a) - b
    >>> net = Net()
    >>> net.f = nn.Linear(2, 2)
    >>> bound = Arguments(trace(net, (torch.ones(3, 2),), {"b": torch.zeros(3, 2)}), "this runs the traced network")
    >>> a, b = torch.ones(5, 2), torch.zeros(5, 2)
    >>> [leaf is given for leaf, given in zip(bound.leaves((), {"b": b, "a": a}), (a, b))]
    [True, True]

    A trace has fixed its arguments, all of their sizes but the batch's, and whatever is no tensor: a call with others
    raises :class:`TrainingError`, which names the argument and says ``why`` the traced network runs.
    """

    def __init__(self, trace: Trace, why: str):
        self._model, self._why = type(trace.model).__name__, why
        self._signature = signature_of(trace.model)
        self._examples, self._form = pytree.tree_flatten((trace.args, trace.kwargs))
        self._shapes = [
            tuple(_fixed(s) for s in n.meta["val"].shape) if isinstance(n.meta.get("val"), Tensor) else ()
            for n in trace.graph.nodes
            if n.op == "placeholder"
        ]
        args, kwargs = pytree.tree_unflatten(list(range(len(self._examples))), self._form)
        named = _named(self._signature.bind(*args, **kwargs))
        self._places = {name: pytree.tree_flatten(tree) for name, tree in named.items()}

    def leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """What the trace's placeholders take, in their order."""
        try:
            given = _named(self._signature.bind(*args, **kwargs))
        except TypeError as error:
            raise self._refusal(
                "the arguments", f"do not fit {self._model}.forward{self._signature}: {error}"
            ) from None
        for name, value in given.items():
            if name not in self._places and not self._is_default(name, value):
                raise self._refusal(f"argument '{name}'", "is none that the search space was made with")
        found = list(self._examples)
        for name, (places, form) in self._places.items():
            if name in given:
                for place, leaf in zip(places, self._parts(name, form, given[name]), strict=True):
                    found[place] = self._checked(name, place, leaf)
            elif not self._is_default(name, pytree.tree_unflatten([self._examples[k] for k in places], form)):
                raise self._refusal(f"argument '{name}'", "is missing, which the search space was made with")
        return found

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same as positional and keyword arguments, as the trace was given them."""
        return pytree.tree_unflatten(self.leaves(args, kwargs), self._form)

    def _parts(self, name: str, form: pytree.TreeSpec, value: Any) -> list[Any]:
        try:
            return form.flatten_up_to(value)
        except ValueError as error:
            what = f"is made up otherwise than in the search space's example: {error}"
            raise self._refusal(f"argument '{name}'", what) from None

    def _checked(self, name: str, place: int, leaf: Any) -> Any:
        example, shape = self._examples[place], self._shapes[place]
        if isinstance(example, Tensor) != isinstance(leaf, Tensor):
            what = f"is {_kind(leaf)}, and {_kind(example)} in the search space's example"
            raise self._refusal(f"argument '{name}'", what)
        if not isinstance(leaf, Tensor):
            if leaf is not example and leaf != example:
                raise self._refusal(f"argument '{name}'", f"is {leaf!r}, and the trace has fixed it at {example!r}")
        elif leaf.ndim != len(shape) or any(s not in (None, own) for s, own in zip(shape, leaf.shape, strict=True)):
            fixed = ", ".join("any" if s is None else str(s) for s in shape)
            raise self._refusal(f"argument '{name}'", f"has shape {tuple(leaf.shape)}, and the trace takes ({fixed})")
        return leaf

    def _is_default(self, name: str, value: Any) -> bool:
        known = self._signature.parameters.get(name)
        if known is None or known.default is inspect.Parameter.empty:
            return False
        return value is known.default or (not isinstance(value, Tensor) and bool(value == known.default))

    def _refusal(self, subject: str, what: str) -> TrainingError:
        names = ", ".join(f"'{name}'" for name in self._places)
        sizes = "their sizes but the batch's" if any(None in shape for shape in self._shapes) else "all their sizes"
        return TrainingError(
            f"{subject} {what}. {self._why}, so that its arguments ({names}) and {sizes} are those of the example: "
            "call it with these, or make the search space with the arguments of this call."
        )


def _named(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Name → value, what ``*args`` and ``**kwargs`` took one by one."""
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            found |= {f"*{name}[{k}]": one for k, one in enumerate(value)}
        else:
            found[name] = value
    return found


def _fixed(size: int | torch.SymInt) -> int | None:
    """The size, None where it is free: a symbol may stand for one number."""
    return size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size


def _kind(leaf: Any) -> str:
    return "a tensor" if isinstance(leaf, Tensor) else f"of type {type(leaf).__name__}"
