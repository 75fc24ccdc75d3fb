"""Channels chosen by structured CHITA and by saliency ranking, at equal MACs: MLPNet and ResNet-20.

    ESPALIER_DATA=… python benchmarks/chita_families.py run --network resnet20 --out runs/chita-families.jsonl
    python benchmarks/chita_families.py table --out runs/chita-families.jsonl

Every choice meets the same bound on MACs, is built by `construct`, and the small network is judged on the test images:
with the weights "as they are", or "refitted" by problem (5) on the same gradients; for ResNet-20 batch norm statistics
are then taken anew over the same 2000 training images. Fisher-Taylor is the mean over the gradients of
(Σ w·g)² over the weights that read the channel; taylor and magnitude are the library's saliencies, the sum over what
writes it. All are ranked per MAC that one structure saves.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Literal

import torch
import tyro
from torch import Tensor, nn

from espalier import construct, search_space
from espalier.batchnorm import recalibrate
from espalier.curvature.gradients import gradients
from espalier.experiments.chita_task import Draws, Task, accuracy, load_task
from espalier.saliency import named
from espalier.select.families import FamilyOptions, charged, prune_structures
from espalier.select.problem import Problem
from espalier.space.budget import Budget
from espalier.space.chains import meet
from espalier.space.search_space import SearchSpace
from espalier.sparsify.groups import Groups

RIDGE = {"mlpnet": 1e-3, "resnet20": 1e-5}


def saliencies(space: SearchSpace, task: Task, data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The library's scores of every structure of the space."""
    groups, out = Groups(space), {}
    for name in ("magnitude", "taylor"):
        space.model.zero_grad()
        nn.functional.cross_entropy(space.model(data[0]), data[1]).backward()
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in groups.tensors]
        out[name] = named(name)(space, groups.state(grads)).float()
    space.model.zero_grad()
    return out


def run(
    network: Literal["mlpnet", "resnet20"] = "mlpnet",
    budgets: tuple[float, ...] = (0.7, 0.5, 0.35),
    seeds: tuple[int, ...] = (0, 1, 2),
    n: int = 300,
    batch: int = 10,
    out: Path = Path("runs/chita-families.jsonl"),
) -> None:
    """Add the cells that `out` does not have."""
    torch.set_num_threads(1)
    task = load_task(network)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(line["network"], line["seed"], line["macs"], line["choice"]) for line in lines}
    space = search_space(task.model, task.train[0][:2], levels=("channel",))
    full = space.cost().macs
    names = space.structures.names
    options = FamilyOptions(n, batch, RIDGE[network])
    for seed in seeds:
        if {(network, seed, b, "structured CHITA") for b in budgets} <= done:
            continue
        sample = next(iter(Draws(task.train, n * batch, torch.Generator().manual_seed(seed))))
        fresh = next(iter(Draws(task.train, 2000, torch.Generator().manual_seed(100 + seed))))[0]
        found = gradients(task.model, nn.functional.cross_entropy, sample, n, batch)
        plan = charged(space, found.layout)
        assert plan.names == names
        problem = Problem.of(found.A, None, found.w_bar, options.ridge)
        pieces = torch.zeros(n, len(names))
        inside = plan.group >= 0
        pieces.index_add_(1, plan.group[inside], found.A[:, inside] * found.w_bar[inside])
        scores = saliencies(space, task, (sample[0][:500], sample[1][:500]))
        scores["Fisher-Taylor"] = pieces.square().mean(0)
        for bound in budgets:
            budget = Budget(macs=bound)
            costs = plan.costs(space, budget).float()

            def judge(choice: str, model: nn.Module, removed: list[str], value: float, seconds: float) -> None:
                again = space.of(model)
                small = construct(again, again.solution(removed)).eval()
                recalibrate(small, fresh)  # noqa: B023
                line = {"network": network, "seed": seed, "macs": bound, "choice": choice}  # noqa: B023
                line |= {"accuracy": accuracy(small, task.judge), "spent": again.cost(removed).macs / full}
                with out.open("a") as file:
                    file.write(json.dumps(line | {"objective": value, "cpu_seconds": seconds}) + "\n")

            began = time.process_time()
            refitted, solution = prune_structures(space, sample, nn.functional.cross_entropy, budget, options)
            spent = time.process_time() - began
            judge("structured CHITA", refitted.model, list(solution.removed), solution.provenance["objective"], spent)
            for name, score in scores.items():
                began = time.process_time()
                removed = meet(space, [names[i] for i in (score / costs).argsort(stable=True).tolist()], budget)
                kept = torch.tensor([structure not in set(removed) for structure in names])
                weights, value = plan.refit(problem, kept)
                spent = time.process_time() - began
                model = copy.deepcopy(task.model)
                judge(f"{name}, as they are", model, removed, float("nan"), spent)
                found.layout.write(model, weights)
                judge(f"{name}, refitted", model, removed, value, spent)


def table(out: Path = Path("runs/chita-families.jsonl")) -> None:
    """Mean accuracy (and Q) per choice and budget, as Markdown."""
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for network in dict.fromkeys(line["network"] for line in lines):
        mine = [line for line in lines if line["network"] == network]
        budgets = sorted({line["macs"] for line in mine}, reverse=True)
        rows = [f"| {network} | " + " | ".join(f"{b} of the MACs | Q" for b in budgets) + " |"]
        rows.append("|-|" + "-|-|" * len(budgets))
        for choice in dict.fromkeys(line["choice"] for line in mine):
            cells = []
            for bound in budgets:
                some = [line for line in mine if (line["choice"], line["macs"]) == (choice, bound)]
                cells.append(", ".join(f"{line['accuracy']:.2f}" for line in some))
                known = [q for line in some if not math.isnan(q := line["objective"])]
                cells.append(f"{mean(known):.3g}" if known else "")
            rows.append(f"| {choice} | " + " | ".join(cells) + " |")
        sys.stdout.write("\n".join(rows) + "\n\n")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"run": run, "table": table})
