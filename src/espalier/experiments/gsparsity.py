"""Operation pruning by group sparsity: Table 1 and Figure 1 of GSparsity, on networks of two cores' size.

    ESPALIER_DATA=... python -m espalier.experiments.gsparsity --mu 0.05 0.1 --steps 400 --out runs/gsparsity

Each μ trains a network of DARTS cells with every operation on every edge. Operations that end at zero are
removed; the accuracy is taken before, and after with three readings of "zero". One JSON line per μ; those
that are there are not run again.
"""

import argparse
import json
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from espalier.construct import construct
from espalier.data import Augment, Batches, Dataset, load
from espalier.errors import InvalidSolution
from espalier.models.darts import DARTS
from espalier.space.search_space import SearchSpace, search_space
from espalier.sparsify.flat import FlatProximal
from espalier.sparsify.grouping import space_groups
from espalier.sparsify.proxsgd import ProxSGD
from espalier.sparsify.rmda import RMDA


@dataclass(frozen=True)
class Recipe:
    """One run. ``method``: "proxsgd" or "rmda". ε falls from ``lr`` to a tenth of it along a cosine, as
    published.
    """

    mu: float = 0.05
    method: str = "proxsgd"
    steps: int = 400
    lr: float = 0.05
    rho: float = 0.9
    batch_size: int = 64
    channels: int = 8
    cells: int = 3
    nodes: int = 2
    operations: tuple[str, ...] = ("skip", "sep_conv_3x3", "dil_conv_3x3")
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.method}-{self.mu:g}-{self.steps}-{self.seed}"


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


def optimizer(recipe: Recipe, space: SearchSpace) -> FlatProximal:
    """The recipe's optimizer over one group per operation."""
    groups = space_groups(space)
    if recipe.method == "rmda":
        return RMDA(groups, mu=recipe.mu, lr=recipe.lr)
    return ProxSGD(groups, mu=recipe.mu, lr=recipe.lr, rho=recipe.rho)


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset) -> float:
    """Share of right predictions, in per cent."""
    model.eval()
    batches = Batches(data, 250, shuffle=False)
    return 100.0 * sum(int((model(x).argmax(1) == y).sum()) for x, y in batches) / len(data)


def run(recipe: Recipe, train: Dataset, test: Dataset) -> dict[str, Any]:
    """Train, remove what is zero, and compare."""
    torch.manual_seed(recipe.seed)
    model = DARTS(recipe.channels, recipe.cells, recipe.nodes, recipe.operations, affine=True)
    space = search_space(model, (torch.randn(2, 3, 32, 32),), keep=["stem"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = optimizer(recipe, space)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, recipe.steps, 0.1 * recipe.lr)
    batches = Batches(train, recipe.batch_size, recipe.seed, Augment(pad=4, flip=True), drop_last=True)
    model.train()
    start, done, loss = time.perf_counter(), 0, torch.zeros(())
    while done < recipe.steps:
        for x, y in batches:
            opt.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            opt.step()
            if recipe.method == "proxsgd":
                cosine.step()
            done += 1
            if done == recipe.steps:
                break
    line: dict[str, Any] = {**asdict(recipe), "loss": round(float(loss.detach()), 4)}
    line["wall_s"] = round(time.perf_counter() - start, 1)
    full = space.cost()
    line |= {"groups": len(opt.grouping), "before": accuracy(model, test)}
    readings = {"support": opt.zero_groups()}
    readings |= {f"{t:g}": opt.zero_groups(threshold=t) for t in (1e-6, 1e-3)}
    for reading, zero in readings.items():
        line[reading] = _after(space, [n for n in space_names(space) if n in set(zero)], test, full.params)
    opt.snap()
    line["after_snap"] = accuracy(model, test)
    return line


def space_names(space: SearchSpace) -> list[str]:
    """Names of all structures, in order."""
    return [s.name for s in space.structures]


def _after(space: SearchSpace, zero: list[str], test: Dataset, full: int) -> dict[str, Any]:
    """The sub-network without these operations; its accuracy without any retraining."""
    removed = space.removable_in_order(zero)
    try:
        small = construct(space, space.solution(removed))
    except InvalidSolution as error:
        return {"zero": len(zero), "error": str(error)}
    params = sum(p.numel() for p in small.parameters())
    return {
        "zero": len(zero),
        "removed": len(removed),
        "params": params,
        "pruned": round(100.0 * (1.0 - params / full), 2),
        "accuracy": accuracy(small, test),
    }


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mu", type=float, nargs="+", default=[0.02, 0.05, 0.1])
    parser.add_argument("--method", choices=("proxsgd", "rmda"), default="proxsgd")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--images", type=int, default=5000, help="how many training images are held out to test on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/gsparsity"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train = load("cifar10", "train", validation=args.images)
    test = load("cifar10", "validation", validation=args.images)
    for mu in args.mu:
        recipe = Recipe(mu=mu, method=args.method, steps=args.steps, lr=args.lr, seed=args.seed)
        path = args.out / f"{recipe.name}.json"
        if not path.exists():
            path.write_text(json.dumps(run(recipe, train, test)) + "\n")
        print(path.read_text(), end="", flush=True)


if __name__ == "__main__":
    main()
