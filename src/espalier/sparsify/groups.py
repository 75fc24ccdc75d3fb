"""Sums over each structure's parameters, without a loop over structures."""

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from espalier.saliency.state import State
from espalier.space.search_space import SearchSpace
from espalier.space.structure import Slices
from espalier.sparsify import foreach
from espalier.sparsify.foreach import norms


@dataclass(frozen=True)
class Part:
    """One tensor (its place in ``Groups.tensors``), sliced along ``dim`` and as many axes as ``sizes`` has."""

    tensor: int
    dim: int
    sizes: tuple[int, ...]
    ndim: int

    @property
    def others(self) -> list[int]:
        """The axes along which a slice extends."""
        return [d for d in range(self.ndim) if not self.dim <= d < self.dim + len(self.sizes)]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one number per slice that broadcasts against the tensor."""
        return (*[1] * self.dim, *self.sizes, *[1] * (self.ndim - self.dim - len(self.sizes)))

    @property
    def length(self) -> int:
        """Number of slices."""
        return torch.Size(self.sizes).numel()


class Groups:
    """The parameters of a search space's structures: each a group of whole tensors, of slices of tensors, or both.

    ``tensors`` are the parameters and ``names`` their names: first the ``whole`` ones, each of which belongs to a
    group as it is, then those of which only slices do. An *entry* is a whole tensor or one slice: the entries are
    the whole tensors in order, then the slices part by part. ``group`` [entries] is the structure of each, or
    ``count`` where a slice belongs to none. ``size`` [structures] is the number of elements.

    A tensor may lie in several groups (as a whole and in slices, or in slices along different axes).
    """

    def __init__(self, space: SearchSpace):
        space.check_not_empty()
        parameters = dict(space.model.named_parameters())
        self.count = len(space)
        pairs = [
            (s, int(at)) for f, at in zip(space.families, space.structures.offsets, strict=False) for s in f.slices
        ]
        alone = [(slices.parameter, at) for slices, at in pairs if slices.owner is None]
        owners = _owners([pair for pair in pairs if pair[0].owner is not None], self.count)
        self.whole = len(alone)
        self.names = [name for name, _ in alone]
        self.names += dict.fromkeys(name for name, _, _ in owners if name not in set(self.names))
        self.tensors: list[nn.Parameter] = [parameters[name] for name in self.names]
        place = {name: k for k, name in reversed(list(enumerate(self.names)))}
        self.parts = [Part(place[n], dim, tuple(o.shape), parameters[n].ndim) for n, dim, o in owners]
        device = self.tensors[0].device
        rows = torch.tensor([at for _, at in alone], dtype=torch.long)
        self.group = torch.cat([rows, *[owner.flatten() for _, _, owner in owners]]).to(device)
        self.dtype = torch.float64 if any(t.dtype == torch.float64 for t in self.tensors) else torch.float32
        sizes = [torch.tensor([float(t.numel()) for t in self.tensors[: self.whole]])]
        sizes += [torch.full((p.length,), self.tensors[p.tensor].numel() / p.length) for p in self.parts]
        self.size = self.sum(torch.cat(sizes).to(device))

    def only(self, structures: Collection[int], without: Collection[int] = ()) -> "Groups":
        """The groups of these structures alone, ``without`` the tensors of these ids. The host waits for the device."""
        chosen = torch.zeros(self.count + 1, dtype=torch.bool, device=self.group.device)
        chosen[torch.tensor(sorted(structures), dtype=torch.long, device=chosen.device)] = True
        alone, *slices = self._split(chosen[self.group])
        there = [id(t) not in without for t in self.tensors]
        rows = [k for k, on in enumerate(alone.tolist()) if on and there[k]]
        parts = [bool(on.any()) and there[p.tensor] for p, on in zip(self.parts, slices, strict=True)]
        names = [self.names[k] for k in rows]
        left = {p.tensor: None for p, on in zip(self.parts, parts, strict=True) if on}
        order = [*rows, *(k for k in left if self.names[k] not in set(names))]
        place = {self.names[k]: i for i, k in reversed(list(enumerate(order)))}
        found = copy.copy(self)
        found.whole, found.names = len(rows), [self.names[k] for k in order]
        found.tensors = [self.tensors[k] for k in order]
        found.parts = [
            Part(place[self.names[p.tensor]], p.dim, p.sizes, p.ndim)
            for p, on in zip(self.parts, parts, strict=True)
            if on
        ]
        mine = torch.where(chosen[self.group], self.group, self.count)
        alone, *slices = self._split(mine)
        kept = [s for s, on in zip(slices, parts, strict=True) if on]
        found.group = torch.cat([alone[torch.tensor(rows, dtype=torch.long, device=mine.device)], *kept])
        return found

    # Entries: one number per whole tensor and per slice.

    def sum(self, entries: Tensor) -> Tensor:
        """Add up one number per entry to one per structure."""
        total = torch.zeros(self.count + 1, dtype=entries.dtype, device=entries.device)
        return total.index_add_(0, self.group, entries)[:-1]

    def at(self, per_structure: Tensor, none: float) -> Tensor:
        """The structure's number for every entry; ``none`` where a slice belongs to no structure."""
        if not self.parts:
            return per_structure[self.group]
        return torch.cat([per_structure, per_structure.new_full((1,), none)])[self.group]

    def rates(self, per_tensor: Sequence[float]) -> Tensor:
        """One number per tensor, known on the host, as one per entry; made once, since it goes to the device."""
        alone = torch.tensor(list(per_tensor[: self.whole]), dtype=torch.float64)
        parts = [torch.full((p.length,), float(per_tensor[p.tensor]), dtype=torch.float64) for p in self.parts]
        return torch.cat([alone, *parts]).to(self.group.device)

    def factors(self, entries: Tensor, combine: Callable[[Tensor, Tensor], Tensor] = torch.mul) -> list[Tensor]:
        """Entries as one tensor for each of ``tensors``, which broadcasts against it.

        Where a tensor lies in several groups, ``combine`` makes one number of theirs.
        """
        alone, *slices = self._split(entries)
        found: list[Tensor | None] = [*alone.unbind(), *[None] * (len(self.tensors) - self.whole)]
        for part, each in zip(self.parts, slices, strict=True):
            known, view = found[part.tensor], each.view(part.shape)
            found[part.tensor] = view if known is None else combine(known, view)
        return [factor for factor in found if factor is not None]

    def squares(self, values: Sequence[Tensor]) -> Tensor:
        """Sum of v² per structure, for one tensor of values per tensor."""
        return self.sum(self._norms(values).square())

    def largest(self, values: Sequence[Tensor]) -> Tensor:
        """A number per structure that is zero if and only if all its values are (squares of tiny ones vanish)."""
        return self.sum(self._norms(values, float("inf")))

    def products(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of a², b² and a b per structure, for one tensor of values per tensor each."""
        first, second = self._norms(a), self._norms(b)
        alone = self._whole_dots(a[: self.whole], b[: self.whole], first[: self.whole], second[: self.whole])
        parts = [_dot(a[p.tensor], b[p.tensor], p, self.dtype) for p in self.parts]
        dots = torch.cat([alone, *parts]) if parts else alone
        return self.sum(first.square()), self.sum(second.square()), self.sum(dots)

    def _whole_dots(self, a: Sequence[Tensor], b: Sequence[Tensor], first: Tensor, second: Tensor) -> Tensor:
        """<a, b> from |a + s b|² = |a|² + |s b|² + 2 s <a, b>, where s = |a| / |b| keeps both terms of one size."""
        if not a:
            return first
        scale = torch.where((first > 0) & (second > 0), first / second.clamp_min(1e-38), 1.0)
        summed = foreach.mul(b, scale.to(a[0].dtype).unbind())
        foreach.add_(summed, a)
        return (norms(summed).square() - first.square() - (scale * second).square()) / (2 * scale)

    def _norms(self, values: Sequence[Tensor], order: float = 2.0) -> Tensor:
        if not self.parts:
            return norms(values, order)
        found = [norms(values[: self.whole], order).to(self.dtype)] if self.whole else []
        return torch.cat(found + [_norm(values[p.tensor], p, order).to(self.dtype) for p in self.parts])

    def _split(self, entries: Tensor) -> Sequence[Tensor]:
        return entries.split([self.whole, *[part.length for part in self.parts]])

    def state(self, gradients: Sequence[Tensor]) -> State:
        """What saliencies look at, for these gradients (one per tensor)."""
        weights = [t.detach() for t in self.tensors]
        weight_sq, grad_sq, dot = self.products(weights, gradients)
        return State(
            weight_sq=weight_sq,
            grad_sq=grad_sq,
            dot=dot,
            size=self.size,
            parameters=dict(zip(self.names, weights, strict=True)),
            gradients=dict(zip(self.names, gradients, strict=True)),
        )


def _owners(pairs: Sequence[tuple[Slices, int]], none: int) -> list[tuple[str, int, Tensor]]:
    """(parameter, dim, structure of every index or ``none``); families that share out one axis are put together."""
    found: dict[tuple[str, int, torch.Size], list[Tensor]] = {}
    for slices, at in pairs:
        assert slices.owner is not None
        owner = torch.where(slices.owner < 0, none, slices.owner + at)
        same = found.setdefault((slices.parameter, slices.dim or 0, owner.shape), [])
        if same and not bool(((owner != none) & (same[-1] != none)).any()):
            owner = torch.minimum(owner, same.pop())
        same.append(owner)
    return [(name, dim, owner) for (name, dim, _), owners in found.items() for owner in owners]


def _norm(value: Tensor, part: Part, order: float) -> Tensor:
    """The norm of every slice, at least in single precision."""
    if not part.others:
        return value.abs().flatten()
    wide = torch.float32 if value.dtype.itemsize < 4 else None
    return torch.linalg.vector_norm(value, order, part.others, dtype=wide).flatten()


def _dot(a: Tensor, b: Tensor, part: Part, dtype: torch.dtype) -> Tensor:
    """The sum of a b over every slice."""
    product = a.to(dtype) * b
    return (product.sum(part.others) if part.others else product).flatten()


def all_finite(tensors: Sequence[Tensor], small: int = 16384) -> Tensor:
    """Whether no element is NaN or infinite, as a tensor on their device.

    Large tensors are read once where they lie; small ones, where the calls cost more than the reading, are
    joined first.
    """
    few = [t for t in tensors if t.numel() < small]
    many = [t for t in tensors if t.numel() >= small]
    parts = []
    if few:
        joined = foreach.flattened(few)
        parts.append(torch.linalg.vector_norm(joined if joined.dtype.itemsize >= 4 else joined.float()).float())
    if many:
        parts.append(norms(many).sum().float())
    return torch.stack(parts).isfinite().all()
