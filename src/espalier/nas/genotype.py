"""What a search finds: the operations that stay, in each kind of cell."""

import json
import os
import re
from ast import literal_eval
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from espalier.errors import FormatError, SpaceError
from espalier.nas.space import CellSpace, check_operations
from espalier.nas.spaces import SPACES, space

_FORMAT = "espalier.genotype.1"
_OTHER_NAMES = {"skip_connect": "skip"}


@dataclass(frozen=True)
class Genotype:
    """The operations on every edge of every kind of cell; several may lie on one edge.

    >>> print(GENOTYPES["darts-v2"])
    space darts
    normal 2: sep_conv_3x3(0) + sep_conv_3x3(1)
    normal 3: sep_conv_3x3(0) + sep_conv_3x3(1)
    normal 4: skip(0) + sep_conv_3x3(1)
    normal 5: skip(0) + dil_conv_3x3(2)
    reduce 2: max_pool_3x3(0) + max_pool_3x3(1)
    reduce 3: max_pool_3x3(1) + skip(2)
    reduce 4: max_pool_3x3(0) + skip(2)
    reduce 5: max_pool_3x3(1) + skip(2)

    ``space`` is the name of the space, ``cells`` maps kinds of cells to edges ("0_2") to operations, edges
    in order of their nodes. Make one with :meth:`of`, :meth:`parse` or :meth:`load`, which check it.
    """

    space: str
    cells: Mapping[str, Mapping[str, tuple[str, ...]]]

    @classmethod
    def of(cls, within: CellSpace, cells: Mapping[str, Mapping[str, Iterable[str]]], clean: bool = True) -> "Genotype":
        """The genotype with these operations, dead nodes cleaned away.

        Raises :class:`SpaceError` for an empty edge, an unknown operation, one that the space does not have
        there, and a cell in which no path leads from the input to the output.
        """
        if set(cells) != set(within.kinds):
            raise SpaceError(f"a genotype of '{within.name}' has {list(within.kinds)} cells, not {sorted(cells)}.")
        made = {}
        for kind in within.kinds:
            edges = {edge: tuple(operations) for edge, operations in cells[kind].items()}
            for edge, operations in edges.items():
                _check_edge(within, kind, edge, operations)
            ordered = {edge: edges[edge] for edge in within.possible_edges() if edge in edges}
            live = _live(within, ordered)
            if not live:
                raise SpaceError(
                    f"the {kind} cell has no path from an input to its output: its edges are "
                    f"{', '.join(ordered) or 'none'}. Lower the penalty, or keep more operations."
                )
            made[kind] = live if clean else ordered
        return cls(within.name, made)

    def edges(self, kind: str) -> Mapping[str, tuple[str, ...]]:
        """Operations per edge of one kind of cell."""
        return self.cells[kind]

    def operations(self) -> list[tuple[str, str, str]]:
        """Every (kind, edge, operation)."""
        return [(k, e, name) for k, edges in self.cells.items() for e, names in edges.items() for name in names]

    def network(self, channels: int = 36, cells: int = 20, num_classes: int = 10, **options: Any) -> nn.Module:
        """The network to train: these cells stacked, batch norms with scale and shift.

        >>> sum(p.numel() for p in GENOTYPES["darts-v2"].network(36, 20).parameters())
        3349342

        ``options`` are those of the stacking's network: ``auxiliary=True``, ``stem="imagenet"``,
        ``in_channels``.
        """
        within = space(self.space)
        if within.stacking == "darts":
            options.setdefault("pool_norm", False)
        return within.network(self.cells, channels, cells, num_classes, affine=True, **options)

    def params(self, channels: int = 36, cells: int = 14, num_classes: int = 10) -> int:
        """Parameters of :meth:`network`, the auxiliary head aside."""
        import torch

        with torch.device("meta"):
            return sum(p.numel() for p in self.network(channels, cells, num_classes).parameters())

    def __str__(self) -> str:
        lines = [f"space {self.space}"]
        for kind, edges in self.cells.items():
            nodes: dict[str, list[str]] = {}
            for edge, names in edges.items():
                source, node = edge.split("_")
                nodes.setdefault(node, []).extend(f"{name}({source})" for name in names)
            lines += [f"{kind} {node}: {' + '.join(terms)}" for node, terms in nodes.items()]
        return "\n".join(lines)

    @classmethod
    def parse(cls, text: str, within: CellSpace | None = None) -> "Genotype":
        """Read what ``print`` writes, DARTS's ``Genotype(normal=[('sep_conv_3x3', 0), …`` or
        NAS-Bench-201's ``|nor_conv_3x3~0|+|…``.

        >>> Genotype.parse(str(GENOTYPES["darts-v2"])) == GENOTYPES["darts-v2"]
        True

        ``within``: the space, "darts" or "nas-bench-201" by default for the published forms. Raises
        :class:`FormatError` for text of no known form, and :class:`SpaceError` as :meth:`of` does.
        """
        text = text.strip()
        if text.startswith("Genotype("):
            return cls.of(within or space("darts"), _from_darts(text))
        if text.startswith("|"):
            return cls.of(within or space("nas-bench-201"), {"normal": _from_201(text)})
        lines = text.splitlines()
        match = re.fullmatch(r"space (\S+)", lines[0]) if lines else None
        if match is None:
            raise FormatError("no genotype: the first line is 'space NAME', 'Genotype(…' or '|operation~0|…'.")
        found = within or space(match[1])
        if found.name != match[1]:
            raise SpaceError(f"the genotype belongs to the space '{match[1]}', not '{found.name}'.")
        cells: dict[str, dict[str, list[str]]] = {kind: {} for kind in found.kinds}
        for line in lines[1:]:
            head = re.fullmatch(r"(\w+) (\d+): (.+)", line.strip())
            terms = [re.fullmatch(r"(\w+)\((\d+)\)", term.strip()) for term in head[3].split("+")] if head else [None]
            if head is None or None in terms:
                raise FormatError(f"no line of a genotype: '{line}'; expected 'normal 2: skip(0) + sep_conv_3x3(1)'.")
            for term in terms:
                assert term is not None
                cells.setdefault(head[1], {}).setdefault(f"{term[2]}_{head[2]}", []).append(_known(term[1]))
        return cls.of(found, cells)

    def save(self, path: str | Path) -> None:
        """Write JSON; a file that is there is replaced whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        os.replace(part, path)

    def to_json(self) -> dict[str, Any]:
        """What :meth:`save` writes."""
        cells = {kind: {edge: list(names) for edge, names in edges.items()} for kind, edges in self.cells.items()}
        return {"format": _FORMAT, "space": self.space, "cells": cells}

    @classmethod
    def load(cls, path: str | Path, within: CellSpace | None = None) -> "Genotype":
        """Read a JSON file, or a text file as :meth:`parse` does.

        Raises :class:`FormatError` for a file of another kind, and :class:`SpaceError` as :meth:`of` does.
        """
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise FormatError(f"{path} cannot be read: {error}.") from error
        if not text.lstrip().startswith("{"):
            return cls.parse(text, within)
        try:
            return cls.from_json(json.loads(text), within)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{path} is no genotype, or is damaged: {error}.") from error

    @classmethod
    def from_json(cls, data: Mapping[str, Any], within: CellSpace | None = None) -> "Genotype":
        """The inverse of :meth:`to_json`."""
        if data.get("format") != _FORMAT:
            raise FormatError(f"not a genotype: its format is {data.get('format')!r}, expected {_FORMAT!r}.")
        if within is not None and within.name != data["space"]:
            raise SpaceError(f"the genotype belongs to the space '{data['space']}', not '{within.name}'.")
        return cls.of(within or space(data["space"]), data["cells"])


def _check_edge(within: CellSpace, kind: str, edge: str, operations: tuple[str, ...]) -> None:
    where = f"genotype of '{within.name}', {kind} cell, edge {edge}"
    if not operations:
        raise SpaceError(f"{where} is empty: give it an operation, or leave the edge out.")
    check_operations(operations, where)
    allowed = within.edges(kind).get(edge)
    if allowed is None:
        raise SpaceError(f"{where}: the space has no such edge; is the genotype of another space?")
    for name in operations:
        if name not in allowed:
            raise SpaceError(
                f"{where}: '{name}' is not there; the space has {', '.join(allowed)}. Is the genotype of another space?"
            )


def _live(within: CellSpace, edges: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The edges on a way from an input to the output; `none` is no operation."""
    from espalier.nas.space import STACKINGS

    kept = {e: tuple(n for n in names if n != "none") for e, names in edges.items()}
    pairs = {e: tuple(map(int, e.split("_"))) for e, names in kept.items() if names}
    reached = set(range(within.inputs))
    for source, node in sorted(pairs.values(), key=lambda p: p[1]):
        if source in reached:
            reached.add(node)
    pairs = {e: (s, n) for e, (s, n) in pairs.items() if s in reached}
    if not STACKINGS[within.stacking].every_node:
        useful = {within.inputs + within.nodes - 1}
        for source, node in sorted(pairs.values(), key=lambda p: -p[1]):
            if node in useful:
                useful.add(source)
        pairs = {e: (s, n) for e, (s, n) in pairs.items() if n in useful}
    return {e: kept[e] for e in edges if e in pairs}


def _known(name: str) -> str:
    return _OTHER_NAMES.get(name, name)


def _from_darts(text: str) -> dict[str, dict[str, list[str]]]:
    """Two (operation, source) per node, node by node."""
    cells: dict[str, dict[str, list[str]]] = {}
    for kind in ("normal", "reduce"):
        match = re.search(rf"\b{kind}=(\[[^\]]*\])", text)
        try:
            pairs = literal_eval(match[1]) if match else None
            assert pairs is not None
            for i, (name, source) in enumerate(pairs):
                cells.setdefault(kind, {}).setdefault(f"{int(source)}_{2 + i // 2}", []).append(_known(name))
        except (SyntaxError, ValueError, TypeError, AssertionError) as error:
            raise FormatError(f"no genotype of DARTS: '{kind}=[('operation', source), …]' is missing.") from error
    return cells


def _from_201(text: str) -> dict[str, list[str]]:
    edges: dict[str, list[str]] = {}
    for node, part in enumerate(text.split("+"), start=1):
        for term in part.strip("|").split("|"):
            name, tilde, source = term.partition("~")
            if not tilde or not source.isdigit():
                raise FormatError(f"no genotype of NAS-Bench-201: '{term}' is not 'operation~source'.")
            if name != "none":
                edges.setdefault(f"{source}_{node}", []).append(_known(name))
    return edges


_V1 = (
    "Genotype(normal=[('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 0), ('sep_conv_3x3', 1), "
    "('skip_connect', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 2)], "
    "reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 0), "
    "('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('avg_pool_3x3', 0)])"
)
_V2 = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), "
    "('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], "
    "reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), "
    "('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)])"
)

GENOTYPES: dict[str, Genotype] = {"darts-v1": Genotype.parse(_V1), "darts-v2": Genotype.parse(_V2)}
"""Published genotypes by name (Liu et al., 2018)."""


def genotype(name_or_path: str | Path) -> Genotype:
    """One of GENOTYPES by name, or a file.

    >>> genotype("darts-v1").params(36, 20)
    3169414

    Raises :class:`FormatError` where neither is there.
    """
    key = str(name_or_path).lower().replace("_", "-")
    if key in GENOTYPES:
        return GENOTYPES[key]
    if not Path(name_or_path).exists():
        raise FormatError(
            f"'{name_or_path}' is neither a file nor a genotype's name; there are {', '.join(GENOTYPES)}, and the "
            f"spaces are {', '.join(SPACES)}."
        )
    return Genotype.load(name_or_path)
