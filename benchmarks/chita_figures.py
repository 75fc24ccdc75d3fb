"""The figures of the CHITA page: time against n, and the sparsity schedules of multi-stage pruning.

    ESPALIER_DATA=… python benchmarks/chita_figures.py schedules --out runs/chita-schedules.jsonl
    python benchmarks/chita_figures.py plot --times runs/chita-time-n.jsonl --schedules runs/chita-schedules.jsonl

The times come from `benchmarks/chita_solvers.py`, one run per n.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import nn

from espalier.experiments.chita_task import accuracy, load_task
from espalier.select.multistage import Schedule, StageOptions, chita_plus_plus
from espalier.select.result import Result

SCHEDULES: tuple[Schedule, ...] = ("exponential", "cubic", "linear", "constant")
# Two colours and markers per family of methods, told apart in print too.
SHOWN = {
    "exchange (default)": ("exchange (ours)", "C0", "o"),
    "magnitude + refit": ("magnitude + refit", "C4", "v"),
    "M-FAC (recursion)": ("M-FAC, as published", "C1", "s"),
    "M-FAC (dual)": ("M-FAC, by the dual", "C3", "D"),
    "WoodFisher (blocks of 2000)": ("WoodFisher, blocks of 2000", "C2", "^"),
}


def schedules(
    stages: int = 15,
    sparsity: float = 0.98,
    seeds: tuple[int, ...] = (0, 1, 2),
    n: int = 1000,
    batch: int = 16,
    ridge: float = 1e-3,
    split: Literal["test", "held-out"] = "test",
    out: Path = Path("runs/chita-schedules.jsonl"),
) -> None:
    """Accuracy of MLPNet after every stage, per schedule; adds what `out` does not have."""
    torch.set_num_threads(1)
    task = load_task("mlpnet", split)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(line["schedule"], line["seed"]) for line in lines if line["stage"] == stages}
    for seed in seeds:
        for schedule in SCHEDULES:
            if (schedule, seed) in done:
                continue
            options = StageOptions(stages, schedule, n, batch, ridge, True, "exchange", seed=seed)
            rows: list[dict[str, object]] = []

            def note(stage: int, model: nn.Module, result: Result) -> None:
                line = {"schedule": schedule, "seed": seed, "stage": stage, "kept": result.kept}  # noqa: B023
                rows.append(line | {"accuracy": accuracy(model, task.judge)})  # noqa: B023

            loss = nn.functional.cross_entropy
            chita_plus_plus(task.model, loss, task.train, 1 - sparsity, options, task.prunable, on_stage=note)
            with out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


def plot(
    times: Path = Path("runs/chita-time-n.jsonl"),
    schedules: Path = Path("runs/chita-schedules.jsonl"),
    folder: Path = Path("docs/results/chita"),
) -> None:
    """Write figure1.png and schedules.png."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in times.read_text().splitlines()]
    lines = [line for line in lines if line["sparsity"] == 0.9]
    figure = Figure(figsize=(8.2, 3.6), layout="constrained", dpi=110)
    for axes, network in zip(figure.subplots(1, 2), ("mlpnet", "resnet20"), strict=True):
        for solver, (name, colour, marker) in SHOWN.items():
            best: dict[int, float] = {}
            for line in lines:
                if (line["network"], line["solver"]) == (network, solver):
                    best[line["n"]] = min(line["cpu_seconds"], best.get(line["n"], 1e9))
            points = sorted(best.items())
            axes.plot(
                *zip(*points, strict=True), marker=marker, color=colour, linewidth=1.3, markersize=4.5, label=name
            )
        axes.set(xscale="log", yscale="log", xlabel="gradients n", title=f"{network}, 90 % of the weights pruned")
        axes.set_xticks(sorted({line["n"] for line in lines}), [str(n) for n in sorted({line["n"] for line in lines})])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("CPU seconds of one solve")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(folder / "figure1.png")

    lines = [json.loads(line) for line in schedules.read_text().splitlines()]
    figure = Figure(figsize=(8.2, 3.4), layout="constrained", dpi=110)
    left, right = figure.subplots(1, 2)
    for k, schedule in enumerate(SCHEDULES):
        mine = [line for line in lines if line["schedule"] == schedule]
        stages = sorted({line["stage"] for line in mine})
        marker = "os^D"[k]
        mean = [_mean([line["accuracy"] for line in mine if line["stage"] == stage]) for stage in stages]
        sparsity = [100 - 100 * _mean([line["kept"] for line in mine if line["stage"] == s]) / 32_360 for s in stages]
        left.plot(stages, sparsity, marker=marker, markersize=4, linewidth=1.3, label=schedule)
        right.plot(stages, mean, marker=marker, markersize=4, linewidth=1.3, label=f"{schedule}: {mean[-1]:.1f}")
    left.set(xlabel="stage", ylabel="weights pruned, %")
    right.set(xlabel="stage", ylabel="test accuracy, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(folder / "schedules.png")
    sys.stdout.write(f"{folder}/figure1.png, {folder}/schedules.png\n")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"schedules": schedules, "plot": plot})
