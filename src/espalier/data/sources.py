"""The published files of each dataset, downloaded and decoded by torchvision, read in chunks."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from espalier.data._torchvision import import_torchvision

__all__ = ["SOURCES", "Source"]


@dataclass(frozen=True)
class Source:
    """The images of one split. `read(start, stop)` decodes some of them: uint8 [stop - start, *shape]."""

    shape: tuple[int, ...]
    labels: np.ndarray
    read: Callable[[int, int], np.ndarray]

    def __len__(self) -> int:
        return len(self.labels)


def _in_memory(images: Any, labels: Any) -> Source:
    images, labels = np.asarray(images), np.asarray(labels)
    if len(images) != len(labels):
        raise ValueError(f"there are {len(images)} images and {len(labels)} labels")
    return Source(images.shape[1:], labels, lambda start, stop: images[start:stop])


def _flagged(kind: str) -> "Opener":
    def open_split(raw: Path, split: str, download: bool, size: int) -> Source:
        data = getattr(_datasets(), kind)(str(raw), train=split == "train", download=download)
        return _in_memory(data.data, data.targets)

    return open_split


def _svhn(raw: Path, split: str, download: bool, size: int) -> Source:
    data = _datasets().SVHN(str(raw), split=split, download=download)
    return _in_memory(data.data.transpose(0, 2, 3, 1), data.labels)


def _stl10(raw: Path, split: str, download: bool, size: int) -> Source:
    data = _datasets().STL10(str(raw), split=split, download=download)
    return _in_memory(data.data.transpose(0, 2, 3, 1), data.labels)


def _imagenet(raw: Path, split: str, download: bool, size: int) -> Source:
    data = _datasets().ImageNet(str(raw), split="train" if split == "train" else "val")

    def one(index: int) -> np.ndarray:
        return _square(data.samples[index][0], size)

    def read(start: int, stop: int) -> np.ndarray:
        with ThreadPoolExecutor() as threads:
            return np.stack(list(threads.map(one, range(start, stop))))

    return Source((size, size, 3), np.asarray(data.targets), read)


def _square(path: str, size: int) -> np.ndarray:
    """The central square of an image file, resized."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC))


def _datasets() -> Any:
    return import_torchvision().datasets


Opener = Callable[[Path, str, bool, int], Source]
SOURCES: dict[str, Opener] = {
    "mnist": _flagged("MNIST"),
    "fashion-mnist": _flagged("FashionMNIST"),
    "svhn": _svhn,
    "cifar10": _flagged("CIFAR10"),
    "cifar100": _flagged("CIFAR100"),
    "stl10": _stl10,
    "imagenet": _imagenet,
}
