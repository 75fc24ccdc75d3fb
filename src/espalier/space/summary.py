"""A search space as a table."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from espalier.graph.constants import shape_of
from espalier.graph.trace import Trace

if TYPE_CHECKING:
    from espalier.space.search_space import SearchSpace


@dataclass(frozen=True)
class Row:
    """One structure, or one segment that stays; ``params`` and ``macs`` (per example) are its own."""

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
    rows = []
    for structure in space.structures:
        nodes = [n for i in structure.segments for n in space.graph[i].nodes]
        own = sum(sizes[p] for p in structure.parameters)
        rows.append(Row(structure.name, structure.level, own, sum(macs.get(n, 0) for n in nodes), True, ""))
    for segment in space.graph:
        if segment.name in space.kept:
            own = sum(sizes[p] for p in segment.parameters)
            work = sum(macs.get(n, 0) for n in segment.nodes)
            rows.append(Row(segment.name, "segment", own, work, False, space.kept[segment.name]))
    segments = {segment.name for segment in space.graph}
    rows += [Row(name, "segment", 0, 0, False, space.kept[name]) for name in space.kept if name not in segments]
    return Summary(tuple(rows), space.trace.notes)


def macs_per_node(trace: Trace) -> dict[fx.Node, int]:
    """Multiply-accumulates of every node, per example of the batch, from shapes alone."""
    found: dict[fx.Node, int] = {}
    batch = next((shape_of(n.meta["val"])[0] for n in trace.graph.nodes if _is_batched(n)), 1)

    class Counter(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            before = counter.get_total_flops()
            result = super().run_node(n)
            found[n] = (counter.get_total_flops() - before) // 2 // batch
            return result

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, FlopCounterMode(display=False) as counter:
        inputs = [mode.from_tensor(v) if hasattr(v, "untyped_storage") else v for v in trace.flat_inputs()]
        Counter(trace.graph_module).run(*inputs, enable_io_processing=False)
    return found


def _is_batched(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "placeholder" and getattr(value, "ndim", 0) > 0
