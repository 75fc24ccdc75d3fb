"""The three splits of a run. The test set is looked at once, at the end."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from espalier.data import Augment, Batches, Dataset, load
from espalier.data.dataset import stratified
from espalier.data.info import info
from espalier.experiments.config import Run

__all__ = ["Splits", "shrink", "splits"]

_STAND_IN = 384


@dataclass(frozen=True)
class Splits:
    """Training, validation and test images of one run."""

    train: Dataset
    validation: Dataset
    test: Dataset
    size: int

    def batches(self, run: Run, device: torch.device, rank: int = 0, world: int = 1) -> Batches:
        """The training batches, augmented as the run says."""
        augment = Augment(run.pad, run.crop or None, flip=run.flip, cutout=run.cutout, mixup=run.mixup)
        return Batches(
            self.train,
            run.batch_size,
            run.seed,
            augment,
            drop_last=True,
            device=device,
            rank=rank,
            world=world,
        )


def splits(run: Run) -> Splits:
    """Load what the run names. Raises :class:`DataError`, which names the command to run, for missing files."""
    if run.stand_in:
        train, validation, test = (_stand_in(run.dataset, split) for split in ("train", "validation", "test"))
    else:
        train, validation, test = (
            load(run.dataset, split, validation=run.validation) for split in ("train", "validation", "test")
        )
    if run.images is not None and run.images < len(train):
        rows = stratified(np.asarray(train.labels)[train.rows], [run.images], seed=0)[0]
        train = replace(train, rows=train.rows[rows])
    side = run.crop or train.shape[1]
    if run.size is not None and side % run.size:
        raise ValueError(f"images of {side} pixels cannot be averaged to {run.size}: size= divides {side}")
    return Splits(train, validation, test, run.size or side)


def shrink(images: Tensor, size: int, crop: int = 0) -> Tensor:
    """The central square of side ``crop`` (0: all), averaged to side ``size``.

    >>> shrink(torch.tensor([[[[0.0, 2.0], [4.0, 6.0]]]]), 1).item()
    3.0
    """
    if crop and crop < images.shape[-1]:
        top, left = ((length - crop) // 2 for length in images.shape[-2:])
        images = images[..., top : top + crop, left : left + crop]
    factor = images.shape[-1] // size
    return functional.avg_pool2d(images, factor) if factor > 1 else images


def _stand_in(name: str, split: str) -> Dataset:
    """Made-up images of the dataset's shape: every class has a pattern, and there is noise. For smoke runs."""
    known = info(name)
    shape = tuple(length or 64 for length in known.shape)
    classes = min(known.classes, 10)
    patterns = np.random.default_rng(0).integers(0, 128, (classes, *shape))
    rng = np.random.default_rng({"train": 1, "validation": 2, "test": 3}[split])
    labels = rng.permutation(np.arange(_STAND_IN) % classes)
    images = (patterns[labels] + rng.integers(0, 128, (_STAND_IN, *shape))).astype(np.uint8)
    rows = np.arange(_STAND_IN)
    return Dataset(f"{name}, made up", split, images, labels, rows, classes, known.mean, known.std)
