"""How far a network's proxy falls when a structure is removed."""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.utils import _pytree as pytree

from espalier.space.reduce import reduced
from espalier.space.search_space import SearchSpace

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


def falls(space: SearchSpace, proxy: Callable[[nn.Module], float], model: nn.Module | None = None) -> torch.Tensor:
    """``proxy(network) - proxy(network without s)`` for every structure s [structures], in double precision.

    ``model`` is another set of weights of the space's model; by default a copy of its own, so that the proxy may
    run the network in train mode. A structure that cannot go alone gets the highest score of those that can:
    nothing is known about its removal.
    """
    model = copy.deepcopy(space.model) if model is None else model
    for module in model.modules():
        if hasattr(module, "inplace"):  # it must not write into what something else reads once its reader is gone
            setattr(module, "inplace", False)  # noqa: B010
    full = proxy(_without(space, (), model))
    scores, unknown = torch.zeros(len(space), dtype=torch.float64), []
    shown = track(
        list(enumerate(space.structures)), "Scoring structures", console=Console(stderr=True), transient=True,
        disable=not sys.stderr.isatty(),
    )  # fmt: skip
    for i, structure in shown:
        if space.is_valid([structure.name]):
            scores[i] = full - proxy(_without(space, (structure.name,), model))
        else:
            unknown.append(i)
    if unknown:
        known = [i for i in range(len(space)) if i not in set(unknown)]
        scores[unknown] = scores[known].max() if known else 0.0
    return scores


def _without(space: SearchSpace, removed: tuple[str, ...], model: nn.Module) -> nn.Module:
    return reduced(space.trace, space.graph, space.segments_of(removed), space.constant, model).module


def arguments(space: SearchSpace, args: tuple[Any, ...] | torch.Tensor | None, kwargs: Any) -> Arguments:
    """The inputs that a proxy was given, by default the space's own example inputs."""
    if args is None:
        return space.trace.args, space.trace.kwargs
    return ((args,) if isinstance(args, torch.Tensor) else tuple(args)), dict(kwargs or {})


def first_tensor(output: Any) -> torch.Tensor:
    """The network's output, or the first tensor of several."""
    return next(t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor))


@contextlib.contextmanager
def own_randomness(device: torch.device, seed: int = 0) -> Iterator[None]:
    """Draws within are the same each time, and the training's own go on as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
