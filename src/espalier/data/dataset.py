"""A dataset: arrays of images and labels, the rows that are its own, and how to normalise them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

__all__ = ["Dataset", "stratified"]


@dataclass(frozen=True)
class Dataset:
    """Labelled images of one split. The arrays may be memory-mapped; nothing is read before it is asked for.

    >>> images = np.arange(8, dtype=np.uint8).reshape(2, 2, 2)
    >>> data = Dataset("toy", "train", images, np.array([0, 1]), np.arange(2), 2, (0.0,), (1.0,), maximum=7)
    >>> x, y = data.tensors()
    >>> x.shape, x.max().item(), y.tolist()
    (torch.Size([2, 1, 2, 2]), 1.0, [0, 1])

    Fields:
        name, split: which data this is, for messages and reports.
        images: uint8 [M, H, W] or [M, H, W, C], with values from 0 to `maximum`.
        labels: integers [M] in [0, classes).
        rows: int64 [N], which of the M images belong to this split.
        classes: how many classes there are.
        mean, std: per channel, of the training images divided by `maximum`.
    """

    name: str
    split: str
    images: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    rows: np.ndarray = field(repr=False)
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    maximum: int = 255

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image, as a network takes it."""
        height, width, *channels = self.images.shape[1:]
        return (channels[0] if channels else 1, height, width)

    def raw(self, index: Sequence[int] | np.ndarray | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Images as uint8 [B, C, H, W] and labels as int64 [B], for positions within this split."""
        rows = self.rows[index]
        images = torch.from_numpy(np.ascontiguousarray(self.images[rows]))
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
        return images.contiguous(), torch.from_numpy(np.asarray(self.labels)[rows].astype(np.int64))

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 or float [B, C, H, W] in 0 … `maximum` → float32, zero mean and unit variance."""
        scale = torch.tensor(self.std, device=images.device) * self.maximum
        shift = torch.tensor(self.mean, device=images.device) * self.maximum
        return images.to(torch.float32, copy=True).sub_(shift.view(-1, 1, 1)).div_(scale.view(-1, 1, 1))

    def tensors(self, index: Sequence[int] | np.ndarray | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Normalised float32 images [B, C, H, W] and int64 labels [B]; without an index, the whole split."""
        images, labels = self.raw(index)
        return self.normalise(images), labels


def stratified(labels: np.ndarray, sizes: Sequence[int], seed: int) -> tuple[np.ndarray, ...]:
    """Disjoint parts of exactly `sizes` rows with the classes' own shares, and the rest as the last part.

    >>> small, rest = stratified(np.array([0, 0, 0, 0, 1, 1]), [3], seed=0)
    >>> len(small), len(rest), (np.array([0, 0, 0, 0, 1, 1])[small] == 1).sum()
    (3, 3, np.int64(1))

    The same labels, sizes and seed give the same parts on every machine and numpy version (the stream
    of `RandomState` is frozen). Returns sorted int64 arrays; ValueError where `sizes` ask for more than there
    is.
    """
    labels = np.asarray(labels)
    if min(sizes, default=0) < 0 or sum(sizes) > len(labels):
        raise ValueError(f"cannot take parts of {list(sizes)} rows out of {len(labels)}")
    draw = np.random.RandomState(seed)
    ends = np.cumsum(np.unique(labels, return_counts=True)[1])[:-1]
    pools = [draw.permutation(pool) for pool in np.split(np.argsort(labels, kind="stable"), ends)]
    parts = []
    for size in sizes:
        counts = np.array([len(pool) for pool in pools], dtype=np.int64)
        quota = size * counts / max(1, counts.sum())
        take = np.floor(quota).astype(np.int64)
        take[np.argsort(take - quota, kind="stable")[: size - take.sum()]] += 1
        parts.append(np.concatenate([pool[:t] for pool, t in zip(pools, take, strict=True)]))
        pools = [pool[t:] for pool, t in zip(pools, take, strict=True)]
    return tuple(np.sort(part) for part in [*parts, np.concatenate(pools)])
