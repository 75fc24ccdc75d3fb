"""Wide residual networks with a gate per filter of every block's first convolution: Table 3 of L0-ARM.

    ESPALIER_DATA=... python -m espalier.experiments.l0_wrn --short --out runs/l0_wrn
    ESPALIER_DATA=... python -m espalier.experiments.l0_wrn --dataset cifar100 --method arm --lam 0.001

``--short`` trains WRN-16-4 for a few steps (more with ``--epochs``, ``--steps``), the default is WRN-28-10 for 200
epochs. Gates are attached through the search space; the network that is reported is constructed. One JSON line per
epoch; a stopped run goes on.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from espalier.construct import construct
from espalier.data import Augment, Batches, Dataset, load
from espalier.experiments.logs import forget_after
from espalier.models.wide_resnet import WideResNet
from espalier.space.search_space import search_space
from espalier.space.solution import Solution
from espalier.sparsify.space_gates import SpaceGates


@dataclass(frozen=True)
class Recipe:
    """One row of Table 3: Nesterov 0.9, lr 0.1, times 0.2 at 60 and 120 of 200 epochs. ``steps``: of an epoch, 0 for
    all.
    """

    dataset: str = "cifar10"
    method: str = "arm"
    lam: float = 0.001
    depth: int = 28
    width: int = 10
    epochs: int = 200
    steps: int = 0
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    initial: float = 0.7
    seed: int = 0

    @property
    def name(self) -> str:
        """Of the run's files."""
        return f"wrn{self.depth}-{self.width}-{self.dataset}-{self.method}-{self.lam:g}-{self.seed}"


def gated(recipe: Recipe, examples: int) -> SpaceGates:
    """The network with its gates, at the start of training."""
    torch.manual_seed(recipe.seed)
    model = WideResNet(recipe.depth, recipe.width, 100 if recipe.dataset == "cifar100" else 10)
    space = search_space(model, (torch.zeros(2, 3, 32, 32),), levels=("channel",))
    inner = [f.name for f in space.families if f.name.startswith("stages") and f.name.endswith("conv1")]
    return SpaceGates(
        space,
        families=inner,
        estimator=recipe.method,
        lam=recipe.lam,
        examples=examples,
        initial=recipe.initial,
        seed=recipe.seed,
    )


def parameters(gates: SpaceGates, weight_decay: float) -> list[dict[str, Any]]:
    """φ without weight decay."""
    return [{"params": list(gates.model.parameters()), "weight_decay": weight_decay}, {"params": [gates.phi]}]


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset, limit: int = 0) -> float:
    """Share of right predictions, in per cent, of the first ``limit`` batches of 250 (0: of all)."""
    model.eval()
    right = seen = 0
    for i, (x, y) in enumerate(Batches(data, 250, shuffle=False)):
        if limit and i == limit:
            break
        right, seen = right + int((model(x).argmax(1) == y).sum()), seen + len(y)
    return 100.0 * right / seen


def report(gates: SpaceGates, test: Dataset, limit: int) -> dict[str, Any]:
    """The constructed network as it would be now."""
    full, solution = gates.space.cost(), gates.solution()
    cost = gates.space.cost(solution.removed)
    gone = sum(gates.probabilities().shape) - sum(gates.open_counts().values())
    line = {"closed": gone, "params": round(cost.params / full.params, 4), "macs": round(cost.macs / full.macs, 4)}
    line |= {
        "expected_macs": round(gates.expected_macs(), 4),
        "pruned": round(100 * (1 - cost.params / full.params), 2),
    }
    state = {name: t.clone() for name, t in gates.model.state_dict().items()}
    small = _folded(gates, solution)
    gates.model.load_state_dict(state)
    return line | {"accuracy": round(accuracy(small, test, limit), 3)}


def _folded(gates: SpaceGates, solution: Solution) -> nn.Module:
    gates.finish()
    return construct(gates.space, solution)


def run(recipe: Recipe, out: Path, limit: int = 0) -> dict[str, Any]:
    """Train to the end, from the last epoch where there is one."""
    out.mkdir(parents=True, exist_ok=True)
    log, saved = out / f"{recipe.name}.jsonl", out / f"{recipe.name}.pt"
    train, test = (load(recipe.dataset, split, validation=0) for split in ("train", "test"))
    batches = Batches(train, recipe.batch_size, recipe.seed, Augment(pad=4, flip=True), drop_last=True)
    gates = gated(recipe, len(train))
    opt = torch.optim.SGD(parameters(gates, recipe.weight_decay), lr=recipe.lr, momentum=0.9, nesterov=True)
    falls = torch.optim.lr_scheduler.MultiStepLR(opt, [int(0.3 * recipe.epochs), int(0.6 * recipe.epochs)], 0.2)
    parts: dict[str, Any] = {"model": gates.model, "gates": gates, "opt": opt, "falls": falls, "batches": batches}
    start, line = 0, {}
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        start, line = state["epoch"], state["line"]
    forget_after(log, "epoch", start)
    for epoch in range(start, recipe.epochs):
        clock, losses = time.process_time(), []
        gates.model.train()
        for x, y in batches:
            losses.append(float(one_step(gates, opt, x, y)))
            if len(losses) == recipe.steps:
                break
        falls.step()
        line = {"epoch": epoch + 1, "loss": round(sum(losses) / len(losses), 4), **report(gates, test, limit)}
        line["cpu_s"] = round(time.process_time() - clock, 1)
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        torch.save({n: p.state_dict() for n, p in parts.items()} | {"epoch": epoch + 1, "line": line}, saved)
    return {**asdict(recipe), **line}


def one_step(gates: SpaceGates, opt: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """One step, in mixed precision."""
    opt.zero_grad()

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(gates(x).float(), y)

    found = gates.backward(loss)
    opt.step()
    gates.clamp_()
    return found


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=("cifar10", "cifar100"), default="cifar10")
    parser.add_argument("--method", choices=("hc", "ar", "arm", "disarm"), default="arm")
    parser.add_argument("--lam", type=float, default=0.001)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="WRN-16-4, 2 epochs of 20 steps, 500 test images")
    parser.add_argument("--epochs", type=int, help="in place of 200, or of 2 with --short")
    parser.add_argument("--steps", type=int, help="of an epoch, in place of all, or of 20 with --short")
    parser.add_argument("--images", type=int, help="of the test set, rounded up to 250s; else all, or 500 with --short")
    parser.add_argument("--out", type=Path, default=Path("runs/l0_wrn"))
    args = parser.parse_args()
    short: dict[str, int] = {"depth": 16, "width": 4, "epochs": 2, "steps": 20} if args.short else {}
    short |= {name: value for name in ("epochs", "steps") if (value := getattr(args, name)) is not None}
    images = args.images or (500 if args.short else 0)
    recipe = Recipe(args.dataset, args.method, args.lam, seed=args.seed, **short)
    print(json.dumps(run(recipe, args.out, limit=-(-images // 250))))


if __name__ == "__main__":
    main()
