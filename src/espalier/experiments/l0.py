"""MNIST with stochastic gates: Table 2 and Figure 3 of L0-ARM.

    ESPALIER_DATA=... python -m espalier.experiments.l0 --network mlp --method arm --out runs/l0

Every run appends one JSON line per epoch to ``<out>/<name>.jsonl`` and can be stopped and started again.
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

from espalier.data import load
from espalier.errors import TrainingError
from espalier.experiments.logs import forget_after
from espalier.models.lenet5 import LeNet5
from espalier.models.mlp_l0 import MLP
from espalier.space.cost import measure
from espalier.sparsify.gates import Gates
from espalier.sparsify.sites import Site, input_gates, output_gates
from espalier.sparsify.sliced import sliced
from espalier.sparsify.threshold import histogram_threshold

SEPARATE = {"mlp": (0.1, 0.3, 0.4), "lenet5": (10.0, 0.5, 0.1, 10.0)}
INITIAL = {"mlp": (0.8, 0.5, 0.5), "lenet5": (0.5, 0.5, 0.5, 0.5)}
DECAY = {"mlp": 5e-4, "lenet5": 0.0}  # as effective in the authors' code; their LeNet-5's is 8e-9


@dataclass(frozen=True)
class Recipe:
    """One row of Table 2. ``lam``: "one" (0.1 for all layers) or "separate" (the paper's, per layer); divided
    by N.
    """

    network: str = "mlp"
    method: str = "arm"
    lam: str = "one"
    seed: int = 0
    epochs: int = 200
    batch_size: int = 100
    lr: float = 1e-3
    halve_every: int = 100

    @property
    def name(self) -> str:
        return f"{self.network}-{self.method}-{self.lam}-{self.seed}"


def gated(recipe: Recipe, examples: int) -> Gates:
    """The network of a recipe with its gates, as at the start of training."""
    torch.manual_seed(recipe.seed)
    model: nn.Module
    sites: list[Site]
    if recipe.network == "mlp":
        model = MLP()
        sites = [
            input_gates(model, "layers.0"),
            input_gates(model, "layers.1", producer="layers.0"),
            input_gates(model, "layers.2", producer="layers.1"),
        ]
    else:
        model = LeNet5()
        sites = [
            output_gates(model, "conv1", consumers=["conv2"]),
            output_gates(model, "conv2", consumers=["fc1"]),
            input_gates(model, "fc1"),
            input_gates(model, "fc2", producer="fc1"),
        ]
    lam = SEPARATE[recipe.network] if recipe.lam == "separate" else (0.1,) * len(sites)
    return Gates(
        model,
        sites,
        estimator=recipe.method,
        lam={s.name: v for s, v in zip(sites, lam, strict=True)},
        initial={s.name: v for s, v in zip(sites, INITIAL[recipe.network], strict=True)},
        examples=examples,
        weight_decay=DECAY[recipe.network],
        conditional=True,
        seed=recipe.seed,
    )


def laid_out(recipe: Recipe, images: Tensor) -> Tensor:
    """Images as a recipe's network takes them; channels last, in which max pooling on a CPU is several times faster."""
    return images.flatten(1) if recipe.network == "mlp" else images.to(memory_format=torch.channels_last)


def train_epoch(
    gates: Gates, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, order: Tensor, batch_size: int
) -> float:
    """One pass over the data in this order; the mean loss."""
    gates.model.train()
    total = torch.zeros(())
    batches = order.split(batch_size)
    for rows in batches:
        images, labels = x[rows], y[rows]
        opt.zero_grad(set_to_none=False)  # the same memory at each step: new pages cost more than zeros
        total += gates.backward(lambda i=images, t=labels: cross_entropy(gates(i), t))
        opt.step()
        gates.clamp_()
    return float(total) / len(batches)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right predictions, in per cent."""
    model.eval()
    right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(1000), y.split(1000), strict=True))
    return 100.0 * right / len(y)


def report(gates: Gates, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Accuracy, prune rate, parameters and MACs of the network as it would be built now; "expected_share" is of the
    MACs of a training step's passes with drawn gates (Figure 3).
    """
    expected = gates.expected_macs((x[:1],), training=True)
    gates(x[:1])  # a narrower network is cut only from gates that have been tried out
    small = sliced(gates)
    full = {n: p.numel() for n, p in gates.model.named_parameters() if n.endswith("weight")}
    left = sum(p.numel() for n, p in small.named_parameters() if n.endswith("weight"))
    cost, whole = measure(small, (x[:1],)), measure(MLP() if len(full) == 3 else LeNet5(), (x[:1],))
    pi = gates.probabilities().detach()
    return {
        "open": "-".join(str(n) for n in gates.open_counts().values()),
        "prune": round(100.0 * (1.0 - left / sum(full.values())), 3),
        "accuracy": accuracy(small, x, y),
        "params": cost.params,
        "macs": cost.macs,
        "macs_share": round(cost.macs / whole.macs, 5),
        "expected_share": round(expected, 5),
        "undecided": round(float(((pi > 0.05) & (pi < 0.95)).float().mean()), 4),
        "pi": torch.histc(pi, 20, 0.0, 1.0).int().tolist(),
    }


def run(recipe: Recipe, out: Path, save_every: int = 5) -> dict[str, Any]:
    """Train to the end, from the last checkpoint where there is one; returns the last line of the log."""
    out.mkdir(parents=True, exist_ok=True)
    log, saved = out / f"{recipe.name}.jsonl", out / f"{recipe.name}.pt"
    train, test = load("mnist", "train", validation=0), load("mnist", "test")
    (x, y), (test_x, test_y) = train.tensors(), test.tensors()
    x, test_x = laid_out(recipe, x), laid_out(recipe, test_x)
    gates = gated(recipe, len(x))
    opt = torch.optim.Adam([*gates.model.parameters(), *gates.parameters()], lr=recipe.lr, fused=True)
    halving = torch.optim.lr_scheduler.StepLR(opt, recipe.halve_every, 0.5)
    start, line = 0, {}
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        gates.model.load_state_dict(state["model"])
        gates.load_state_dict(state["gates"])
        opt.load_state_dict(state["opt"])
        halving.load_state_dict(state["halving"])
        start, line = state["epoch"], state["line"]
    forget_after(log, "epoch", start)
    for epoch in range(start, recipe.epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(recipe.seed * 100_003 + epoch))
        clock, cpu = time.perf_counter(), time.process_time()
        loss = train_epoch(gates, opt, x, y, order, recipe.batch_size)
        clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
        halving.step()
        line = {"epoch": epoch + 1, "loss": round(loss, 5), **report(gates, test_x, test_y)}
        line |= {"cpu_s": round(cpu, 2), "wall_s": round(clock, 2)}
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if (epoch + 1) % save_every == 0 or epoch + 1 == recipe.epochs:
            state = {"model": gates.model.state_dict(), "gates": gates.state_dict(), "opt": opt.state_dict()}
            state |= {"halving": halving.state_dict(), "epoch": epoch + 1, "line": line}
            torch.save(state, saved.with_suffix(".tmp"))
            saved.with_suffix(".tmp").replace(saved)
    return {**asdict(recipe), **line}


def thresholds(recipe: Recipe, out: Path) -> list[dict[str, Any]]:
    """A finished run read at several thresholds τ of Eq. (14), the histogram's among them; FileNotFoundError where the
    run is not in ``out``.
    """
    saved = out / f"{recipe.name}.pt"
    if not saved.exists():
        raise FileNotFoundError(f"{saved} is not there: run the same command without --thresholds first.")
    (x, y) = load("mnist", "test").tensors()
    x, gates = laid_out(recipe, x), gated(recipe, 60_000)
    state = torch.load(saved, weights_only=True)
    gates.model.load_state_dict(state["model"])
    gates.load_state_dict(state["gates"])
    lines = []
    for tau in (0.1, 0.3, 0.5, 0.7, 0.9, "histogram"):
        gates.threshold = tau
        value = histogram_threshold(gates.probabilities()) if tau == "histogram" else tau
        line = {"threshold": tau, "value": round(float(value), 4)}
        try:
            found = report(gates, x, y)
            line |= {key: found[key] for key in ("open", "prune", "accuracy")}
        except TrainingError as error:  # a layer without any unit
            line["refused"] = str(error)
        lines.append(line)
    return lines


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("mlp", "lenet5"), default="mlp")
    parser.add_argument("--method", choices=("hc", "ar", "arm", "disarm"), default="arm")
    parser.add_argument("--lam", choices=("one", "separate"), default="one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("runs/l0"))
    parser.add_argument("--thresholds", action="store_true", help="read a finished run at several thresholds")
    args = parser.parse_args()
    torch.set_flush_denormal(True)  # closed units' weights decay to denormal numbers, ten times as slow on some CPUs
    recipe = Recipe(args.network, args.method, args.lam, args.seed, args.epochs)
    for line in thresholds(recipe, args.out) if args.thresholds else [run(recipe, args.out)]:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
