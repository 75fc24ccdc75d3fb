"""What a loader gives: pairs of inputs and targets, each a tensor, or a tuple or dict of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

Pair = tuple[Tensor, Tensor]
Tree = Any
"""A tensor, or a tuple or dict of trees. As inputs, a tuple is a model's arguments, a dict its keyword arguments."""

_WANTED = (
    "a batch must be (inputs, targets), both tensors with one row per sample; several inputs are a tuple (positional "
    "arguments) or a dict (keyword arguments) of tensors"
)


def mapped(function: Callable[..., Any], *trees: Tree) -> Any:
    """The function of each tensor (of each first, second, … tensors) in a tree of the same form.

    >>> mapped(len, {"ids": torch.ones(3), "more": (torch.ones(2),)})
    {'ids': 3, 'more': (2,)}
    """
    if isinstance(trees[0], dict):
        return {key: mapped(function, *(tree[key] for tree in trees)) for key in trees[0]}
    if isinstance(trees[0], tuple):
        return tuple(mapped(function, *parts) for parts in zip(*trees, strict=True))
    return function(*trees)


def leaves(tree: Tree) -> list[Tensor]:
    """The tensors of a tree, in order.

    >>> [len(t) for t in leaves({"ids": torch.ones(3), "more": (torch.ones(2),)})]
    [3, 2]
    """
    found: list[Tensor] = []
    mapped(found.append, tree)
    return found


def samples(tree: Tree) -> int:
    """How many samples a tree of tensors holds."""
    return leaves(tree)[0].shape[0]


def arguments(inputs: Tree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the model.

    >>> arguments((1, 2)), arguments({"ids": 1}), arguments(3)
    (((1, 2), {}), ((), {'ids': 1}), ((3,), {}))
    """
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def apply(model: nn.Module, inputs: Tree) -> Any:
    """The model's output on a tree of inputs."""
    args, named = arguments(inputs)
    return model(*args, **named)


def shapes(tree: Tree) -> str:
    """Shapes for a message.

    >>> shapes({"ids": torch.ones(2, 3)}), shapes([1, "two"])
    ("{'ids': (2, 3)}", '[int, str]')
    """
    if isinstance(tree, Tensor | np.ndarray):
        return str(tuple(tree.shape))
    if isinstance(tree, Mapping):
        return "{" + ", ".join(f"{key!r}: {shapes(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, tuple | list):
        shown = ", ".join(shapes(part) for part in tree[:4]) + (", …" if len(tree) > 4 else "")
        return f"({shown})" if isinstance(tree, tuple) else f"[{shown}]"
    return type(tree).__name__


def _tensors(part: Any) -> Tree:
    """Arrays as tensors, lists as tuples, mappings as dicts."""
    if isinstance(part, Mapping):
        return {key: _tensors(value) for key, value in part.items()}
    if isinstance(part, tuple | list):
        return tuple(_tensors(value) for value in part)
    if isinstance(part, np.ndarray):
        return torch.from_numpy(part)
    if isinstance(part, Tensor) and part.ndim:
        return part
    what = "a tensor without a batch dimension" if isinstance(part, Tensor) else f"a {type(part).__name__}"
    raise ValueError(f"{what} among the data: {_WANTED}. Bind what is constant in a module around the model.")


def pair_of(batch: Any) -> tuple[Tree, Tree]:
    """A loader's batch as (inputs, targets); ValueError for anything else.

    >>> pair_of([{"ids": np.zeros((2, 3))}, np.zeros(2)])[0]["ids"].shape
    torch.Size([2, 3])
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        parts = f"has {len(batch)} parts" if isinstance(batch, tuple | list) else f"is a {type(batch).__name__}"
        raise ValueError(f"a batch {parts}, {shapes(batch)}: {_WANTED}")
    inputs, targets = _tensors(batch[0]), _tensors(batch[1])
    for part, what in ((inputs, "inputs"), (targets, "targets")):
        if not leaves(part):
            raise ValueError(f"the {what} of a batch hold no tensor: {_WANTED}")
    counts = {leaf.shape[0] for leaf in (*leaves(inputs), *leaves(targets))}
    if len(counts) > 1:
        one = isinstance(inputs, Tensor) and isinstance(targets, Tensor)
        given = f"{samples(inputs)} inputs" if one else f"inputs of shapes {shapes(inputs)}"
        aims = f"{samples(targets)} targets" if one else f"targets of shapes {shapes(targets)}"
        raise ValueError(f"the loader gives {given} with {aims}")
    return inputs, targets


def is_pair(data: object) -> TypeGuard[Pair]:
    """Whether the data is one pair (inputs, targets) rather than a loader of such pairs.

    >>> x, y = torch.ones(3), torch.ones(3)
    >>> is_pair((x, y)), is_pair(({"ids": x}, y)), is_pair([(x, y), (x, y)])
    (True, True, False)
    """
    return isinstance(data, tuple | list) and len(data) == 2 and any(isinstance(part, Tensor) for part in data)


def as_loader(data: Any) -> Iterable[Pair]:
    """The data as a loader: one pair of tensors (or of arrays, or of trees of tensors) is a loader of one batch.

    >>> len(list(as_loader((torch.ones(3), torch.ones(3))))), len(list(as_loader([(torch.ones(3), torch.ones(3))])))
    (1, 1)
    """
    runs = hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    if isinstance(data, Tensor | np.ndarray | Mapping | str | nn.Module) or not runs:
        raise ValueError(f"the data is a {type(data).__name__}, {shapes(data)}: give a loader of pairs; {_WANTED}")
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise ValueError(
            "the data is a Dataset, which has no batches: give torch.utils.data.DataLoader(dataset, batch_size=250, "
            "shuffle=True)"
        )
    whole = isinstance(data, tuple | list) and len(data) == 2
    if whole and any(isinstance(part, Tensor | np.ndarray) for part in data):
        return [cast(Pair, pair_of(data))]
    return cast(Iterable[Pair], data)


def after(batches: Iterable[Any], skip: int) -> Iterator[tuple[Tree, Tree]]:
    """The checked batches without their first `skip` samples.

    >>> [len(x) for x, _ in after([(torch.ones(3), torch.ones(3)), (torch.ones(2), torch.ones(2))], 4)]
    [1]
    """
    for batch in batches:
        inputs, targets = pair_of(batch)
        held = samples(inputs)
        if skip >= held:
            skip -= held
            continue
        if skip:
            start, skip = skip, 0
            inputs, targets = (mapped(lambda t, start=start: t[start:], part) for part in (inputs, targets))
        yield inputs, targets


def mini_batches(pairs: Iterable[Any], skip: int, count: int, step: int) -> Iterator[Any]:
    """Cut the samples skip … skip + count of the data into pairs of at most `step` samples.

    >>> data = [(torch.ones(3), torch.ones(3)), (torch.ones(4), torch.ones(4))]
    >>> [len(x) for x, _ in mini_batches(data, skip=1, count=5, step=2)]
    [2, 2, 1]
    """
    waiting: list[tuple[Tree, Tree]] = []
    held = 0
    for inputs, targets in after(pairs, skip) if count else ():
        if waiting:
            _same_form(waiting[0], (inputs, targets))
        waiting.append((inputs, targets))
        held += samples(inputs)
        while held >= step or (0 < count <= held):
            x, y = waiting[0] if len(waiting) == 1 else mapped(lambda *parts: torch.cat(parts), *waiting)
            take = min(step, count)
            yield mapped(lambda t, take=take: t[:take], x), mapped(lambda t, take=take: t[:take], y)
            count, held = count - take, samples(x) - take
            waiting = [mapped(lambda t, take=take: t[take:], (x, y))]
            if count == 0:
                return
    if count:
        raise ValueError(f"the data ended {count - held} samples too early: give more data, or lower n or batch")


def _same_form(one: tuple[Tree, Tree], other: tuple[Tree, Tree]) -> None:
    was, now = (mapped(lambda t: tuple(t.shape[1:]), pair[0]) for pair in (one, other))
    if was != now:
        raise ValueError(
            f"the loader gives samples of shape {was} and then of {now}: one mini-batch of gradients takes samples of "
            "both; pad or crop them to one shape"
        )


def taken(batches: Iterator[Any], count: int) -> list[tuple[Tree, Tree]]:
    """Batches from the front of an iterator until they hold `count` samples, or all.

    >>> len(taken(iter([(torch.ones(3), torch.ones(3))] * 5), 4))
    2
    """
    out, held = [], 0
    for batch in islice(batches, count):
        out.append(batch)
        held += samples(batch[0])
        if held >= count:
            break
    return out
