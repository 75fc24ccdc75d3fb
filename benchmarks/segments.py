"""Time of Algorithm 2 against the number of nodes: chains of 8 to 80 cells of four branches.

    python benchmarks/segments.py

Prints, per size, nodes and the median time of segmenting the trace and of finding its structures, and the
slope of log time against log nodes (1 is linear).
"""

import math
import statistics
import time

import torch
from torch import Tensor, nn

from espalier.graph.segments import segment_graph
from espalier.graph.trace import Trace, trace
from espalier.space.discover import segment_families
from espalier.space.search_space import SearchSpace


class Cell(nn.Module):
    """Four branches, three of them convolutions, concatenated and mixed."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, k, padding=k // 2), nn.BatchNorm2d(width), nn.ReLU())
            for k in (1, 3, 5)
        )
        self.mix = nn.Conv2d(4 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(torch.cat([*(b(x) for b in self.branches), nn.functional.max_pool2d(x, 3, 1, 1)], 1))


def median(function: object, *args: object, runs: int = 7) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function(*args)  # type: ignore[operator]
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def space_of(traced: Trace) -> SearchSpace:
    graph = segment_graph(traced)
    return SearchSpace(traced, graph, *segment_families(traced, graph, set()))


def main() -> None:
    points = []
    print(f"{'cells':>6} {'nodes':>6} {'structures':>10} {'segments ms':>12} {'space ms':>9}")
    for cells in (8, 16, 24, 40, 56, 80):
        traced = trace(nn.Sequential(*(Cell() for _ in range(cells))), (torch.randn(2, 8, 6, 6),))
        nodes = len(traced.graph.nodes)
        segmented, found = median(segment_graph, traced), median(space_of, traced)
        points.append((math.log(nodes), math.log(found)))
        print(f"{cells:6} {nodes:6} {len(space_of(traced)):10} {segmented * 1e3:12.2f} {found * 1e3:9.2f}")
    xs, ys = zip(*points, strict=True)
    mean_x, mean_y = statistics.mean(xs), statistics.mean(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x in xs)
    print(f"slope of log time against log nodes: {slope:.2f}")


if __name__ == "__main__":
    main()
