"""What gates multiply parameters by, and whether these are still the model's."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from espalier.space.structure import Slices


class Factors:
    """One factor per element of every parameter, from one value per gate: a gather and views, no loop over gates.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> factors = Factors(model, [(0, Slices("weight", 0, torch.tensor([0, 1])))], 2, torch.device("cpu"))
    >>> factors.of(torch.tensor([0.5, 0.0]))
    [tensor([[0.5000],
            [0.0000]])]

    ``slices`` are pairs of a family's first gate and one of its slices, ``total`` is the number of gates.
    """

    def __init__(self, model: nn.Module, slices: Sequence[tuple[int, Slices]], total: int, device: torch.device):
        own = dict(model.named_parameters())
        self.names = list(dict.fromkeys(s.parameter for _, s in slices))
        self.tensors = [own[name] for name in self.names]
        self._links = [link for name in self.names for link in _links(model, name)]
        place = {name: k for k, name in enumerate(self.names)}
        self._parts: list[tuple[int, list[int]]] = []
        index = []
        for start, s in slices:
            owner = torch.zeros((), dtype=torch.long) if s.owner is None else s.owner
            dim, ndim = s.dim or 0, own[s.parameter].ndim
            shape = [1] * dim + list(owner.shape) + [1] * (ndim - dim - owner.ndim)
            index.append(torch.where(owner < 0, total, owner + start).flatten())
            self._parts.append((place[s.parameter], shape))
        self._lengths = [len(i) for i in index]
        self._index = torch.cat(index).to(device)

    def of(self, z: Tensor) -> list[Tensor]:
        """A tensor per parameter that broadcasts against it."""
        entries = torch.cat([z, z.new_ones(1)]).to(self.tensors[0].dtype).index_select(0, self._index)
        found: list[Tensor | None] = [None] * len(self.tensors)
        for (k, shape), part in zip(self._parts, entries.split(self._lengths), strict=True):
            known, view = found[k], part.view(shape)
            found[k] = view if known is None else known * view
        return [f for f in found if f is not None]

    def replaced(self) -> str | None:
        """The first parameter, or module on the way to it, that is no longer the model's."""
        return next((path for held, name, value, path in self._links if held.get(name) is not value), None)


def _links(model: nn.Module, parameter: str) -> list[tuple[Mapping[str, Any], str, object, str]]:
    """From the model down to the parameter: (where it is held, its name there, it, its path)."""
    found: list[tuple[Mapping[str, Any], str, object, str]] = []
    *modules, name = parameter.split(".")
    holder = model
    for k, step in enumerate(modules):
        child = holder.get_submodule(step)
        found.append((holder._modules, step, child, ".".join(modules[: k + 1])))
        holder = child
    return [*found, (holder._parameters, name, holder._parameters[name], parameter)]
