"""Conditional computation: units whose gate is 0 for the whole batch are not computed at all."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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

    def kept(self, is_open: Tensor) -> dict[tuple[str, int], Tensor]:
        """Positions that stay along each sliced dimension, for gates [V] of bool."""
        seen: dict[tuple[int, ...], Tensor] = {}
        kept = {}
        for key, gates in self.index.items():
            which = tuple(id(g) for g in gates)
            if which not in seen:
                seen[which] = _all(gates, is_open).nonzero().flatten()
            kept[key] = seen[which]
        return kept

    def expected_share(self, weight: str, pi: Tensor) -> float:
        """Expected share of a weight's elements whose units are open on both sides, for independent gates."""
        share = 1.0
        for dim in (0, 1):
            if (weight, dim) in self.index:
                share *= float(torch.stack([pi[gates] for gates in self.index[weight, dim]]).prod(0).mean())
        return share

    def selection(self, weight: str, is_open: Tensor) -> Tensor | None:
        """Positions that stay among those that arrive at this weight's layer; None if all that arrive
        stay.
        """
        every, arriving = self.index[weight, 1], self.arriving.get(weight, [])
        if len(every) == len(arriving):
            return None
        stays = _all(every, is_open)
        return (stays[_all(arriving, is_open)] if arriving else stays).nonzero().flatten()

    def parameters(self, own: Mapping[str, Tensor], kept: Mapping[tuple[str, int], Tensor]) -> dict[str, Tensor]:
        """The narrowed parameters; gradients flow back into the full ones."""
        names = dict.fromkeys(name for name, _ in kept)
        take = _Take.apply if torch.is_grad_enabled() else _taken
        return {name: take(own[name], kept.get((name, 0)), kept.get((name, 1))) for name in names}  # type: ignore[misc]


def _taken(w: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    if rows is not None:
        w = w.index_select(0, rows)
    return w if columns is None else w.index_select(1, columns)


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


class _Take(torch.autograd.Function):
    """``w[rows][:, columns]``; its gradient is written into zeros once, as no position occurs twice."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        ctx.save_for_backward(*(t for t in (rows, columns) if t is not None))
        ctx.shape, ctx.both, ctx.rows = w.shape, rows is not None and columns is not None, rows is not None
        return _taken(w, rows, columns)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        full = gradient.new_zeros(ctx.shape)
        at = ctx.saved_tensors
        if ctx.both:  # by flat positions, several times faster than by pairs of indices
            flat = at[0].unsqueeze(1) * full.shape[1] + at[1]
            inner = full[0, 0].numel()
            if inner > 1:
                flat = flat.unsqueeze(-1) * inner + torch.arange(inner, device=flat.device)
            full.view(-1).scatter_(0, flat.flatten(), gradient.flatten())
        elif ctx.rows:
            full[at[0]] = gradient
        else:
            full[:, at[0]] = gradient
        return full, None, None


def _all(gates: Sequence[Tensor], is_open: Tensor) -> Tensor:
    mask = is_open[gates[0]]
    for more in gates[1:]:
        mask = mask & is_open[more]
    return mask
