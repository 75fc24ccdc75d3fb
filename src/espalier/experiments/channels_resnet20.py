"""Channels of ResNet-20 on CIFAR-10: H2SPG while training, against magnitude pruning and fine-tuning.

    ESPALIER_DATA=... python -m espalier.experiments.channels_resnet20 --out runs/channels

Both start from the trained checkpoint, train for the same number of epochs with the same recipe and end with the
same budget of MACs. ``magnitude`` removes the channels that are worth least for what they cost (by their energy, or by
``--saliency``) and fine-tunes what is left; ``h2spg`` trains the full network and drives channels that are chosen in
the same way to zero after a warm-up; ``dhspg`` takes them in ascending order.
Runs can be stopped and started again; finished ones are skipped.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import espalier
from espalier.data import Augment, Batches, Dataset, load
from espalier.experiments.ispasp_resnet import load_dense
from espalier.saliency import named, worth
from espalier.space.selection import select
from espalier.sparsify.groups import Groups
from espalier.sparsify.halfspace import DHSPG, H2SPG

METHODS = ("h2spg", "dhspg", "magnitude")
HALF = (0.5, 0.5, 0.5)  # the checkpoint's inputs lie in [-1, 1]


@dataclass(frozen=True)
class Recipe:
    """One run. ``warmup`` and ``projection`` are shares of all steps; ``validation`` images are held out."""

    method: str = "h2spg"
    macs: float = 0.5
    epochs: int = 3
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128
    warmup: float = 0.1
    projection: float = 0.4
    saliency: str = "group_norm"
    validation: int = 5000
    seed: int = 0

    @property
    def name(self) -> str:
        """Of the run's files."""
        return f"{self.method}-{self.saliency}-{self.macs}-{self.epochs}-{self.seed}"


def images(split: str, recipe: Recipe) -> Dataset:
    """CIFAR-10, normalised as the checkpoint wants it."""
    return replace(load("cifar10", split, validation=recipe.validation), mean=HALF, std=HALF)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right predictions in eval mode and single precision, in per cent."""
    model.eval()
    right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(250), y.split(250), strict=True))
    return 100.0 * right / len(y)


class Run:
    """A recipe under way: the network, its optimizer, schedule and batches."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        torch.manual_seed(recipe.seed)
        dense = load_dense()
        self.space = espalier.search_space(dense, (torch.zeros(2, 3, 32, 32),), levels=("channel",))
        self.batches = Batches(images("train", recipe), recipe.batch_size, recipe.seed, Augment(pad=4, flip=True))
        self.steps = recipe.epochs * len(self.batches)
        budget = espalier.Budget(macs=recipe.macs)
        sgd: dict[str, Any] = {"lr": recipe.lr, "momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
        self.opt: torch.optim.Optimizer
        self.solution: espalier.Solution | None = None
        self.model: nn.Module = dense
        if recipe.method == "magnitude":
            groups, score = Groups(self.space), named(recipe.saliency)
            scores = score(self.space, groups.state([torch.zeros_like(t) for t in groups.tensors]))
            found = select(self.space, worth(score, scores, groups.size), budget)
            self.solution = self.space.solution(found.removed, {"method": "magnitude"})
            self.model = espalier.construct(self.space, self.solution)
            self.opt = torch.optim.SGD(self.model.parameters(), **sgd)
        else:
            kind = {"h2spg": H2SPG, "dhspg": DHSPG}[recipe.method]
            self.opt = kind(
                self.space, torch.optim.SGD, budget, saliency=recipe.saliency,
                warmup_steps=max(1, int(recipe.warmup * self.steps)),
                projection_steps=max(1, int(recipe.projection * self.steps)), **sgd,
            )  # fmt: skip
        self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.opt, self.steps)
        self.seconds = 0.0

    def epoch(self, limit: int | None = None) -> float:
        """One pass over the training images, in mixed precision; the mean loss."""
        self.model.train()
        losses = []
        start = time.process_time()
        for x, y in self.batches:
            self.opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = functional.cross_entropy(self.model(x.contiguous(memory_format=torch.channels_last)), y)
            loss.backward()
            self.opt.step()
            self.schedule.step()
            losses.append(float(loss.detach()))
            if len(losses) == limit:
                break
        self.seconds += time.process_time() - start
        return sum(losses) / len(losses)

    def removed(self) -> tuple[str, ...]:
        """The channels that go."""
        solution = self.opt.solution() if isinstance(self.opt, H2SPG) else self.solution
        assert solution is not None
        return solution.removed

    def small(self) -> nn.Module:
        """The network of the budget: what was trained, or what is left of it."""
        if self.solution is not None:
            return self.model
        return espalier.construct(self.space, self.space.solution(self.removed()))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a continuation needs."""
        parts = {"model": self.model, "opt": self.opt, "schedule": self.schedule, "batches": self.batches}
        return {name: part.state_dict() for name, part in parts.items()} | {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        for name in ("model", "opt", "schedule", "batches"):
            getattr(self, name).load_state_dict(state[name])
        self.seconds = state["seconds"]


def run(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Train to the end, from the last epoch where there is one; returns the line of the table."""
    out.mkdir(parents=True, exist_ok=True)
    done, saved, log = (out / f"{recipe.name}{end}" for end in (".json", ".pt", ".log"))
    if done.exists():
        return json.loads(done.read_text())
    now = Run(recipe)
    if saved.exists():
        now.load_state_dict(torch.load(saved, weights_only=True))
    held_out = images("validation", recipe).tensors()
    while now.batches.epoch < recipe.epochs:
        loss = now.epoch()
        line = {"epoch": now.batches.epoch, "loss": round(loss, 4), "validation": accuracy(now.model, *held_out)}
        with log.open("a") as file:
            file.write(json.dumps(line | {"cpu_s": round(now.seconds, 1)}) + "\n")
        print(recipe.name, line, flush=True)
        torch.save(now.state_dict(), saved.with_suffix(".tmp"))
        saved.with_suffix(".tmp").replace(saved)
    small, removed = now.small(), now.removed()
    full, cost = now.space.cost(), now.space.cost(removed)
    gone = [name.rpartition("[")[0] for name in removed]
    line = {
        **asdict(recipe),
        "macs_share": round(cost.macs / full.macs, 4),
        "params_share": round(cost.params / full.params, 4),
        "widths": {f.name: f.count - gone.count(f.name) for f in now.space.families},
        "validation_accuracy": accuracy(small, *held_out),
        "cpu_s": round(now.seconds, 1),
    }
    torch.save({"removed": list(removed), "model": small.state_dict()}, out / f"{recipe.name}-small.pt")
    done.write_text(json.dumps(line))
    return line


def test_accuracy(recipe: Recipe, out: Path) -> float:
    """Accuracy of a finished run on the test images: once, when all choices are made."""
    saved = torch.load(out / f"{recipe.name}-small.pt", weights_only=True)
    dense = load_dense()
    space = espalier.search_space(dense, (torch.zeros(2, 3, 32, 32),), levels=("channel",))
    small = espalier.construct(space, space.solution(saved["removed"]))
    small.load_state_dict(saved["model"])
    return accuracy(small, *images("test", recipe).tensors())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/channels"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["h2spg", "magnitude"])
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--saliency", default="group_norm", help="a name of espalier.saliency")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", action="store_true", help="look at the test images, too")
    args = parser.parse_args(arguments)
    if not os.environ.get("ESPALIER_DATA"):
        raise SystemExit("set ESPALIER_DATA to the folder that holds cifar10/ and checkpoints/")
    for macs in args.macs:
        for method in args.methods:
            recipe = Recipe(method, macs, args.epochs, saliency=args.saliency, seed=args.seed)
            line = run(recipe, args.out)
            if args.test:
                line["test_accuracy"] = test_accuracy(recipe, args.out)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
