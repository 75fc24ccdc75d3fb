"""Pruning by group sparsity: Table 1 and Figure 1 of GSparsity, and its filter pruning, at two cores' size.

    ESPALIER_DATA=... python -m espalier.experiments.gsparsity --network darts-v2 --mu 0.05 0.1 0.2
    ESPALIER_DATA=... python -m espalier.experiments.gsparsity --network resnet20 --mu 0.01 0.02 0.04

Each μ trains the network with one group per operation ("darts-v2": the published cells; "cells": every operation on
every edge) or per filter with its norm ("resnet20", from a trained checkpoint; "resnet56", from scratch). What ends at
zero is removed; the accuracy is taken before, and after with several readings of "zero", without any retraining. One
JSON line per μ; those that are there are not run again, and a run that was stopped goes on.
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from espalier.batchnorm import recalibrate
from espalier.construct import construct
from espalier.data import Augment, Batches, Dataset, load
from espalier.errors import InvalidSolution
from espalier.experiments.ispasp_resnet import load_dense
from espalier.models.darts import DARTS
from espalier.models.resnet_cifar import CifarResNet
from espalier.nas.genotype import genotype
from espalier.space.search_space import SearchSpace, search_space
from espalier.sparsify.flat import FlatProximal
from espalier.sparsify.grouping import space_groups
from espalier.sparsify.proxsgd import ProxSGD
from espalier.sparsify.rmda import RAMDA, RMDA

METHODS = {"proxsgd": ProxSGD, "rmda": RMDA, "ramda": RAMDA}
NETWORKS = ("darts-v2", "cells", "resnet20", "resnet56")
PATIENCE = 140  # steps after which a dead group of norm 1 has decayed below 1e-6 at ε = 0.1


@dataclass(frozen=True)
class Recipe:
    """One run. ``lr`` is ε, constant, or with ``falls`` down to a tenth by a cosine; ``channels`` and ``cells`` are
    those of the DARTS networks.
    """

    network: str = "darts-v2"
    mu: float = 0.1
    method: str = "proxsgd"
    steps: int = 500
    lr: float = 0.1
    falls: bool = False
    rho: float = 0.9
    batch_size: int = 64
    channels: int = 8
    cells: int = 8
    seed: int = 0

    @property
    def name(self) -> str:
        """Of the run's files."""
        return f"{self.network}-{self.method}-{self.mu:g}-{self.steps}-{self.seed}{'-falls' if self.falls else ''}"

    def step_size(self, step: int) -> float:
        """ε at a step.

        >>> recipe = Recipe(steps=100, lr=0.1, falls=True)
        >>> round(recipe.step_size(0), 3), round(recipe.step_size(100), 3)
        (0.1, 0.01)
        """
        share = 0.55 + 0.45 * math.cos(math.pi * step / self.steps) if self.falls else 1.0
        return self.lr * share


def cell_type_key(model: nn.Module) -> Any:
    """The key of GS-NAS: the same operation on the same edge of all cells of one type (normal, reduction).

    >>> key = cell_type_key(DARTS(channels=4, cells=3))
    >>> key("cells.0.edges.0_2.sep_conv_3x3.0-1-2")
    'normal.0_2.sep_conv_3x3'
    """
    cells = len(model.get_submodule("cells"))  # type: ignore[arg-type]
    reductions = {str(cells // 3), str(2 * cells // 3)}

    def key(name: str) -> str:
        parts = name.split(".")
        if "edges" not in parts:
            return name
        kind = "reduction" if parts[1] in reductions else "normal"
        return ".".join((kind, *parts[parts.index("edges") + 1 :][:2]))

    return key


def build(recipe: Recipe) -> SearchSpace:
    """The network of a recipe, and what may go of it: filters of the ResNet, operations of cells."""
    torch.manual_seed(recipe.seed)
    if recipe.network == "resnet20":
        return search_space(load_dense(), (torch.randn(2, 3, 32, 32),), levels=("channel",))
    if recipe.network == "resnet56":
        return search_space(CifarResNet(blocks=9), (torch.randn(2, 3, 32, 32),), levels=("channel",))
    if recipe.network == "cells":
        operations = ("skip", "sep_conv_3x3", "dil_conv_3x3")
        model: nn.Module = DARTS(recipe.channels, recipe.cells, 2, operations, affine=True)
    else:
        model = genotype("darts-v2").network(recipe.channels, recipe.cells)
    return search_space(model, (torch.randn(2, 3, 32, 32),), keep=["stem"])


def images(recipe: Recipe, held_out: int) -> tuple[Dataset, Dataset]:
    """CIFAR-10 without ``held_out`` training images, and these."""
    train, test = (load("cifar10", split, validation=held_out) for split in ("train", "validation"))
    if recipe.network == "resnet20":  # as the checkpoint wants them
        half = (0.5, 0.5, 0.5)
        train, test = (replace(d, mean=half, std=half) for d in (train, test))
    return train, test


def optimizer(recipe: Recipe, space: SearchSpace) -> FlatProximal:
    """The recipe's optimizer over one group per structure."""
    more = {"rho": recipe.rho} if recipe.method == "proxsgd" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return METHODS[recipe.method](space_groups(space), mu=recipe.mu, lr=recipe.lr, **more)


@torch.no_grad()
def right(model: nn.Module, data: Dataset) -> int:
    """Number of right predictions, in single precision."""
    model.eval()
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in Batches(data, 250, shuffle=False))


def train(recipe: Recipe, space: SearchSpace, opt: FlatProximal, data: Dataset, saved: Path) -> tuple[float, float]:
    """All steps, from the checkpoint where there is one, in mixed precision; the last loss, and CPU seconds of all."""
    model = space.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    batches = Batches(data, recipe.batch_size, recipe.seed, Augment(pad=4, flip=True), drop_last=True)
    last, spent, began = float("nan"), 0.0, time.process_time()
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        batches.load_state_dict(state["batches"])
        last, spent = state["loss"], state["cpu_s"]
    while opt.steps_done < recipe.steps:
        for x, y in batches:
            model.train()
            opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)
            loss.backward()
            for group in opt.param_groups:
                group["lr"] = recipe.step_size(opt.steps_done)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            opt.step()
            if opt.steps_done % 100 == 0:
                print(recipe.name, opt.steps_done, f"{loss:.3f}", len(opt.zero_groups()), flush=True)
            if opt.steps_done % 100 == 0 or opt.steps_done == recipe.steps:
                last = float(loss.detach())
                state = {"model": model.state_dict(), "opt": opt.state_dict(), "batches": batches.state_dict()}
                state |= {"loss": last, "cpu_s": spent + time.process_time() - began}
                torch.save(state, saved.with_suffix(".tmp"))
                saved.with_suffix(".tmp").replace(saved)
            if opt.steps_done == recipe.steps:
                break
    return last, spent + time.process_time() - began


def new_statistics(model: nn.Module, data: Dataset, seed: int, count: int = 40) -> None:
    """Take the norms' statistics anew: with a large constant ε the weights move faster than running means follow."""
    size = min(128, len(data))
    images = (x for x, _ in Batches(data, size, seed, Augment(pad=4, flip=True), drop_last=True))
    recalibrate(model.eval(), images, samples=count * size, batch=size)


def run(recipe: Recipe, out: Path, held_out: int) -> dict[str, Any]:
    """Train, remove what is zero, and compare."""
    data, test = images(recipe, held_out)
    space = build(recipe)
    opt = optimizer(recipe, space)
    loss, spent = train(recipe, space, opt, data, out / f"{recipe.name}.pt")
    line: dict[str, Any] = {**asdict(recipe), "loss": round(loss, 4), "cpu_s": round(spent, 1)}
    new_statistics(space.model, data, recipe.seed)
    line |= {"groups": len(opt.grouping), "images": len(test), "before": right(space.model, test)}
    readings = {"support": opt.zero_groups(), f"support for {PATIENCE} steps": opt.zero_groups(patience=PATIENCE)}
    readings |= {f"norm <= {t:g}": opt.zero_groups(threshold=t) for t in (1e-6, 1e-3)}
    seen: dict[frozenset[str], dict[str, Any]] = {}
    for reading, zero in readings.items():
        key = frozenset(zero)
        if key not in seen:
            seen[key] = _after(space, zero, test)
        line[reading] = seen[key]
    return line


def _after(space: SearchSpace, zero: Sequence[str], test: Dataset) -> dict[str, Any]:
    """The sub-network without these structures; its accuracy without any retraining."""
    names = set(zero)
    removed = space.removable_in_order([n for n in space.structures.names if n in names])
    try:
        small = construct(space, space.solution(removed))
    except InvalidSolution as error:
        return {"zero": len(zero), "error": str(error)}
    full, left = space.cost(), space.cost(removed)
    return {
        "zero": len(zero),
        "removed": len(removed),
        "params_pruned": round(100.0 * (1.0 - left.params / full.params), 2),
        "macs_pruned": round(100.0 * (1.0 - left.macs / full.macs), 2),
        "after": right(small, test),
    }


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="darts-v2")
    parser.add_argument("--mu", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--method", choices=tuple(METHODS), default="proxsgd")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--falls", action="store_true", help="epsilon falls to a tenth by a cosine")
    parser.add_argument("--images", type=int, default=5000, help="how many training images are held out to test on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/gsparsity"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for mu in args.mu:
        size = 128 if args.network.startswith("resnet") else 64
        recipe = Recipe(args.network, mu, args.method, args.steps, args.lr, args.falls, batch_size=size, seed=args.seed)
        path = args.out / f"{recipe.name}.json"
        if not path.exists():
            path.write_text(json.dumps(run(recipe, args.out, args.images)) + "\n")
        print(path.read_text(), end="", flush=True)


if __name__ == "__main__":
    main()
