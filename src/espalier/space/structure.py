"""Structures, and families of structures that share their slicing."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import overload

import numpy as np
import torch

from espalier.errors import SpaceError

LEVELS = ("segment", "channel", "head", "kernel")


@dataclass(frozen=True, eq=False)
class Slices:
    """What a family takes from one parameter.

    ``owner`` None: the whole tensor belongs to the family's only structure. Otherwise ``owner`` lies over the
    parameter's axes ``dim``, ``dim + 1``, ... (as many as it has) and gives the structure (its position in the
    family) of every index there, -1 for none.
    """

    parameter: str
    dim: int | None = None
    owner: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Family:
    """Structures of one shape that share their slicing; a segment is a family of one.

    ``slices`` are what is zero once a structure is removed. ``readers`` are what only reads the zeros: it is
    narrowed along. ``components`` are the coupled axes' components, one per structure (channels and heads), and
    ``segments`` the indices of the segments that go with the one structure (segments).
    """

    level: str
    name: str
    count: int
    slices: tuple[Slices, ...]
    readers: tuple[Slices, ...] = ()
    segments: tuple[int, ...] = ()
    components: np.ndarray | None = None
    grid: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.count

    def name_of(self, index: int) -> str:
        """The name of one structure: the family's own, with the index behind it where it has several."""
        if self.level == "segment":
            return self.name
        if self.grid:
            at = ",".join(str(int(i)) for i in np.unravel_index(index, self.grid))
            return f"{self.name}[{at}]"
        return f"{self.name}[{index}]"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.name_of(i) for i in range(self.count))

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters of which a removed structure zeroes all or a part."""
        return tuple(dict.fromkeys(s.parameter for s in self.slices))


@dataclass(frozen=True)
class Structure:
    """The smallest thing that can be removed.

    ``parameters`` are the names of the parameters that are zero once it is removed, wholly (segments) or at its
    ``index`` in its family (all other levels).
    """

    name: str
    level: str
    parameters: tuple[str, ...]
    segments: tuple[int, ...] = field(default=())
    index: int = 0


class Structures(Sequence[Structure]):
    """All structures of a list of families, made when asked for: position ↔ name ↔ structure."""

    def __init__(self, families: Sequence[Family]):
        self.families = tuple(families)
        self.offsets = np.cumsum([0, *[f.count for f in self.families]])
        self._starts = self.offsets.tolist()
        self._family = {f.name: k for k, f in enumerate(self.families)}

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @overload
    def __getitem__(self, index: int) -> Structure: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Structure]: ...

    def __getitem__(self, index: int | slice) -> Structure | Sequence[Structure]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        k, within = self.place(index % len(self))
        family = self.families[k]
        return Structure(family.name_of(within), family.level, family.parameters, family.segments, within)

    def __iter__(self) -> Iterator[Structure]:
        for family in self.families:
            parameters = family.parameters
            for i in range(family.count):
                yield Structure(family.name_of(i), family.level, parameters, family.segments, i)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(name for family in self.families for name in family.names)

    def place(self, position: int) -> tuple[int, int]:
        """The family of a position, and the index in it."""
        k = bisect_right(self._starts, position) - 1
        return k, position - self._starts[k]

    def position(self, name: str) -> int:
        """The position of the structure of this name; raises :class:`SpaceError` if there is none."""
        k = self._family.get(name)
        if k is not None and self.families[k].level == "segment":
            return self._starts[k]
        head, _, index = name.removesuffix("]").rpartition("[")
        k = self._family.get(head)
        if k is not None and self.families[k].level != "segment" and name.endswith("]"):
            family, parts = self.families[k], index.split(",")
            shape = family.grid or (family.count,)
            if len(parts) == len(shape) and all(p.isdigit() and int(p) < n for p, n in zip(parts, shape, strict=True)):
                return self._starts[k] + int(np.ravel_multi_index([int(p) for p in parts], shape))
        raise SpaceError(name)
