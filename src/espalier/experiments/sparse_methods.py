"""All methods that sparsify while training, and magnitude pruning, on one network, data, length and budgets.

    ESPALIER_DATA=... python -m espalier.experiments.sparse_methods --out runs/sparse_methods
    python -m espalier.experiments.sparse_methods_report runs/sparse_methods/*.jsonl --picture sparse_methods.png

LeNet-5-Caffe on Fashion-MNIST, channels (filters and neurons) of its three hidden layers. Every method trains for
``epochs``, its learning rate a tenth of it in the last third, and is then cut to at most each of the budgets of MACs:
all that it has closed goes, then more in the order of its own score. The constructed networks are fine-tuned for
``finetune`` epochs in one and the same way. H2SPG, which trains for a budget, trains once for each. One JSON line per
budget; trainings that are there are not run again. ``--held-out 5000`` reports on training images kept out of
training, to choose strengths by.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from espalier.construct import construct
from espalier.data import load
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


@dataclass(frozen=True)
class Recipe:
    """One training. ``strength``: μ of the proximal methods, λ of the gates (divided by the number of images);
    ``macs``: the budgets, as shares of the full network's; ``held_out``: training images to report on instead of the
    test images.
    """

    method: str = "proxsgd"
    strength: float = 0.0
    macs: tuple[float, ...] = (0.5, 0.25, 0.1)
    epochs: int = 5
    finetune: int = 1
    images: int = 60_000
    batch_size: int = 100
    seed: int = 0
    held_out: int = 0

    @property
    def name(self) -> str:
        """Of the run's file."""
        budgets = "+".join(f"{share:g}" for share in self.macs)
        size = f"{self.epochs}-{self.finetune}-{self.images}-{self.held_out}"
        return f"{self.method}-{self.strength:g}-{budgets}-{size}-{self.seed}"


STRENGTH = {"proxsgd": 0.01, "rmda": 0.01, "ramda": 0.004, "l0-hc": 0.3, "l0-ar": 0.3, "l0-arm": 0.3}


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
                space, torch.optim.SGD, Budget(macs=recipe.macs[0]), saliency="relative", warmup_steps=steps // 5,
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

    def slow_down(self) -> None:
        """A tenth of the learning rate from here on."""
        for group in self.opt.param_groups:
            group["lr"] *= 0.1
        if isinstance(self.opt, RMDA):
            self.opt.restart()  # as its authors do

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


def run(recipe: Recipe) -> list[dict[str, Any]]:
    """Train, cut to every budget, fine-tune; a line for each budget."""
    if recipe.method == "h2spg" and len(recipe.macs) > 1:
        return [line for share in recipe.macs for line in run(replace(recipe, macs=(share,)))]
    x, y = load("fashion-mnist", "train", validation=recipe.held_out).tensors()
    split = "validation" if recipe.held_out else "test"
    test = load("fashion-mnist", split, validation=recipe.held_out).tensors()
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(recipe.seed))[: recipe.images]
    x, y = x[chosen].to(memory_format=torch.channels_last), y[chosen]  # in which pooling is several times faster
    torch.manual_seed(recipe.seed)
    space = search_space(LeNet5(), (torch.zeros(2, 1, 28, 28),), levels=("channel",))
    steps = recipe.epochs * -(-len(x) // recipe.batch_size)
    trainer, done, start = Trainer(recipe, space, steps), 0, time.process_time()
    draw = torch.Generator().manual_seed(recipe.seed + 1000)
    for _ in range(recipe.epochs):
        space.model.train()
        for rows in torch.randperm(len(x), generator=draw).split(recipe.batch_size):
            if done == steps * 2 // 3:
                trainer.slow_down()
            trainer.step(x[rows], y[rows])
            done += 1
        print(f"{recipe.name}: step {done} of {steps}", file=sys.stderr, flush=True)
    closed, order = trainer.outcome()
    full = space.cost()
    own = space.removable_in_order(closed)
    trained = {k: v for k, v in asdict(recipe).items() if k != "macs"}
    trained |= {"cpu_s": round(time.process_time() - start, 1)}
    trained |= {"own_macs": round(space.cost(own).macs / full.macs, 4), "own_structures": len(own)}
    trained["own_accuracy"] = accuracy(construct(space, space.solution(own)), *test)
    lines = []
    for share in recipe.macs:
        removed = own if space.cost(own).macs <= share * full.macs else meet(space, order, Budget(macs=share))
        small, cost = construct(space, space.solution(removed)), space.cost(removed)
        line = trained | {"budget": share, "macs": round(cost.macs / full.macs, 4)}
        line["params"] = round(cost.params / full.params, 4)
        line["widths"] = [f.count - sum(n.startswith(f"{f.name}[") for n in removed) for f in space.families]
        line["cut_accuracy"] = accuracy(small, *test)
        finetune(small, x, y, recipe)
        lines.append(line | {"accuracy": accuracy(small, *test)})
    return lines


def finetune(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe) -> None:
    """SGD with a learning rate that falls from 0.01 to 0 by a cosine; the same batches for every method."""
    opt = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    steps = recipe.finetune * -(-len(x) // recipe.batch_size)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, max(1, steps))
    draw = torch.Generator().manual_seed(recipe.seed + 2000)
    model.train()
    for _ in range(recipe.finetune):
        for rows in torch.randperm(len(x), generator=draw).split(recipe.batch_size):
            opt.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            opt.step()
            cosine.step()


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--strength", type=float, help="μ or λ; default: of the method")
    parser.add_argument("--macs", type=float, nargs="+", default=Recipe.macs)
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--finetune", type=int, default=Recipe.finetune)
    parser.add_argument("--images", type=int, default=Recipe.images)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held-out", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/sparse_methods"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    for seed in args.seed:
        for method in args.method:
            strength = STRENGTH.get(method, 0.0) if args.strength is None else args.strength
            recipe = Recipe(
                method, strength, tuple(args.macs), args.epochs, args.finetune, args.images, seed=seed,
                held_out=args.held_out,
            )  # fmt: skip
            path = args.out / f"{recipe.name}.jsonl"
            if not path.exists():
                lines = "".join(f"{json.dumps(line)}\n" for line in run(recipe))
                path.with_suffix(".tmp").write_text(lines)
                path.with_suffix(".tmp").replace(path)
            print(path.read_text(), end="", flush=True)


if __name__ == "__main__":
    main()
