"""Gradual pruning of ResNet-20 on CIFAR-10 to 90, 95 and 98 %: exact exchanges against magnitude, same epochs.

    ESPALIER_DATA=… python -m espalier.experiments.chita_gradual run --method exchange --out runs/gradual
    python -m espalier.experiments.chita_gradual table --out runs/gradual

One run passes through the three sparsities: a few prunings in ever smaller steps, then fine-tuning on the support,
then the network is judged on the test images and the next sparsity begins. It stops and goes on bit by bit as if it
had not been stopped: the state is written after every epoch.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from espalier.experiments.chita_task import Draws, Task, accuracy, augmented, load_task
from espalier.experiments.logs import forget_after
from espalier.select.gradual import GradualOptions, GradualPruner, weight_selector
from espalier.select.multistage import StageOptions

Method = Literal["exchange", "chita", "weight-magnitude"]


@dataclass(frozen=True)
class Short:
    """The `short` recipe. An epoch is `images` training images; of each target's `epochs`, the first `events` begin
    with a pruning. rate: learning rate of SGD with momentum 0.9, from which a cosine falls to a hundredth for each
    target. n, m, ridge: gradients of one pruning (no first-order term, as in the paper's gradual runs).
    """

    targets: tuple[float, ...] = (0.9, 0.95, 0.98)
    first: float = 0.5
    events: tuple[int, ...] = (6, 3, 3)
    epochs: tuple[int, ...] = (10, 7, 8)
    images: int = 15_000
    batch: int = 128
    rate: float = 0.05
    decay: float = 1e-4
    n: int = 500
    m: int = 8
    ridge: float = 1e-4
    judged: int = 10_000


class Stairs(GradualOptions):
    """Prunings of several targets one after the other, each approached in ever smaller steps (cubic)."""

    def __init__(self, recipe: Short):
        super().__init__(recipe.first, recipe.targets[-1], sum(recipe.events))
        plan: dict[int, float] = {}
        start, low = 0, recipe.first
        for target, events, epochs in zip(recipe.targets, recipe.events, recipe.epochs, strict=True):
            for i in range(events):
                left = 1 - (i + (low != recipe.first)) / max(events - (low == recipe.first), 1)
                plan[start + i] = target + (low - target) * left**3
            start, low = start + epochs, target
        object.__setattr__(self, "plan", plan)

    def event(self, epoch: int) -> int | None:
        return epoch if epoch in self.plan else None  # type: ignore[attr-defined]

    def sparsity(self, event: int) -> float:
        return self.plan[event]  # type: ignore[attr-defined]


def run(
    method: Method = "exchange",
    out: Path = Path("runs/chita-gradual"),
    seed: int = 0,
    stop_after: int | None = None,
    recipe: Short = Short(),
    threads: int = 1,
) -> None:
    """Train, or go on where it stopped; `stop_after` ends it after so many epochs of this call."""
    torch.set_num_threads(threads)
    task = load_task("resnet20")
    out.mkdir(parents=True, exist_ok=True)
    gradual(task, method, out / f"{method}-{seed}", seed, recipe, stop_after)


def gradual(task: Task, method: str, path: Path, seed: int, recipe: Short, stop_after: int | None = None) -> nn.Module:
    """The run itself: `path`.pt holds its state, `path`.jsonl a line per epoch."""
    model = task.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), recipe.rate, momentum=0.9, weight_decay=recipe.decay)
    options = StageOptions(1, "cubic", recipe.n, recipe.m, recipe.ridge, False, drop_dead=False)

    def select(model: nn.Module, keep: float, event: int) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        data = Draws(task.train, recipe.n * recipe.m, torch.Generator().manual_seed(1000 * seed + event))
        return weight_selector(data, method=method, options=options, prunable=task.prunable)(model, keep, event)

    pruner = GradualPruner(model, optimizer, select, Stairs(recipe))
    state = path.with_suffix(".pt")
    epoch, seconds = 0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        pruner.load_state_dict(saved["pruner"])
        epoch, seconds = saved["epoch"], saved["seconds"]
    forget_after(path.with_suffix(".jsonl"), "epoch", epoch)
    last = sum(recipe.epochs)
    end = last if stop_after is None else min(last, epoch + stop_after)
    while epoch < end:
        began = time.process_time()
        aim = pruner.before_epoch(epoch)
        selecting = time.process_time() - began
        generator = torch.Generator().manual_seed(10_000 * (seed + 1) + epoch)
        loss = _epoch(model, optimizer, task, recipe, epoch, generator)
        epoch, seconds = epoch + 1, seconds + time.process_time() - began
        line: dict[str, Any] = {"method": method, "seed": seed, "epoch": epoch, "loss": loss, "sparsity": aim}
        line |= {"cpu_seconds": seconds, "selecting": selecting}
        if epoch in _ends(recipe):
            model.eval()
            line["accuracy"] = accuracy(model, (task.judge[0][: recipe.judged], task.judge[1][: recipe.judged]))
            line["target"] = recipe.targets[_ends(recipe).index(epoch)]
            line["zeros"] = sum(int((model.get_parameter(name) == 0).sum()) for name in pruner.masks)
        with path.with_suffix(".jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        temporary = state.with_suffix(".part")
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}
            | {"epoch": epoch, "seconds": seconds},
            temporary,
        )
        os.replace(temporary, state)
    return model


def _epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    task: Task,
    recipe: Short,
    epoch: int,
    generator: torch.Generator,
) -> float:
    model.train()
    index = torch.randperm(len(task.train[0]), generator=generator)[: recipe.images]
    parts, total = index.split(recipe.batch), torch.zeros(())
    ends = _ends(recipe)
    target = next(i for i, end in enumerate(ends) if epoch < end)
    length = recipe.epochs[target]
    done = epoch - (ends[target] - length)
    for step, part in enumerate(parts):
        progress = (done + step / len(parts)) / length
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        images = augmented(task.train[0][part], generator).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), task.train[1][part])
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(part)
    return float(total) / len(index)


def _ends(recipe: Short) -> list[int]:
    return [sum(recipe.epochs[: i + 1]) for i in range(len(recipe.epochs))]


def table(out: Path = Path("runs/chita-gradual")) -> None:
    """Accuracy per method and sparsity, as Markdown."""
    lines = [json.loads(line) for path in sorted(out.glob("*.jsonl")) for line in path.read_text().splitlines()]
    lines = [line for line in lines if "target" in line]
    targets = sorted({line["target"] for line in lines})
    rows = ["| method, seed | " + " | ".join(map(str, targets)) + " | CPU-s |", "|-|" + "-|" * (len(targets) + 1)]
    for method, seed in dict.fromkeys((line["method"], line["seed"]) for line in lines):
        mine = {line["target"]: line for line in lines if (line["method"], line["seed"]) == (method, seed)}
        cells = [f"{mine[t]['accuracy']:.2f}" if t in mine else "" for t in targets]
        spent = max(line["cpu_seconds"] for line in mine.values())
        rows.append(f"| {method}, {seed} | " + " | ".join(cells) + f" | {spent:.0f} |")
    sys.stdout.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    import tyro

    tyro.extras.subcommand_cli_from_dict({"run": run, "table": table})
