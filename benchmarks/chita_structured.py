"""Neurons of MLPNet chosen by structured CHITA and by saliency ranking, at equal MACs; and N:M patterns.

    ESPALIER_DATA=… python benchmarks/chita_structured.py

A neuron of the two hidden layers is its row of incoming weights (without bias, a zero row gives a zero
output); its cost is its multiplications, in and out. All selections are refitted exactly, so that they
differ in the choice alone; "as they are" keeps the weights.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

from espalier.curvature.gradients import Gradients, gradients
from espalier.experiments.chita_task import Task, accuracy, load_task
from espalier.select import chita, magnitude, n_of_m
from espalier.select.dual import refit
from espalier.select.problem import Problem
from espalier.select.structured import structured_chita


def by_score(score: Tensor, costs: Tensor, budget: float) -> Tensor:
    """Keep the groups of highest score per cost that fit the budget."""
    kept, spent = torch.zeros(len(score), dtype=torch.bool), 0.0
    for g in (score / costs).argsort(descending=True).tolist():
        if spent + float(costs[g]) <= budget:
            kept[g], spent = True, spent + float(costs[g])
    return kept


def record(
    task: Task,
    found: Gradients,
    seed: int,
    out: Path,
    weights: Tensor,
    name: str,
    budget: object,
    value: float,
) -> None:
    """Write the accuracy of one selection; the model gets its own weights back."""
    found.layout.write(task.model, weights)
    line = {"choice": name, "budget": budget, "seed": seed, "accuracy": accuracy(task.model, task.judge)}
    found.layout.write(task.model, found.w_bar)
    with out.open("a") as file:
        file.write(json.dumps(line | {"objective": value}) + "\n")


def main(
    n: int = 300,
    batch: int = 10,
    ridge: float = 1e-3,
    seeds: int = 3,
    out: Path = Path("runs/chita-structured.jsonl"),
) -> None:
    torch.set_num_threads(1)
    task = load_task("mlpnet")
    model, loss = task.model, nn.functional.cross_entropy
    out.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        index = torch.randperm(len(task.train[0]), generator=torch.Generator().manual_seed(seed))[: n * batch]
        sample = task.train[0][index], task.train[1][index]
        found = gradients(model, loss, sample, n, batch)
        layout, w_bar = found.layout, found.w_bar
        problem = Problem.of(found.A, None, w_bar, ridge)
        group = torch.cat(
            [
                torch.arange(40).repeat_interleave(784),
                40 + torch.arange(20).repeat_interleave(40),
                torch.full((200,), -1),
            ]
        )
        costs = torch.cat([torch.full((40,), 784.0 + 20), torch.full((20,), 40.0 + 10)])

        def sums(values: Tensor, group: Tensor = group) -> Tensor:
            return torch.zeros(60).index_add(0, group[group >= 0], values[group >= 0])

        judge = partial(record, task, found, seed, out)
        taylor = sums((found.A * w_bar).square().mean(0)), sums(w_bar.square())
        for fraction in (0.5, 0.35, 0.25):
            budget = fraction * float(costs.sum())
            ours = structured_chita(problem, group, budget, costs)
            judge(ours.result.weights, "structured CHITA", fraction, ours.result.objective)
            for name, score in zip(("Fisher-Taylor saliency", "magnitude"), taylor, strict=True):
                kept = by_score(score, costs, budget)
                support = (group < 0) | kept[group.clamp_min(0)]
                weights = refit(problem, support)
                judge(weights, f"{name}, refitted", fraction, problem.objective(weights))
                plain = torch.where(support, w_bar, 0)
                judge(plain, f"{name}, as they are", fraction, problem.objective(plain))
        for pattern in ((2, 4), (4, 8), (1, 4)):
            quota = n_of_m(layout, *pattern)
            result = chita(found.A, None, w_bar, quota, ridge)
            judge(result.weights, "pattern, exchange", f"{pattern[0]}:{pattern[1]}", result.objective)
            plain = magnitude(w_bar, quota).weights
            judge(plain, "pattern, magnitude", f"{pattern[0]}:{pattern[1]}", problem.objective(plain))


if __name__ == "__main__":
    tyro.cli(main)
