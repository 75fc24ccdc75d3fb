"""Weights of MobileNetV1 and ResNet-50 on ImageNet: `paper` scale, and a `smoke` run on random data.

    python -m espalier.experiments.chita_imagenet smoke --network mobilenet-v1
    python -m espalier.experiments.chita_imagenet smoke --network resnet50 --path /scratch/A.bin
    ESPALIER_DATA=… python -m espalier.experiments.chita_imagenet paper --network resnet50 --weights dense.safetensors

`smoke` says what a solve with n gradients of p = 4.2 M or 25 M weights takes in memory and time; the weights and the
images are random, so its accuracy would mean nothing. `paper` needs the prepared ImageNet and a dense checkpoint.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from espalier.curvature.gradients import GradientOptions, gradients
from espalier.curvature.layout import WeightLayout
from espalier.data import Dataset, load
from espalier.data._torchvision import import_torchvision
from espalier.models.mobilenet_v1 import MobileNetV1
from espalier.select.chita import Solver, chita
from espalier.select.exchange import ExchangeOptions
from espalier.select.iht import IHTOptions
from espalier.select.multistage import StageOptions, in_stages

T = TypeVar("T")
Network = Literal["mobilenet-v1", "resnet50"]
SPARSITIES = {"mobilenet-v1": (0.3, 0.4, 0.5, 0.6, 0.7, 0.75), "resnet50": (0.5, 0.6, 0.7, 0.8, 0.9)}
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def dense(name: Network) -> nn.Module:
    """The dense network with random weights, in eval mode."""
    return (MobileNetV1() if name == "mobilenet-v1" else import_torchvision().models.resnet50()).eval()


def smoke(
    network: Network = "mobilenet-v1",
    n: int = 500,
    size: int = 32,
    sparsity: float = 0.9,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    path: Path | None = None,
    solver: Solver = "exchange",
    rounds: int = 3,
    memory_limit: int = 1 << 30,
    threads: int = 1,
    out: Path = Path("runs/chita-large.jsonl"),
) -> None:
    """Gradients of random images of `size` pixels, then one solve; prints memory and seconds of each.

    rounds: of exchanges. path: file for a memory-mapped A, which is removed at the end.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = dense(network)
    layout = WeightLayout.of(model)
    line: dict[str, object] = {"network": network, "n": n, "p": layout.numel, "dtype": dtype, "size": size}
    line |= {"mapped": path is not None, "sparsity": sparsity, "solver": solver}
    data = torch.randn(n, 3, size, size), torch.randint(1000, (n,))
    options = GradientOptions(memory_limit, KINDS[dtype], path, progress=False)
    say, loss = sys.stdout.write, nn.functional.cross_entropy
    size_of_a = n * layout.numel * torch.empty(0, dtype=KINDS[dtype]).element_size() / 2**30
    say(f"{network}: p = {layout.numel:,}, n = {n}, A {size_of_a:.2f} GiB\n")
    more = {"exchange": ExchangeOptions(rounds=rounds), "iht": IHTOptions(rounds=1), "magnitude": None}[solver]
    try:
        found = timed(line, "gradients", lambda: gradients(model, loss, data, n, options=options))
        k = int((1 - sparsity) * layout.numel)
        result = timed(line, "solve", lambda: chita(found.A, None, found.w_bar, k, 1e-4, solver, more))
    finally:
        if path is not None:
            path.unlink(missing_ok=True)
    line |= {"objective": result.objective, "history": result.history, "info": result.info}
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    say(json.dumps(line, indent=1) + "\n")


def timed(line: dict[str, object], name: str, call: Callable[[], T]) -> T:
    """Run a phase and note its wall and CPU seconds, and the memory of the process so far."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    line[f"{name}_wall_seconds"] = round(time.perf_counter() - wall, 2)
    line[f"{name}_cpu_seconds"] = round(time.process_time() - cpu, 2)
    line[f"{name}_peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    line[f"{name}_anonymous_gib"] = round(_anonymous() / 2**30, 2)
    return result


def _anonymous() -> int:
    """Bytes of this process that are not pages of a mapped file (0 where the system does not say)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(row.split()[1]) * 1024 for row in lines if row.startswith("RssAnon:"))


class Photographs:
    """A loader of `count` fresh training images in batches, as a stage takes them."""

    def __init__(self, data: Dataset, count: int, seed: int, batch: int = 64):
        self.data, self.count, self.batch = data, count, batch
        self.rng = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        index = self.rng.choice(len(self.data), self.count, replace=False)
        for start in range(0, self.count, self.batch):
            yield self.data.tensors(index[start : start + self.batch])


def paper(
    weights: Path,
    network: Network = "resnet50",
    out: Path = Path("runs/chita-imagenet.jsonl"),
    stages: int = 50,
    n: int = 500,
    batch: int = 16,
    ridge: float = 1e-2,
    seed: int = 0,
    path: Path | None = None,
    threads: int = 8,
) -> None:
    """CHITA++ stages with exact exchanges through the sparsities, judged on the validation images of ImageNet.

    weights: a safetensors file of the dense network's state dict. A is bfloat16; `path` keeps it on disk.
    """
    torch.set_num_threads(threads)
    model = dense(network)
    model.load_state_dict(load_file(weights))
    train, test = load("imagenet", "train", validation=50_000), load("imagenet", "test")
    sparsities = SPARSITIES[network]
    inner = GradientOptions(1 << 32, torch.bfloat16, path)
    options = StageOptions(1, "cubic", n, batch, ridge, True, "exchange", seed=seed, recalibrate=2000, gradient=inner)
    out.parent.mkdir(parents=True, exist_ok=True)
    low, number, objective = 0.0, 0, float("nan")
    for aim in sparsities:
        share = max(1, round(stages / len(sparsities)))
        for t in range(1, share + 1):
            sparsity = low + (aim - low) * (1 - (1 - t / share) ** 3)
            data = Photographs(train, n * batch, 1000 * seed + number)
            loss = nn.functional.cross_entropy
            result, model = in_stages(model, loss, data, 0.5, replace(options, seed=number), path=[1 - sparsity])
            number, objective = number + 1, result.objective
        right = 0
        with torch.no_grad():
            for start in range(0, len(test), 250):
                images, labels = test.tensors(np.arange(start, min(start + 250, len(test))))
                right += int((model(images).argmax(1) == labels).sum())
        line = {"network": network, "sparsity": aim, "seed": seed, "accuracy": 100 * right / len(test)}
        with out.open("a") as file:
            file.write(json.dumps(line | {"objective": objective, "stages": number}) + "\n")
        low = aim


if __name__ == "__main__":
    import tyro

    tyro.extras.subcommand_cli_from_dict({"smoke": smoke, "paper": paper})
