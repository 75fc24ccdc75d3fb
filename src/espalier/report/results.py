"""What a run is reported by: measurements, checks, and the course of the training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.benchmark import Timer

from espalier.modes import evaluating
from espalier.space.cost import measure

PHASES: Mapping[str, str] = {"warmup": "warm-up", "hybrid": "half-space steps", "done": "final training"}


@dataclass(frozen=True)
class Measurement:
    """One network: parameters, MACs per example, median seconds of one batch, accuracy in 0 … 1."""

    params: int
    macs: int
    latency: float
    batch: int
    accuracy: float | None = None


@dataclass(frozen=True)
class Check:
    """One thing that was proven: ``difference`` is the largest one found; up to ``bound`` it passes."""

    name: str
    difference: float
    bound: float = 0.0
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.difference <= self.bound  # a NaN does not pass


@dataclass(frozen=True)
class Step:
    """The state after one training step.

    ``accuracy`` (of the validation data) where it was measured; ``norm`` of the redundant structures,
    relative to that when they were marked, from then on.
    """

    step: int
    phase: str
    loss: float
    lr: float
    zero: int
    accuracy: float | None = None
    norm: float | None = None


@dataclass
class History:
    """The course of a training. ``structures`` can be removed, ``target`` of them shall be."""

    structures: int
    target: int
    steps: list[Step] = field(default_factory=list)

    def add(self, step: Step) -> None:
        self.steps.append(step)

    def phases(self) -> list[tuple[str, int, int]]:
        """(phase, first step, last step), in order."""
        found: list[tuple[str, int, int]] = []
        for step in self.steps:
            if found and found[-1][0] == step.phase:
                found[-1] = (step.phase, found[-1][1], step.step)
            else:
                found.append((step.phase, step.step, step.step))
        return found


def latencies(
    networks: Mapping[str, nn.Module],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    rounds: int = 5,
    seconds: float = 0.1,
) -> dict[str, float]:
    """Median seconds of one evaluation of each network, in turns, so that all meet the same machine."""
    times: dict[str, list[float]] = {name: [] for name in networks}
    with torch.inference_mode(), evaluating(*networks.values()):
        for _ in range(rounds):
            for name, network in networks.items():
                timer = Timer(
                    "network(*args, **kwargs)",
                    globals={"network": network, "args": args, "kwargs": dict(kwargs or {})},
                    num_threads=torch.get_num_threads(),
                )
                times[name] += timer.blocked_autorange(min_run_time=seconds).times
    return {name: median(all_times) for name, all_times in times.items()}


def measure_all(
    networks: Mapping[str, nn.Module],
    args: tuple[Any, ...],
    accuracy: Callable[[nn.Module], float] | None = None,
    seconds: float = 0.1,
) -> dict[str, Measurement]:
    """Cost, latency and accuracy of each network."""
    batch = next((t.shape[0] for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor) and t.ndim), 1)
    times = latencies(networks, args, seconds=seconds)
    found = {}
    for name, network in networks.items():
        cost = measure(network, args)
        found[name] = Measurement(cost.params, cost.macs, times[name], batch, accuracy(network) if accuracy else None)
    return found


def difference(one: Any, other: Any) -> float:
    """The largest absolute difference of two outputs (tensors, or trees of them); NaN where shapes differ."""
    worst = 0.0
    for a, b in zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True):
        if a.shape != b.shape:
            return float("nan")
        if a.numel():
            gap = float((a.double() - b.double()).abs().max())
            worst = max(worst, gap) if gap == gap else gap
    return worst
