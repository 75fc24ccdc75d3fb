"""The tasks of the CHITA tables: dense networks, their data, and the paper's numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from espalier.curvature.layout import convolution_and_linear
from espalier.models.mlpnet import MLPNet
from espalier.models.resnet_cifar import resnet20

Network = Literal["mlpnet", "resnet20"]
Pair = tuple[Tensor, Tensor]
SPARSITIES = {
    "mlpnet": (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98),
    "resnet20": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
}
HELD_OUT = {"mlpnet": 10_000, "resnet20": 5_000}
PAPER: dict[str, dict[str, tuple[float, ...]]] = {
    "mlpnet": {
        "magnitude": (93.93, 93.78, 93.62, 92.89, 90.30, 83.64, 32.25),
        "woodfisher": (94.02, 93.82, 93.77, 93.57, 91.69, 85.54, 38.26),
        "cbs": (93.96, 93.96, 93.98, 93.90, 93.14, 88.92, 55.45),
        "chita": (93.97, 93.94, 93.80, 93.59, 92.46, 88.09, 46.25),
        "chita++": (95.97, 95.93, 95.89, 95.80, 95.55, 94.70, 90.73),
    },
    "resnet20": {
        "magnitude": (90.77, 89.98, 88.44, 85.24, 78.79, 54.01, 11.79),
        "woodfisher": (91.37, 91.15, 90.23, 87.96, 81.05, 62.63, 11.49),
        "cbs": (91.35, 91.21, 90.58, 88.88, 81.84, 51.28, 13.68),
        "chita": (91.37, 91.19, 90.60, 89.22, 84.12, 57.90, 15.60),
        "chita++": (91.25, 91.20, 91.04, 90.78, 90.38, 88.72, 79.32),
    },
}


@dataclass(frozen=True)
class Task:
    """A dense network, the data for gradients, and the images on which it is judged."""

    model: nn.Module
    train: Pair
    judge: Pair
    prunable: Callable[[str, nn.Module, nn.Parameter], bool]


def without_shortcuts(name: str, module: nn.Module, parameter: nn.Parameter) -> bool:
    """The pruned weights of the paper's ResNet-20: not the 1 × 1 shortcut convolutions (p = 268,336)."""
    return convolution_and_linear(name, module, parameter) and "downsample" not in name


def load_task(network: Network, split: Literal["test", "held-out"] = "test") -> Task:
    """Read the checkpoint and the data below $ESPALIER_DATA; settings are chosen with split="held-out"."""
    root = os.environ.get("ESPALIER_DATA")
    if not root:
        raise RuntimeError("set ESPALIER_DATA to the folder that holds mnist/, cifar10/ and checkpoints/")
    folder, checkpoint = {
        "mlpnet": ("mnist", "mlpnet-mnist.safetensors"),
        "resnet20": ("cifar10", "resnet20-cifar10.safetensors"),
    }[network]
    model = MLPNet() if network == "mlpnet" else resnet20()
    model.load_state_dict(load_file(Path(root) / "checkpoints" / checkpoint))
    if network == "resnet20":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    train = _read(Path(root) / folder, "train")
    order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(0))
    kept, held = order[: -HELD_OUT[network]], order[-HELD_OUT[network] :]
    judge = (train[0][held], train[1][held]) if split == "held-out" else _read(Path(root) / folder, "test")
    prunable = without_shortcuts if network == "resnet20" else convolution_and_linear
    return Task(model.eval(), (train[0][kept], train[1][kept]), judge, prunable)


def _read(folder: Path, part: str) -> Pair:
    images = torch.from_numpy(np.load(folder / f"{part}-images.npy")).float().div_(255)
    labels = torch.from_numpy(np.load(folder / f"{part}-labels.npy")).long()
    if images.ndim == 3:
        return images.sub_(0.1307).div_(0.3081)[:, None], labels
    return images.sub_(0.5).div_(0.5).permute(0, 3, 1, 2), labels


@torch.no_grad()
def accuracy(model: nn.Module, data: Pair) -> float:
    """Top-1 accuracy in per cent."""
    right = sum(
        int((model(x).argmax(1) == y).sum()) for x, y in zip(data[0].split(250), data[1].split(250), strict=True)
    )
    return 100 * right / len(data[0])


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of the images padded by 4 black pixels, half of them mirrored; images [n, 3, 32, 32]."""
    n, channels, height, width = images.shape
    padded = nn.functional.pad(images, (4, 4, 4, 4), value=-1.0)
    top, left = (torch.randint(9, (n,), generator=generator)[:, None] for _ in range(2))
    mirrored = torch.rand(n, generator=generator)[:, None] < 0.5
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    columns = torch.where(mirrored, columns.flip(1), columns)
    every = torch.arange(n)[:, None, None, None], torch.arange(channels)[:, None, None]
    return padded[(*every, rows[:, None, :, None], columns[:, None, None, :])]


@dataclass
class Draws:
    """A loader of `count` fresh training samples in each iteration, augmented for photographs (CIFAR-10)."""

    data: Pair
    count: int
    generator: torch.Generator

    def __iter__(self) -> Iterator[Pair]:
        index = torch.randperm(len(self.data[0]), generator=self.generator)[: self.count]
        images = self.data[0][index]
        if images.shape[1] == 3:
            images = augmented(images, self.generator).contiguous(memory_format=torch.channels_last)
        yield images, self.data[1][index]
