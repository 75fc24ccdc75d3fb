"""One-shot pruning tables of CHITA: MLPNet on MNIST and ResNet-20 on CIFAR-10.

    ESPALIER_DATA=… python -m espalier.experiments.chita run --network mlpnet --out runs/mlpnet.jsonl
    python -m espalier.experiments.chita table --results runs/mlpnet.jsonl

Each cell (method, sparsity, seed) is one line of JSON; cells that are already there are skipped.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

import torch
from torch import nn

from espalier.batchnorm import recalibrate
from espalier.curvature.dual import DualInverse
from espalier.curvature.gradients import Gradients, gradients
from espalier.curvature.layout import WeightLayout
from espalier.curvature.woodbury import BlockWoodburyInverse
from espalier.experiments.chita_task import PAPER, SPARSITIES, Draws, Network, Pair, Task, accuracy, load_task
from espalier.select.cbs import cbs
from espalier.select.magnitude import magnitude
from espalier.select.multistage import StageOptions, chita_plus_plus, in_stages, prune_once
from espalier.select.obs import Inverse, brain_surgeon
from espalier.select.patterns import cardinality
from espalier.select.problem import Problem
from espalier.select.result import Result
from espalier.select.steps import Steps

ONE_SHOT = ("magnitude", "woodfisher", "cbs", "mfac", "chita", "ours-one-shot")


@dataclass(frozen=True)
class Settings:
    """What was chosen on the held-out part of the training set, per network.

    path: of a staged method, the sparsities of one run of stages that passes through all of the table's, instead of
    a run for each; up to each of them it is a multi-stage run that ends there. arriving: in place of `staged` for the
    stages that end at one of the table's sparsities. fresh: training images over which
    batch norm statistics are taken anew for a second accuracy of the methods in `judged_twice`; 0 for none.
    """

    n: int
    batch: int
    damping: dict[str, float]
    staged: dict[str, StageOptions]
    path: dict[str, tuple[float, ...]] = field(default_factory=dict)
    arriving: dict[str, StageOptions] = field(default_factory=dict)
    fresh: int = 0
    judged_twice: tuple[str, ...] = ("magnitude", "chita", "ours-one-shot")


def _path(network: Network, counts: tuple[int, ...]) -> tuple[float, ...]:
    """Stages through the table's sparsities, each approached in ever smaller steps (cubic)."""
    out, low = [], 0.0
    for high, stages in zip(SPARSITIES[network], counts, strict=True):
        out += [low + (high - low) * (1 - (1 - t / stages) ** 3) for t in range(1, stages)] + [high]
        low = high
    return tuple(out)


_OURS = StageOptions(1, "cubic", 500, 4, 0.2, True, "exchange", drop_dead=False, recalibrate=500, free=True)
SETTINGS: dict[str, Settings] = {
    "mlpnet": Settings(
        n=1000,
        batch=10,
        damping={"woodfisher": 1e-3, "cbs": 1e-3, "mfac": 1e-3, "chita": 1e-3, "ours-one-shot": 1e-3},
        staged={
            "chita++": StageOptions(50, "cubic", 1000, 16, 3e-3, True, "magnitude", drop_dead=False),
            "chita++ direct": StageOptions(50, "cubic", 1000, 16, 3e-3, True, "magnitude", drop_dead=False),
            "ours": StageOptions(50, "cubic", 1000, 16, 1e-3, True, "exchange"),
        },
        path=dict.fromkeys(("chita++", "ours"), _path("mlpnet", (16, 5, 5, 5, 7, 9, 15))),
    ),
    "resnet20": Settings(
        n=500,
        batch=16,
        damping={"woodfisher": 1e-5, "cbs": 1e-5, "mfac": 1e-5, "chita": 1e-5, "ours-one-shot": 1e-5},
        staged={
            "chita++": StageOptions(50, "cubic", 250, 8, 0.1, True, "magnitude", drop_dead=False, recalibrate=500),
            "ours": replace(_OURS, steps=Steps(8, 250, 0.4, torch.bfloat16)),
            "ours without steps": _OURS,
        },
        path={
            "chita++": _path("resnet20", (2, 2, 2, 4, 7, 11, 22)),
            "ours": _path("resnet20", (3, 3, 4, 5, 7, 9, 11)),
            "ours without steps": _path("resnet20", (2, 2, 3, 7, 13, 19, 34)),
        },
        arriving={"ours": replace(_OURS, steps=Steps(128, 250, 0.3, torch.bfloat16), recalibrate=2000)},
        fresh=2000,
    ),
}


def one_shot(method: str, found: Gradients, k: int, settings: Settings) -> Result:
    """One of the single-stage methods on given gradients; the objective is that of problem (5) throughout."""
    A, w_bar = found.A, found.w_bar
    damping = settings.damping.get(method, 1e-3)
    quota = cardinality(k, len(w_bar))
    match method:
        case "magnitude":
            return magnitude(w_bar, k)
        case "woodfisher" | "mfac":
            return brain_surgeon(Problem.of(A, None, w_bar, damping), quota, _inverse(method, found, damping))
        case "cbs":
            return cbs(A, w_bar, k, damping)
        case "chita":
            options = StageOptions(ridge=damping, first_order=False, solver="iht", drop_dead=False)
        case "ours-one-shot":
            options = StageOptions(ridge=damping, first_order=False, solver="exchange")
        case _:
            raise ValueError(f"unknown method {method!r}")
    return prune_once(A, w_bar, quota, options)


_LAST: dict[str, tuple[Gradients, Inverse]] = {}


def _inverse(method: str, found: Gradients, damping: float) -> Inverse:
    """The inverse Fisher of a method, factorised once for all sparsities (the first one pays for it)."""
    if method not in _LAST or _LAST[method][0] is not found:
        blocks = BlockWoodburyInverse(found.A, damping, sizes=tuple(found.layout.sizes))
        _LAST[method] = (found, blocks if method == "woodfisher" else DualInverse(found.A, damping))
    return _LAST[method][1]


def run(
    network: Network = "mlpnet",
    out: Path = Path("runs/chita-mlpnet.jsonl"),
    methods: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    sparsities: tuple[float, ...] = (),
    split: Literal["test", "held-out"] = "test",
    n: int | None = None,
    batch: int | None = None,
    threads: int = 1,
) -> None:
    """Fill in the cells of Table 1 that `out` does not have yet.

    methods: by default the single-stage ones and those with a path of stages; a staged method without a path has a run
    of its own for each sparsity. n, batch: other gradients for single-stage methods.
    """
    torch.set_num_threads(threads)
    task, settings = load_task(network, split), SETTINGS[network]
    settings = replace(settings, n=n or settings.n, batch=batch or settings.batch)
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {(r["method"], r["sparsity"], r["seed"]) for r in _lines(out)}
    layout = WeightLayout.of(task.model, task.prunable)
    w_bar = layout.flatten(task.model)
    common = {"network": network, "split": split, "p": layout.numel}

    def record(cell: dict[str, Any]) -> None:
        with out.open("a") as file:
            file.write(json.dumps({**common, **cell}) + "\n")

    for seed in seeds:
        for method in methods or (*ONE_SHOT, *settings.path):
            todo = [s for s in sparsities or SPARSITIES[network] if (method, s, seed) not in done]
            if method == "magnitude" and seed > 0:
                continue  # nothing in it is random
            found = None
            if method in settings.path and todo:
                options, state = settings.staged[method], out.with_suffix(f".{method}-{seed}.pt")
                if task.train[0].shape[1] == 3:
                    arriving = settings.arriving.get(method, options)
                    plan = [(s, arriving if s in SPARSITIES[network] else options) for s in settings.path[method]]
                    cells = _stage_by_stage(task, plan, todo, seed, state)
                else:
                    cells = _along_path(task, options, settings.path[method], todo, seed)
                for cell in cells:
                    record({"method": method, "seed": seed, **cell})
                state.unlink(missing_ok=True)
                continue
            for sparsity in todo:
                began = time.process_time()
                if method in settings.staged:
                    result = _staged(task, settings.staged[method], sparsity, seed)
                else:
                    found = found or _sample(task, settings, seed)
                    began = time.process_time()
                    result = one_shot(method, found, int((1 - sparsity) * layout.numel), settings)
                seconds = time.process_time() - began
                objective = result.objective
                if method == "magnitude":
                    assert found is not None
                    objective = Problem.of(found.A, None, w_bar, settings.damping["chita"]).objective(result.weights)
                pruned = copy.deepcopy(task.model)
                layout.write(pruned, result.weights)
                cell = {"method": method, "sparsity": sparsity, "seed": seed, "accuracy": accuracy(pruned, task.judge)}
                if settings.fresh and method in settings.judged_twice:
                    recalibrate(pruned, _draw(task, settings.fresh, seed)[0])
                    cell["recalibrated"] = accuracy(pruned, task.judge)
                record(cell | {"objective": objective, "kept": result.kept, "cpu_seconds": seconds})


_SAMPLES: dict[tuple[int, int], Gradients] = {}


def _sample(task: Task, settings: Settings, seed: int) -> Gradients:
    """The same gradients for every single-stage method of a seed."""
    key = (id(task), seed)
    if key not in _SAMPLES:
        _SAMPLES.clear()
        sample = _draw(task, settings.n * settings.batch, seed)
        loss = nn.functional.cross_entropy
        _SAMPLES[key] = gradients(task.model, loss, sample, settings.n, settings.batch, task.prunable)
    return _SAMPLES[key]


def _draw(task: Task, count: int, seed: int) -> Pair:
    return next(iter(Draws(task.train, count, torch.Generator().manual_seed(seed))))


def _staged(task: Task, options: StageOptions, sparsity: float, seed: int) -> Result:
    options = replace(options, seed=seed)
    return chita_plus_plus(task.model, nn.functional.cross_entropy, task.train, 1 - sparsity, options, task.prunable)


def _along_path(
    task: Task, options: StageOptions, path: tuple[float, ...], wanted: list[float], seed: int
) -> Iterator[dict[str, Any]]:
    """One run of stages through all sparsities; a cell for each one that is wanted."""
    cells: list[dict[str, Any]] = []
    began = time.process_time()

    def judge(stage: int, model: nn.Module, result: Result) -> None:
        if path[stage - 1] in wanted:
            seconds = time.process_time() - began
            cell = {"sparsity": path[stage - 1], "accuracy": accuracy(model, task.judge), "stages": stage}
            cells.append(cell | {"objective": result.objective, "kept": result.kept, "cpu_seconds": seconds})

    steps = [1 - s for s in path if s <= max(wanted)]
    options = replace(options, seed=seed)
    loss = nn.functional.cross_entropy
    chita_plus_plus(task.model, loss, task.train, 0.5, options, task.prunable, steps, judge)
    yield from cells


def _stage_by_stage(
    task: Task, plan: Sequence[tuple[float, StageOptions]], wanted: list[float], seed: int, state: Path
) -> Iterator[dict[str, Any]]:
    """The same on photographs, augmented afresh for every stage, with options of its own for each sparsity; `state`
    lets a stopped run go on.
    """
    model, done, seconds, loss = copy.deepcopy(task.model), 0, 0.0, nn.functional.cross_entropy
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        done, seconds = saved["done"], saved["seconds"]
    for stage, (sparsity, options) in list(enumerate(plan))[done:]:
        began = time.process_time()
        generator = torch.Generator().manual_seed(1000 * (seed + 1) + stage)
        data = Draws(task.train, options.n * options.batch, generator)
        result, model = in_stages(model, loss, data, 0.5, options, task.prunable, [1 - sparsity])
        seconds += time.process_time() - began
        if sparsity in wanted:
            cell = {"sparsity": sparsity, "accuracy": accuracy(model, task.judge), "stages": stage + 1}
            yield cell | {"objective": result.objective, "kept": result.kept, "cpu_seconds": seconds}
        temporary = state.with_suffix(".part")
        torch.save({"model": model.state_dict(), "done": stage + 1, "seconds": seconds}, temporary)
        os.replace(temporary, state)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(results: Path = Path("runs/chita-mlpnet.jsonl")) -> str:
    """Mean accuracy (standard error) per method and sparsity as a Markdown table, the paper's beside it."""
    lines = _lines(results)
    network = lines[0]["network"]
    sparsities = sorted({r["sparsity"] for r in lines})
    rows = ["| method | " + " | ".join(map(str, sparsities)) + " |", "|-|" + "-|" * len(sparsities)]
    for method in dict.fromkeys(r["method"] for r in lines):
        cells = [
            _cell([r["accuracy"] for r in lines if (r["method"], r["sparsity"]) == (method, s)]) for s in sparsities
        ]
        rows.append(f"| {method} | " + " | ".join(cells) + " |")
        if any("recalibrated" in r for r in lines if r["method"] == method):
            cells = [
                _cell([r["recalibrated"] for r in lines if (r["method"], r["sparsity"]) == (method, s)])
                for s in sparsities
            ]
            rows.append(f"| {method}, new statistics | " + " | ".join(cells) + " |")
        if method in PAPER[network]:
            known = dict(zip(SPARSITIES[network], PAPER[network][method], strict=True))
            rows.append(f"| *paper: {method}* | " + " | ".join(f"*{known.get(s, '')}*" for s in sparsities) + " |")
    for method in dict.fromkeys(r["method"] for r in lines):
        cells = [
            _cell([r["objective"] for r in lines if (r["method"], r["sparsity"]) == (method, s)], 3) for s in sparsities
        ]
        rows.append(f"| Q, {method} | " + " | ".join(cells) + " |")
    for method in dict.fromkeys(r["method"] for r in lines):
        times = [[r["cpu_seconds"] for r in lines if (r["method"], r["sparsity"]) == (method, s)] for s in sparsities]
        rows.append(f"| CPU-s, {method} | " + " | ".join(f"{mean(t):.2f}" if t else "" for t in times) + " |")
    return "\n".join(rows)


def _cell(values: Iterable[float], digits: int = 2) -> str:
    values = list(values)
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ({stdev(values) / len(values) ** 0.5:.{digits}f})"


def show(results: Path = Path("runs/chita-mlpnet.jsonl")) -> None:
    """Print the table of a results file."""
    import sys

    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    import tyro

    tyro.extras.subcommand_cli_from_dict({"run": run, "table": show})
