"""The method of a run as an optimizer."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import espalier
from espalier.experiments.config import Run
from espalier.saliency import magnitude, random
from espalier.space.budget import Budget
from espalier.space.search_space import SearchSpace

__all__ = ["make_optimizer", "nearest"]


def make_optimizer(run: Run, space: SearchSpace, model: nn.Module, steps: int) -> Optimizer:
    """SGD with the run's momentum and weight decay, alone or inside the method's optimizer."""
    base: dict[str, Any] = {"lr": run.lr, "momentum": run.momentum, "weight_decay": run.weight_decay}
    if run.method == "full":
        return torch.optim.SGD(model.parameters(), **base)
    search, to_zero = run.phases(steps)
    phases = {"warmup_steps": search, "projection_steps": to_zero}
    budget, _ = nearest(run, space)
    if run.method in ("magnitude", "random"):
        scores = magnitude if run.method == "magnitude" else random(run.seed)
        return espalier.H2SPG(space, budget=budget, saliency=scores, **phases, **base)
    kind = {"h2spg": "H2SPG", "dhspg": "DHSPG", "proxsg+": "ProxSGPlus"}[run.method]
    return getattr(espalier, kind)(space, budget=budget, saliency=run.saliency, **phases, **base)


def nearest(run: Run, space: SearchSpace) -> tuple[Budget, str]:
    """The run's budget, or the nearest that the space can meet and a sentence about it.

    DHSPG, which looks at no hierarchy, gets the budget as it is asked for.
    """
    budget = run.budget
    if budget is None:
        raise ValueError(f"the method {run.method!r} takes no budget")
    if budget.structures is None or run.method == "dhspg":
        return budget, ""
    asked, most = budget.structures_to_remove(len(space)), len(space.most_removable())
    if asked <= most:
        return budget, ""
    words = f"{asked} of {len(space)} structures were asked for; {most} can go together, and they went"
    return Budget(structures=1.0 - most / len(space)), words
