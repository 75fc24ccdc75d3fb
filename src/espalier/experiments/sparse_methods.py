"""All methods that sparsify while training, and magnitude pruning, on one network, data, length and budget.

    ESPALIER_DATA=... python -m espalier.experiments.sparse_methods --out runs/sparse_methods
    python -m espalier.experiments.sparse_methods --table --out runs/sparse_methods

LeNet-5-Caffe on Fashion-MNIST, channels (filters and neurons) of its three hidden layers. Every method trains for
``epochs``, is then cut to the budget of MACs (what it has not closed itself goes in the order of its own score), and
the constructed network is fine-tuned for ``finetune`` epochs in one and the same way. One JSON line per run; those that
are there are not run again.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from espalier.construct import construct
from espalier.data import load
from espalier.experiments.spread import spread
from espalier.models.lenet5 import LeNet5
from espalier.saliency import named
from espalier.space.budget import Budget
from espalier.space.chains import meet
from espalier.space.search_space import SearchSpace, search_space
from espalier.sparsify.flat import FlatProximal
from espalier.sparsify.grouping import Grouping, space_groups
from espalier.sparsify.groups import Groups
from espalier.sparsify.halfspace import H2SPG
from espalier.sparsify.proxsgd import ProxSGD
from espalier.sparsify.rmda import RAMDA, RMDA
from espalier.sparsify.space_gates import SpaceGates

METHODS = ("magnitude", "h2spg", "proxsgd", "rmda", "ramda", "l0-hc", "l0-ar", "l0-arm")
PROXIMAL: dict[str, Callable[[Grouping, float], FlatProximal]] = {
    "proxsgd": lambda groups, mu: ProxSGD(groups, mu, lr=0.1, rho=0.9),
    "rmda": lambda groups, mu: RMDA(groups, mu, lr=0.1),
    "ramda": lambda groups, mu: RAMDA(groups, mu, lr=0.01),
}
GATES_LR = {"hc": 2e-2, "ar": 3e-3, "arm": 3e-3}  # of φ; the weights' is 1e-3

COLUMNS = (
    "method",
    "strength",
    "seeds",
    "itself: MACs left, accuracy %",
    "cut: widths",
    "accuracy after the cut %",
    "after fine-tuning %",
    "CPU s",
)


@dataclass(frozen=True)
class Recipe:
    """One run. ``strength``: μ of the proximal methods, λ of the gates (divided by the number of images)."""

    method: str = "proxsgd"
    strength: float = 0.0
    macs: float = 0.25
    epochs: int = 8
    finetune: int = 2
    images: int = 10_000
    batch_size: int = 100
    seed: int = 0

    @property
    def name(self) -> str:
        """Of the run's file."""
        return f"{self.method}-{self.strength:g}-{self.macs:g}-{self.epochs}-{self.finetune}-{self.images}-{self.seed}"


STRENGTH = {"proxsgd": 0.02, "rmda": 0.03, "ramda": 0.008, "l0-hc": 0.03, "l0-ar": 0.1, "l0-arm": 0.1}


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right predictions, in per cent."""
    model.eval()
    return (
        100.0
        * sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True))
        / len(y)
    )


class Trainer:
    """A method under way: one step, the order in which structures go, and which are closed already."""

    def __init__(self, recipe: Recipe, space: SearchSpace, steps: int):
        self.space, self.model = space, space.model
        self.gates: SpaceGates | None = None
        opt: torch.optim.Optimizer
        if recipe.method.startswith("l0-"):
            kind = recipe.method.removeprefix("l0-")
            self.gates = SpaceGates(
                space, estimator=kind, lam=recipe.strength, examples=recipe.images, initial=0.8, seed=recipe.seed
            )
            groups = [{"params": [*self.model.parameters()]}, {"params": [self.gates.phi], "lr": GATES_LR[kind]}]
            opt = torch.optim.Adam(groups, lr=1e-3)
        elif recipe.method in PROXIMAL:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                opt = PROXIMAL[recipe.method](space_groups(space), recipe.strength)
        elif recipe.method == "h2spg":
            opt = H2SPG(
                space, torch.optim.SGD, Budget(macs=recipe.macs), saliency="relative", warmup_steps=steps // 5,
                projection_steps=steps // 2, lr=0.02, momentum=0.9,
            )  # fmt: skip
        else:
            opt = torch.optim.SGD(self.model.parameters(), lr=0.02, momentum=0.9)
        self.opt = opt

    def step(self, x: Tensor, y: Tensor) -> None:
        """One step of training."""
        self.opt.zero_grad()
        if self.gates is not None:
            gates = self.gates
            gates.backward(lambda: cross_entropy(gates(x), y))
        else:
            cross_entropy(self.model(x), y).backward()
        self.opt.step()
        if self.gates is not None:
            self.gates.clamp_()

    def outcome(self) -> tuple[list[str], list[str]]:
        """Names of what is closed, and all names in the order in which they go; the model holds the final weights."""
        names = list(self.space.structures.names)
        if self.gates is not None:
            pi = self.gates.probabilities().detach()
            relative = torch.cat(
                [p / p.mean() for p in self.gates.by_site(pi).values()]
            )  # as "relative" does for norms
            order = [names[i] for i in relative.argsort().tolist()]
            closed = list(self.gates.solution().removed)
            self.gates.finish()
        elif isinstance(self.opt, H2SPG):
            closed, order = list(self.opt.solution().removed), list(names)
        else:
            closed = self.opt.snap() if isinstance(self.opt, FlatProximal) else []
            groups = Groups(self.space)
            scores = named("relative")(self.space, groups.state([torch.zeros_like(t) for t in groups.tensors]))
            order = [names[i] for i in scores.argsort().tolist()]
        first = set(closed)
        return closed, [*(n for n in order if n in first), *(n for n in order if n not in first)]


def run(recipe: Recipe) -> dict[str, Any]:
    """Train, cut to the budget, fine-tune; accuracies on all test images."""
    x, y = load("fashion-mnist", "train", validation=0).tensors()
    test = load("fashion-mnist", "test").tensors()
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(recipe.seed))[: recipe.images]
    x, y = x[chosen], y[chosen]
    torch.manual_seed(recipe.seed)
    space = search_space(LeNet5(), (torch.zeros(2, 1, 28, 28),), levels=("channel",))
    steps = recipe.epochs * (recipe.images // recipe.batch_size)
    trainer, start = Trainer(recipe, space, steps), time.process_time()
    draw = torch.Generator().manual_seed(recipe.seed + 1000)
    for _ in range(recipe.epochs):
        space.model.train()
        for rows in torch.randperm(len(x), generator=draw).split(recipe.batch_size):
            trainer.step(x[rows], y[rows])
    closed, order = trainer.outcome()
    full = space.cost()
    own = space.removable_in_order(closed)
    line: dict[str, Any] = asdict(recipe) | {"cpu_s": round(time.process_time() - start, 1)}
    line |= {"own_macs": round(space.cost(own).macs / full.macs, 4), "own_structures": len(own)}
    line["own_accuracy"] = accuracy(construct(space, space.solution(own)), *test)
    removed = meet(space, order, Budget(macs=recipe.macs))
    small = construct(space, space.solution(removed))
    cost = space.cost(removed)
    line |= {"macs": round(cost.macs / full.macs, 4), "params": round(cost.params / full.params, 4)}
    line["widths"] = [f.count - sum(n.startswith(f"{f.name}[") for n in removed) for f in space.families]
    line["cut_accuracy"] = accuracy(small, *test)
    tuned = torch.optim.SGD(small.parameters(), lr=0.01, momentum=0.9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(tuned, max(1, recipe.finetune * steps // recipe.epochs))
    for _ in range(recipe.finetune):
        small.train()
        for rows in torch.randperm(len(x), generator=draw).split(recipe.batch_size):
            tuned.zero_grad()
            cross_entropy(small(x[rows]), y[rows]).backward()
            tuned.step()
            cosine.step()
    line["accuracy"] = accuracy(small, *test)
    return line


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown of all runs: means, and sample deviations where a method has several seeds."""
    rows = [f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS)]
    for method in METHODS:
        runs = sorted((line for line in lines if line["method"] == method), key=lambda line: line["seed"])
        if runs:
            own = f"{_spread(runs, 'own_macs', 3)}, {_spread(runs, 'own_accuracy')}"
            widths = ", ".join("-".join(map(str, run["widths"])) for run in runs)
            cells = (f"{runs[0]['strength']:g}", str(len(runs)), own, widths, _spread(runs, "cut_accuracy"))
            rows.append(f"| {' | '.join((method, *cells, _spread(runs, 'accuracy'), _spread(runs, 'cpu_s', 0)))} |")
    return "\n".join(rows)


def _spread(runs: list[dict[str, Any]], key: str, digits: int = 2) -> str:
    return spread((run[key] for run in runs), digits)


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--strength", type=float, help="μ or λ; default: of the method")
    parser.add_argument("--macs", type=float, default=0.25)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--finetune", type=int, default=2)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/sparse_methods"))
    parser.add_argument("--table", action="store_true", help="print what is in --out, a folder or a file of lines")
    args = parser.parse_args()
    if args.table:
        paths = [args.out] if args.out.is_file() else sorted(args.out.glob("*.json"))
        print(table([json.loads(line) for path in paths for line in path.read_text().splitlines()]))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seed:
        for method in args.method:
            strength = STRENGTH.get(method, 0.0) if args.strength is None else args.strength
            recipe = Recipe(method, strength, args.macs, args.epochs, args.finetune, args.images, seed=seed)
            path = args.out / f"{recipe.name}.json"
            if not path.exists():
                path.write_text(json.dumps(run(recipe)) + "\n")
            print(path.read_text(), end="", flush=True)


if __name__ == "__main__":
    main()
