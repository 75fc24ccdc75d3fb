"""Per-sample gradients against one backward pass of the same samples.

ESPALIER_DATA=… python benchmarks/chita_gradients.py
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from torch import nn

from espalier.curvature.gradients import GradientOptions, gradients
from espalier.experiments.chita_task import load_task


def cpu_seconds(work: Callable[[], object], repeats: int = 2) -> float:
    best = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        work()
        best = min(best, time.process_time() - began)
    return best


def main(out: Path = Path("runs/chita-gradients.jsonl")) -> None:
    torch.set_num_threads(1)
    out.parent.mkdir(parents=True, exist_ok=True)
    loss = nn.functional.cross_entropy

    def record(**line: object) -> None:
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")

    for network, samples in (("mlpnet", 1024), ("resnet20", 128)):
        task = load_task(network)  # type: ignore[arg-type]
        x, y = task.train[0][:samples], task.train[1][:samples]

        def backward(task=task, x=x, y=y) -> None:
            task.model.zero_grad()
            loss(task.model(x), y).backward()

        record(network=network, samples=samples, what="one backward pass", cpu_seconds=cpu_seconds(backward))
        for batch in (1, 16):
            for method in ("layers", "vmap", "loop"):
                options = GradientOptions(method=method)  # type: ignore[arg-type]
                seconds = cpu_seconds(
                    lambda t=task, x=x, y=y, b=batch, o=options: gradients(
                        t.model, loss, (x, y), len(x) // b, b, t.prunable, o
                    )
                )
                record(network=network, samples=samples, what=method, batch=batch, cpu_seconds=seconds)


if __name__ == "__main__":
    tyro.cli(main)
