"""Structures, and families of structures that share their slicing."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, eq=False)
class Slices:
    """What a family takes from one parameter.

    ``dim`` None: the whole tensor belongs to the family's only structure. Otherwise ``owner`` [size of ``dim``]
    gives the structure (its position in the family) of every index along ``dim``, -1 for none.
    """

    parameter: str
    dim: int | None = None
    owner: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Family:
    """Structures of one shape that share their slicing; a segment is a family of one.

    ``segments`` are, for the level "segment", the indices of the segments that go with the one structure.
    """

    level: str
    names: tuple[str, ...]
    slices: tuple[Slices, ...]
    segments: tuple[int, ...] = ()


@dataclass(frozen=True)
class Structure:
    """The smallest thing that can be removed.

    ``parameters`` are the names of the parameters that are zero once it is removed.
    """

    name: str
    level: str
    parameters: tuple[str, ...]
    segments: tuple[int, ...] = field(default=())
