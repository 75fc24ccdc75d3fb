"""The segment graph of a trace: Algorithm 2 of ASGSSD, in O(V + E).

Data flows from the model's inputs to its outputs through the nodes of the trace. A segment is a maximal run
of nodes that lives or goes as one: it ends before a vertex that several tensors enter and after a vertex that
several read. A joint vertex (add, concat, mul, stack) is a segment of its own: it still works when some of
its inputs are gone.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from espalier.graph.lift import is_tensor
from espalier.graph.trace import Trace

aten = torch.ops.aten

JOINT = frozenset(
    {
        aten.add.Tensor,
        aten.mul.Tensor,
        aten.cat.default,
        aten.concat.default,
        aten.concatenate.default,
        aten.stack.default,
        aten.hstack.default,
        aten.vstack.default,
        aten.dstack.default,
    }
)


@dataclass(frozen=True, eq=False)
class Segment:
    """A maximal run of nodes that lives or goes as one.

    ``parameters`` are the names of the parameters that its nodes use, ``incoming`` and ``outgoing`` the
    indices of the neighbouring segments, each once.
    """

    index: int
    name: str
    nodes: tuple[fx.Node, ...]
    parameters: tuple[str, ...]
    joint: bool
    incoming: tuple[int, ...]
    outgoing: tuple[int, ...]
    reads_input: bool
    feeds_output: bool


@dataclass(frozen=True, eq=False)
class SegmentGraph:
    """Segments in the order of the forward pass, and the segment of every node on the data's way."""

    segments: tuple[Segment, ...]
    segment_of: dict[fx.Node, int]

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    def __len__(self) -> int:
        return len(self.segments)

    def __getitem__(self, index: int) -> Segment:
        return self.segments[index]


def segment_graph(trace: Trace) -> SegmentGraph:
    """Segment ``trace`` as Algorithm 2 does (lines 2 to 10).

    >>> from torch import nn
    >>> from espalier.graph.trace import trace
    >>> net = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
    >>> [s.name for s in segment_graph(trace(net, (torch.randn(3, 4),)))]
    ['0-1']
    """
    flow = DataFlow(trace)
    runs: list[list[fx.Node]] = []
    run_of: dict[fx.Node, int] = {}
    queue = deque(v for v in flow.vertices if flow.starts(v))
    while queue:
        vertex = queue.popleft()
        if vertex in run_of:
            continue
        run = flow.grow(vertex)
        run_of.update(dict.fromkeys(run, len(runs)))
        runs.append(run)
        queue.extend(flow.readers[run[-1]])
    order = {node: i for i, node in enumerate(flow.vertices)}
    runs.sort(key=lambda run: order[run[0]])
    segment_of = {node: i for i, run in enumerate(runs) for node in run}
    names = _unique([_name(run, flow) for run in runs])
    segments = []
    for index, run in enumerate(runs):
        first, last = run[0], run[-1]
        parameters: dict[str, None] = {}
        for node in run:
            parameters.update(dict.fromkeys(flow.parameters[node]))
        segments.append(
            Segment(
                index=index,
                name=names[index],
                nodes=tuple(run),
                parameters=tuple(parameters),
                joint=flow.is_joint(first),
                incoming=tuple(dict.fromkeys(segment_of[n] for n in flow.sources[first] if n in segment_of)),
                outgoing=tuple(dict.fromkeys(segment_of[n] for n in flow.readers[last])),
                reads_input=any(n.op == "placeholder" for n in flow.sources[first]),
                feeds_output=last in flow.returned,
            )
        )
    return SegmentGraph(tuple(segments), segment_of)


class DataFlow:
    """Which node reads which tensor: the trace graph (V, E) without sizes, flags and parameters."""

    def __init__(self, trace: Trace):
        self.model = trace.model
        canonical: dict[int, str] = {}
        self.names: dict[str, str] = {}
        for name, parameter in trace.model.named_parameters(remove_duplicate=False):
            self.names[name] = canonical.setdefault(id(parameter), name)
        modules = dict(trace.graph_module.named_modules(remove_duplicate=False))
        self.vertices: list[fx.Node] = []
        self.sources: dict[fx.Node, list[fx.Node]] = {}
        self.readers: dict[fx.Node, list[fx.Node]] = {}
        self.parameters: dict[fx.Node, list[str]] = {}
        self.returned: set[fx.Node] = set()
        on_the_way: set[fx.Node] = set()
        beside: dict[fx.Node, list[str]] = {}
        for node in trace.graph.nodes:
            inputs = node.all_input_nodes
            if node.op == "output":
                self.returned.update(inputs)
                continue
            if not is_tensor(node):
                continue
            sources = [n for n in inputs if n in on_the_way]
            names = [p for n in inputs for p in beside.get(n, ())]
            if node.op == "get_attr":
                names = [self.names[node.target]] if node.target in self.names else []
            elif node.op == "call_module":
                own = modules[node.target].named_parameters()
                names += [self.names[f"{node.target}.{name}"] for name, _ in own]
            if node.op == "placeholder" or sources:
                on_the_way.add(node)
                self.sources[node], self.readers[node], self.parameters[node] = sources, [], names
                if node.op != "placeholder":
                    self.vertices.append(node)
                for source in sources:
                    self.readers[source].append(node)
            else:
                beside[node] = names

    def is_joint(self, node: fx.Node) -> bool:
        return node.target in JOINT and len(self.sources[node]) > 1

    def owner(self, parameter: str) -> str:
        """The path of the layer that holds the parameter; the parameter's own name where no layer does."""
        path = parameter.rpartition(".")[0]
        leaf = path and not any(True for _ in self.model.get_submodule(path).children())
        return path if leaf else parameter

    def starts(self, node: fx.Node) -> bool:
        return any(source.op == "placeholder" for source in self.sources[node])

    def grow(self, vertex: fx.Node) -> list[fx.Node]:
        """The run that starts at ``vertex``: as long as one tensor goes from one reader to the next."""
        run = [vertex]
        while not self.is_joint(run[-1]) and len(self.readers[run[-1]]) == 1 and run[-1] not in self.returned:
            following = self.readers[run[-1]][0]
            if len(self.sources[following]) > 1:
                break
            run.append(following)
        return run


def _name(run: list[fx.Node], flow: DataFlow) -> str:
    """``layer1.0.conv2-bn2``: the modules of the run, their common prefix once; operators where it has none.

    Where an operator reads a parameter itself, the layer that owns the parameter stands for it.
    """
    paths: list[str] = []
    for node in run:
        owners = [str(node.target)] if node.op == "call_module" else map(flow.owner, flow.parameters[node])
        paths += [owner for owner in owners if owner not in paths[-1:]]
    if not paths:
        return "-".join(node.name for node in run)
    split = [path.split(".") for path in paths]
    shared = 0
    while all(len(parts) > shared + 1 and parts[shared] == split[0][shared] for parts in split):
        shared += 1
    prefix = ".".join(split[0][:shared])
    return (f"{prefix}." if prefix else "") + "-".join(".".join(parts[shared:]) for parts in split)


def _unique(names: list[str]) -> list[str]:
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}@{seen[name] - 1}")
    return out
