"""Images per second of the batch loader, beside what one training step of a small network needs.

    ESPALIER_DATA=… python benchmarks/data_loading.py [--threads 2]

Without ESPALIER_DATA it writes random arrays of CIFAR-10's shape to a temporary folder and uses those.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from espalier.data import DATASETS, Augment, Batches, DataError, Dataset, load
from espalier.models import DemoNet, regnet_x_200m

CASES = {
    "nothing": Augment(),
    "crop, flip": Augment(pad=4, flip=True),
    "crop, flip, cutout": Augment(pad=4, flip=True, cutout=16),
    "crop, flip, cutout, MixUp": Augment(pad=4, flip=True, cutout=16, mixup=0.2),
}


def stand_in(folder: Path) -> Dataset:
    """50,000 random images on disk."""
    known, path = DATASETS["cifar10"], folder / "images.npy"
    rng = np.random.default_rng(0)
    np.save(path, rng.integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8))
    labels = rng.integers(0, 10, 50_000)
    images = np.load(path, mmap_mode="r")
    return Dataset("random", "train", images, labels, np.arange(50_000), 10, known.mean, known.std)


def datasets(folder: Path) -> list[Dataset]:
    """Everything at hand, or the stand-in."""
    found = []
    for name in DATASETS if os.environ.get("ESPALIER_DATA") else ():
        try:
            found.append(load(name))
        except DataError:
            continue
    return found or [stand_in(folder)]


def loading(data: Dataset, augment: Augment, batch_size: int, seconds: float = 2.0) -> float:
    """Images per second, over about `seconds`."""
    batches = Batches(data, batch_size, augment=augment, drop_last=True)
    for _ in zip(range(5), batches, strict=False):
        pass
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for images, _ in batches:
            count += len(images)
            if time.perf_counter() - start > seconds:
                break
    return count / (time.perf_counter() - start)


def training(model: torch.nn.Module, data: Dataset, batch_size: int) -> float:
    """Images per second of forward and backward alone, on one batch that is already there."""
    images, labels = data.tensors(np.arange(batch_size))
    times = []
    for _ in range(4):
        start = time.perf_counter()
        cross_entropy(model(images), labels).backward()
        times.append(time.perf_counter() - start)
    return batch_size / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "2")))
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, batches of {args.batch_size}")
    with tempfile.TemporaryDirectory() as folder:
        for data in datasets(Path(folder)):
            for name, augment in CASES.items():
                rate = loading(data, augment, args.batch_size)
                print(f"{data.name:14} {name:28} {rate:10,.0f} images/s")
            channels = data.shape[0]
            for model in (DemoNet(0.25, in_channels=channels), regnet_x_200m(0.5, in_channels=channels)):
                label = f"train {type(model).__name__} {sum(p.numel() for p in model.parameters()):,}"
                print(f"{data.name:14} {label:28} {training(model, data, args.batch_size):10,.0f} images/s")


if __name__ == "__main__":
    main()
