"""Augmentation of whole batches: random numbers are drawn once per batch, then pure maps use them.

No function loops over images. The maps take their random numbers as arguments, so that they can be checked
against a plain loop, repeated, and shared out over ranks.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Augment", "Draws", "crop", "cutout", "flip", "mixup", "one_hot"]


@dataclass(frozen=True)
class Draws:
    """The random numbers of a batch of B images; each field has shape [B].

    top, left: int64 corner of the crop. flip: bool. y, x: int64 centre of the hole.
    partner: int64 index of the image to mix with. weight: float32 share of the image itself.
    """

    top: np.ndarray
    left: np.ndarray
    flip: np.ndarray
    y: np.ndarray
    x: np.ndarray
    partner: np.ndarray
    weight: np.ndarray

    def on(self, device: torch.device | str, index: slice = slice(None)) -> dict[str, Tensor]:
        """The draws of the images that `index` selects, as tensors."""
        return {f.name: torch.from_numpy(getattr(self, f.name)[index]).to(device) for f in fields(self)}


@dataclass(frozen=True)
class Augment:
    """What is done to a batch; the default is nothing.

    >>> cifar = Augment(pad=4, flip=True, cutout=16, mixup=0.2)
    >>> cifar.draw(64, (3, 32, 32), np.random.default_rng(0)).top.max()
    np.int64(8)

    Fields:
        pad: black pixels added on every side before the random crop.
        size: height and width of the crop; None keeps the image's.
        centre: crop in the middle, not at random (to evaluate).
        flip: mirror half of the images left to right.
        cutout: side of a square hole at a random centre, cut off at the edges; filled with the means.
        mixup: α of MixUp's Beta(α, α), one weight per batch; 0 for none. Targets become class probabilities.
    """

    pad: int = 0
    size: int | None = None
    centre: bool = False
    flip: bool = False
    cutout: int = 0
    mixup: float = 0.0

    def draw(self, count: int, shape: tuple[int, int, int], rng: np.random.Generator) -> Draws:
        """Random numbers for `count` images of `shape` [C, H, W]; always as many, whatever is switched on."""
        height, width = self.output(shape)
        room = [have + 2 * self.pad - want for have, want in zip(shape[1:], (height, width), strict=True)]
        if min(room) < 0:
            raise ValueError(f"cannot crop {height}×{width} out of {shape[1]}×{shape[2]} with pad={self.pad}")
        weight = rng.beta(self.mixup, self.mixup) if self.mixup else 1.0
        top, left = (rng.integers(r + 1, size=count) for r in room)
        if self.centre:
            top, left = (np.full(count, r // 2) for r in room)
        return Draws(
            top=top,
            left=left,
            flip=rng.random(count) < 0.5,
            y=rng.integers(height, size=count),
            x=rng.integers(width, size=count),
            partner=rng.permutation(count),
            weight=np.full(count, weight, np.float32),
        )

    def output(self, shape: tuple[int, int, int]) -> tuple[int, int]:
        """Height and width of the augmented images."""
        return (shape[1], shape[2]) if self.size is None else (self.size, self.size)

    def geometry(self, images: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """Pad, crop and flip images of any dtype [B, C, H, W]."""
        height, width = self.output((images.shape[1], images.shape[2], images.shape[3]))
        if self.pad or (height, width) != images.shape[2:]:
            images = functional.pad(images, [self.pad] * 4)
            images = crop(images, draws["top"], draws["left"], height, width)
        return flip(images, draws["flip"]) if self.flip else images

    def colour(self, images: Tensor, labels: Tensor, classes: int, draws: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Cutout and MixUp of normalised float images; labels become [B, classes] under MixUp."""
        if self.cutout:
            images = cutout(images, draws["y"], draws["x"], self.cutout)
        if self.mixup:
            targets = one_hot(labels, classes)
            return mixup(images, targets, draws["partner"], draws["weight"])
        return images, labels


def crop(images: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """Each image's own window: [B, C, H, W] and corners [B] → [B, C, height, width].

    >>> crop(torch.arange(9).view(1, 1, 3, 3), torch.tensor([1]), torch.tensor([0]), 2, 2).flatten().tolist()
    [3, 4, 6, 7]
    """
    windows = images.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def flip(images: Tensor, which: Tensor) -> Tensor:
    """The images where `which` (bool [B]) holds are mirrored left to right.

    >>> flip(torch.arange(4).view(2, 1, 1, 2), torch.tensor([True, False])).flatten().tolist()
    [1, 0, 2, 3]
    """
    return torch.where(which.view(-1, 1, 1, 1), images.flip(-1), images)


def cutout(images: Tensor, y: Tensor, x: Tensor, length: int, value: float = 0.0) -> Tensor:
    """A square hole per image (DeVries & Taylor, 2017), from centre - length // 2 on; centres [B].

    >>> cutout(torch.ones(1, 1, 3, 3), torch.tensor([0]), torch.tensor([1]), 2).sum().item()
    7.0
    """
    rows = _hole(y, images.shape[2], length)
    columns = _hole(x, images.shape[3], length)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], value)


def mixup(images: Tensor, targets: Tensor, partner: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight · image + (1 - weight) · its partner, and the same of the targets (Zhang et al., 2017).

    >>> images, targets = torch.tensor([4.0, 0.0]).view(2, 1, 1, 1), torch.eye(2)
    >>> mixed, shares = mixup(images, targets, torch.tensor([1, 0]), torch.tensor([0.75, 0.75]))
    >>> mixed.flatten().tolist(), shares.tolist()
    ([3.0, 1.0], [[0.75, 0.25], [0.25, 0.75]])
    """
    share = weight.view(-1, 1, 1, 1)
    mixed = torch.lerp(images[partner], images, share)
    return mixed, torch.lerp(targets[partner], targets, weight.view(-1, 1))


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """int64 [B] → float32 [B, classes]."""
    return functional.one_hot(labels, classes).float()


def _hole(centre: Tensor, size: int, length: int) -> Tensor:
    start = centre.view(-1, 1) - length // 2
    position = torch.arange(size, device=centre.device)
    return (position >= start) & (position < start + length)
