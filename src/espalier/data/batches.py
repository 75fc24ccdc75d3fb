"""Batches of a dataset: shuffled, augmented and normalised; the same from the same seed; resumable."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from espalier.data.augment import Augment
from espalier.data.dataset import Dataset

__all__ = ["Batches"]

NOTHING = Augment()


@dataclass
class Batches:
    """Iterating gives the rest of the current epoch, batch by batch, and then moves to the next one.

    >>> from espalier.data.digits import digits
    >>> train = Batches(digits("train"), 128, seed=0, augment=Augment(pad=1))
    >>> images, labels = next(iter(train))
    >>> images.shape, labels.shape, len(train), train.state_dict()
    (torch.Size([128, 1, 8, 8]), torch.Size([128]), 10, {'seed': 0, 'epoch': 0, 'batch': 1})

    Fields:
        dataset: what is read.
        batch_size: images of a batch, of all ranks together.
        seed: of the order and the augmentation. Epoch e and batch b have random numbers of their own, which
            depend on nothing but (seed, e, b): that is what makes a run resumable.
        augment: what is done to the images.
        shuffle: a new order every epoch; False is for evaluation.
        drop_last: leave out an epoch's last batch where it is short.
        device: where the batches go; images travel there as uint8, and are augmented there.
        rank, world: every world-th image of each batch, beginning at `rank`. Together the ranks see what one
            process would see, with the same augmentation.

    Yields float32 images [B, C, H, W], normalised, and int64 labels [B]; under MixUp, float32 [B, classes].
    """

    dataset: Dataset
    batch_size: int
    seed: int = 0
    augment: Augment = NOTHING
    shuffle: bool = True
    drop_last: bool = False
    device: torch.device | str = "cpu"
    rank: int = 0
    world: int = 1
    epoch: int = field(default=0, init=False)
    batch: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 0 <= self.rank < self.world or self.seed < 0:
            raise ValueError("batch_size is at least 1, rank is in 0 … world - 1, and seed is not negative")
        last = len(self.dataset) % self.batch_size
        shortest = self.batch_size if self.drop_last or not last else last
        if not len(self) or shortest < self.world:
            have = f"{len(self.dataset)} images of {self.dataset.name} ({self.dataset.split})"
            hint = "a smaller batch_size, or drop_last=True for several ranks"
            raise ValueError(f"{have} give an empty batch at batch_size={self.batch_size}: take {hint}")

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        whole, rest = divmod(len(self.dataset), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self._order()
        while self.batch < len(self):
            self.batch += 1  # before the batch is used: the state never repeats one
            yield self._make(order, self.batch - 1)
        self.epoch, self.batch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """The seed, the epoch, and how many of its batches were given out."""
        return {"seed": self.seed, "epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on exactly where `state` was taken, in a run of the same settings."""
        if not 0 <= state["batch"] <= len(self):
            raise ValueError(f"the state is at batch {state['batch']}, but an epoch has {len(self)}")
        self.seed, self.epoch, self.batch = state["seed"], state["epoch"], state["batch"]

    def _order(self) -> np.ndarray:
        count = len(self.dataset)
        return (
            np.random.default_rng((0, self.seed, self.epoch)).permutation(count) if self.shuffle else np.arange(count)
        )

    def _make(self, order: np.ndarray, batch: int) -> tuple[Tensor, Tensor]:
        rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
        rng = np.random.default_rng((1, self.seed, self.epoch, batch))
        draws = self.augment.draw(len(rows), self.dataset.shape, rng)
        mine = slice(self.rank, None, self.world)
        early = slice(None) if self.augment.mixup else mine  # partners may be another rank's images
        images, labels = (t.to(self.device, non_blocking=True) for t in self.dataset.raw(rows[early]))
        drawn = draws.on(self.device, early)
        images = self.dataset.normalise(self.augment.geometry(images, drawn))
        images, labels = self.augment.colour(images, labels, self.dataset.classes, drawn)
        return (images[mine], labels[mine]) if self.augment.mixup else (images, labels)
