"""A search space as a table."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from espalier.space.cost import macs_per_node
from espalier.space.families import kept_axes

if TYPE_CHECKING:
    from espalier.space.search_space import SearchSpace


@dataclass(frozen=True)
class Row:
    """One family (its number of structures behind its name), or one segment or axis of a parameter that stays.

    ``params`` and ``macs`` (per example) are its own; those of an axis are its parameter's.
    """

    name: str
    level: str
    params: int
    macs: int
    removable: bool
    reason: str


@dataclass(frozen=True)
class Summary:
    """Printed, it is a table."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        head = ("structure", "level", "params", "MACs", "removable")
        cells = [
            (r.name, r.level, f"{r.params:,}", f"{r.macs:,}", "yes" if r.removable else f"no: {r.reason}")
            for r in self.rows
        ]
        widths = [max(len(row[i]) for row in (head, *cells)) for i in range(4)]
        lines = []
        for row in (head, *cells):
            left, right = [row[i].ljust(widths[i]) for i in (0, 1)], [row[i].rjust(widths[i]) for i in (2, 3)]
            lines.append("  ".join((*left, *right, row[4])).rstrip())
        return "\n".join((*lines, *(f"note: {note}" for note in self.notes)))


def summarize(space: "SearchSpace") -> Summary:
    """See :meth:`SearchSpace.summary`."""
    macs = macs_per_node(space.trace)
    sizes = {name: p.numel() for name, p in space.model.named_parameters()}
    by_weight = space.macs_by_weight()
    rows = []
    for family in space.families:
        if family.level == "segment":
            nodes = [n for i in family.segments for n in space.graph[i].nodes]
            work = sum(macs.get(n, 0) for n in nodes)
            rows.append(Row(family.name, "segment", sum(sizes[p] for p in family.parameters), work, True, ""))
            continue
        shares = [
            (s.parameter, 1.0 if s.owner is None else float((s.owner >= 0).float().mean())) for s in family.slices
        ]
        own = sum(round(sizes[name] * share) for name, share in shares)
        work = sum(round(by_weight.get(name, 0) * share) for name, share in shares)
        rows.append(Row(f"{family.name} ({len(family)})", family.level, own, work, True, ""))
    for (name, dim), reason in kept_axes(space.axes).items():
        rows.append(Row(f"{name}, axis {dim}", "axis", sizes[name], by_weight.get(name, 0), False, reason))
    for segment in space.graph:
        if segment.name in space.kept:
            own = sum(sizes[p] for p in segment.parameters)
            work = sum(macs.get(n, 0) for n in segment.nodes)
            rows.append(Row(segment.name, "segment", own, work, False, space.kept[segment.name]))
    segments = {segment.name for segment in space.graph}
    rows += [Row(name, "segment", 0, 0, False, space.kept[name]) for name in space.kept if name not in segments]
    return Summary(tuple(rows), space.trace.notes)
