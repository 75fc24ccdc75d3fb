"""Latency: measured for whole networks, predicted for sub-networks from a table of measured operators."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, fx, nn
from torch.utils.benchmark import Timer

from espalier.modes import evaluating
from espalier.space.amounts import Amounts, Axis, Row, Work

if TYPE_CHECKING:
    from espalier.space.search_space import SearchSpace

SHARES = ((1.0, 1.0), (0.5, 1.0), (1.0, 0.5), (0.5, 0.5), (0.25, 0.25))  # of a layer's inputs and outputs
TURNS = 15
LARGE = 30 << 20  # bytes, below the largest block that glibc takes from its own heap
PER_OPERATOR = 0.02  # seconds of repetitions for one entry of the table


def latency(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor,
    kwargs: Mapping[str, Any] | None = None,
    seconds: float = 1.0,
) -> float:
    """Seconds of one forward pass in eval mode without gradients: the median over about ``seconds`` of runs.

    >>> 0.0 < latency(nn.Linear(4, 3), torch.randn(2, 4), seconds=0.01) < 1.0
    True

    On the device that the model and the inputs lie on, with as many threads as torch uses.
    """
    return latencies([model], args, kwargs, seconds)[0]


def latencies(
    models: Sequence[nn.Module],
    args: tuple[Any, ...] | Tensor,
    kwargs: Mapping[str, Any] | None = None,
    seconds: float = 1.0,
) -> list[float]:
    """The :func:`latency` of several models, run in turns so that the machine's other load falls on all alike."""
    inputs = args if isinstance(args, tuple) else (args,)
    timers = [
        Timer(
            "model(*inputs, **named)",
            globals={"model": model, "inputs": inputs, "named": dict(kwargs or {})},
            num_threads=torch.get_num_threads(),
        )
        for model in models
    ]
    # Freed once, a large block makes glibc keep memory that it would else return and fault in again at every run:
    # without it the time depends on what the process happened to allocate before.
    torch.empty(LARGE, dtype=torch.uint8)
    with torch.no_grad(), ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        calls = [max(1, int(seconds / TURNS / max(timer.timeit(2).mean, 1e-9))) for timer in timers]
        turns = [[timer.timeit(n).mean for timer, n in zip(timers, calls, strict=True)] for _ in range(TURNS)]
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def timed(space: "SearchSpace", whole: float) -> Amounts:
    """The space's amounts and, as the kind "latency", the seconds of a forward pass that takes ``whole`` seconds.

    Every operator is run and timed by itself. Dense layers are also timed at halves and a quarter of their inputs and
    outputs: a + b · inputs + c · outputs + d · inputs · outputs is fitted to that. All other operators take a
    constant for the call, and for the rest a time in proportion to what stays of the axes that they work on.
    The times are scaled so that the full network takes ``whole``.
    """
    axis = Axis(space.families)
    rows = list(_rows(space, axis))
    total = sum(row[1] for row in rows)
    scaled: list[Row] = [(kind, t * whole / max(total, 1e-12), axes, segments) for kind, t, axes, segments in rows]
    return Amounts(axis, [*space.rows(axis), *scaled])


def _rows(space: "SearchSpace", axis: Axis) -> Iterator[Row]:
    work = Work(space.trace, space.axes, axis)
    table = _Table(space)
    for node, (seconds, parts) in table.entries().items():
        segment = space.graph.segment_of.get(node)
        segments = [] if segment is None else [segment]
        if parts is not None:
            weight = work.of_parameter(work.names[f"{node.target}.weight"])
            for t, axes in zip(parts, ([], weight[1:2], weight[:1], weight[:2]), strict=True):
                yield "latency", t, axes, segments
            continue
        call = min(seconds, table.call)
        yield "latency", call, [], segments
        for share, axes, _ in work(node):
            yield "latency", (seconds - call) * share, axes or work.of_result(node), segments


class _Table:
    """Seconds of every operator of a trace, on the example inputs."""

    def __init__(self, space: "SearchSpace"):
        self.trace = space.trace
        self.device = next((p.device for p in space.model.parameters()), torch.device("cpu"))
        self.known: dict[object, tuple[float, ...]] = {}
        one = torch.ones(1, device=self.device)
        self.call = self.seconds(lambda: one + one)

    def entries(self) -> dict[fx.Node, tuple[float, tuple[float, ...] | None]]:
        """Node → its seconds and, for a dense layer, the four coefficients."""
        found: dict[fx.Node, tuple[float, tuple[float, ...] | None]] = {}
        table = self

        class Run(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                if n.op.startswith("call_") and not n.name.startswith("getitem"):
                    args, kwargs = self.fetch_args_kwargs_from_env(n)
                    target = self.fetch_attr(str(n.target)) if n.op == "call_module" else n.target
                    run = target if callable(target) else lambda: None
                    found[n] = table.seconds(lambda: run(*args, **kwargs)), table.parts(run, args)
                bar.advance(task)
                return result

        graph = self.trace.graph_module
        inputs = [t.to(self.device) if isinstance(t, Tensor) else t for t in self.trace.flat_inputs()]
        with torch.no_grad(), evaluating(graph), _progress() as bar:
            task = bar.add_task("timing operators", total=len(graph.graph.nodes))
            Run(graph).run(*inputs, enable_io_processing=False)
        return found

    def parts(self, layer: Any, args: tuple[Any, ...]) -> tuple[float, ...] | None:
        """The coefficients of 1, inputs, outputs and inputs · outputs, if it is a dense layer."""
        if type(layer) not in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) or getattr(layer, "groups", 1) > 1:
            return None
        x = args[0]
        widths = (layer.weight.shape[1], layer.weight.shape[0])
        key = (type(layer), repr(layer), tuple(x.shape), x.dtype)
        if key not in self.known:
            times = [self.seconds(_narrower(layer, x, s, widths)) for s in SHARES]
            design = np.array([(1.0, a, b, a * b) for a, b in SHARES])
            fitted = np.linalg.lstsq(design, np.array(times), rcond=None)[0].clip(min=0.0)
            self.known[key] = tuple((fitted * times[0] / max(float(fitted.sum()), 1e-12)).tolist())
        return self.known[key]

    def seconds(self, run: Callable[[], Any]) -> float:
        """The median time of a call."""
        first = self._once(run)
        repeats = int(min(max(PER_OPERATOR / max(first, 1e-7), 3), 50))
        return statistics.median(self._once(run) for _ in range(repeats))

    def _once(self, run: Callable[[], Any]) -> float:
        self._wait()
        start = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def _progress() -> Progress:
    """On a terminal only."""
    return Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def _narrower(layer: Any, x: Tensor, shares: tuple[float, float], widths: tuple[int, int]) -> Callable[[], Any]:
    """A call of a layer with so much of the inputs and outputs."""
    inputs, outputs = (max(1, round(w * share)) for w, share in zip(widths, shares, strict=True))
    options: dict[str, Any] = {"bias": layer.bias is not None, "device": x.device, "dtype": layer.weight.dtype}
    shape = list(x.shape)
    if isinstance(layer, nn.Linear):
        shape[-1] = inputs
        small: nn.Module = nn.Linear(inputs, outputs, **options)
    else:
        shape[x.ndim - len(layer.kernel_size) - 1] = inputs
        options |= {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        small = type(layer)(inputs, outputs, layer.kernel_size, **options)
    narrow = torch.rand(shape, device=x.device).to(x.dtype)
    return lambda: small(narrow)
