"""Conditional computation: units whose gate is 0 for the whole batch are not computed at all."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from espalier.sparsify.sites import Site


@dataclass(eq=False)
class Narrowing:
    """Which slices of which parameters go with which of all gates (numbered through, site after site).

    ``index`` maps (parameter, dimension) to the gates that decide on it: int64 [size of the dimension] each.
    """

    index: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    arriving: dict[str, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, sites: Sequence[Site]) -> "Narrowing":
        made, offset, seen = cls(), 0, []
        for site in sites:
            for part in site.slices:
                if part.dim is None or part.owner is None:
                    continue
                gates = next((g for g in seen if torch.equal(g, part.owner + offset)), part.owner + offset)
                seen.append(gates)
                made.index.setdefault((part.parameter, part.dim), []).append(gates)
                if part.dim == 1 and site.narrow:
                    made.arriving.setdefault(part.parameter, []).append(gates)
            offset += site.count
        return made

    @cached_property
    def _sets(self) -> list[tuple[list[Tensor | slice], list[tuple[str, int]]]]:
        """The sets of gates that decide together, and the dimensions they decide on."""
        sets: dict[tuple[int, ...], list[tuple[str, int]]] = {}
        for key, gates in self.index.items():
            sets.setdefault(tuple(id(g) for g in gates), []).append(key)
        return [([_in_a_row(g) for g in self.index[keys[0]]], keys) for keys in sets.values()]

    def kept(self, is_open: Tensor) -> dict[tuple[str, int], Tensor]:
        """Positions that stay along each sliced dimension, for gates [V] of bool."""
        found = {}
        for gates, keys in self._sets:
            found |= dict.fromkeys(keys, _all(gates, is_open).nonzero().flatten())
        return found

    def expected_share(self, weight: str, pi: Tensor) -> float:
        """Expected share of a weight's elements whose units are open on both sides, for independent gates."""
        share = 1.0
        for dim in (0, 1):
            if (weight, dim) in self.index:
                share *= float(torch.stack([pi[gates] for gates in self.index[weight, dim]]).prod(0).mean())
        return share

    def selection(self, weight: str, is_open: Tensor, kept: Mapping[tuple[str, int], Tensor]) -> Tensor | None:
        """Positions that stay among those that arrive at this weight's layer; None if all that arrive stay.

        ``kept`` is what :meth:`kept` finds for these gates.
        """
        every, arriving = self.index[weight, 1], self.arriving.get(weight, [])
        if len(every) == len(arriving):
            return None
        if not arriving:
            return kept[weight, 1]
        return _all(every, is_open)[_all(arriving, is_open)].nonzero().flatten()

    def parameters(self, own: Mapping[str, Tensor], kept: Mapping[tuple[str, int], Tensor]) -> list["Part"]:
        """The narrowed parameters."""
        names = dict.fromkeys(name for name, _ in kept)
        return [Part.of(name, own[name], kept.get((name, 0)), kept.get((name, 1))) for name in names]


@dataclass(eq=False)
class Part:
    """``w[rows][:, columns]`` of a parameter: a leaf with a gradient of its own, which `put_back` adds to w's.

    Autograd through the selection would write a gradient of w's full size anew at each step; new memory of that size
    costs more than the arithmetic.
    """

    name: str
    full: Tensor
    rows: Tensor | None
    columns: Tensor | None
    value: Tensor

    @classmethod
    def of(cls, name: str, full: Tensor, rows: Tensor | None, columns: Tensor | None) -> "Part":
        value = full.detach()
        value = value if rows is None else value.index_select(0, rows)
        value = value if columns is None else value.index_select(1, columns)
        return cls(name, full, rows, columns, value.requires_grad_(full.requires_grad and torch.is_grad_enabled()))

    @torch.no_grad()
    def put_back(self) -> None:
        """Add the gradient to the full parameter's."""
        gradient, self.value.grad = self.value.grad, None
        if gradient is None:
            return
        if self.full.grad is None:
            self.full.grad = torch.zeros_like(self.full)
        into = self.full.grad
        if self.rows is None or self.columns is None:
            at = self.rows if self.columns is None else self.columns
            assert at is not None
            into.index_add_(0 if self.columns is None else 1, at, gradient)
            return
        if not into.is_contiguous():  # channels last
            into.index_put_((self.rows.unsqueeze(1), self.columns), gradient, accumulate=True)
            return
        flat = self.rows.unsqueeze(1) * into.shape[1] + self.columns  # several times faster than pairs of indices
        inner = into[0, 0].numel()
        if inner > 1:
            flat = flat.unsqueeze(-1) * inner + torch.arange(inner, device=flat.device)
        into.view(-1).scatter_add_(0, flat.flatten(), gradient.flatten())


class Places:
    """Where a model holds some of its parameters, so that others may stand there for one pass.

    What ``torch.func.functional_call`` does, without looking every name up again at each call.
    """

    def __init__(self, model: nn.Module, names: Collection[str]):
        own = dict(model.named_parameters())
        wanted = {id(own[name]): name for name in names}
        self._at: dict[str, list[tuple[dict[str, Any], str]]] = {}
        for module in model.modules():
            for leaf, p in module._parameters.items():
                if id(p) in wanted:
                    self._at.setdefault(wanted[id(p)], []).append((module._parameters, leaf))
        self._own = own

    @contextmanager
    def holding(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Within, the model computes with these tensors."""
        try:
            for name, tensor in tensors.items():
                for parameters, leaf in self._at[name]:
                    parameters[leaf] = tensor
            yield
        finally:
            for name in tensors:
                for parameters, leaf in self._at[name]:
                    parameters[leaf] = self._own[name]


def _in_a_row(gates: Tensor) -> Tensor | slice:
    """As a slice where they follow one another, which takes a view and no copy."""
    first, count = int(gates[0]), len(gates)
    return slice(first, first + count) if torch.equal(gates, torch.arange(first, first + count)) else gates


def _all(gates: Sequence[Tensor | slice], is_open: Tensor) -> Tensor:
    mask = is_open[gates[0]]
    for more in gates[1:]:
        mask = mask & is_open[more]
    return mask
