"""The settings of a search and of the training of what it finds, at three scales."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from espalier.data import Augment, Dataset, load
from espalier.data.dataset import stratified
from espalier.errors import FormatError, SpaceError
from espalier.nas.group_search import GroupSettings

METHODS = ("gs-nas", "h2spg", "darts", "pc-darts", "random")
PRESETS = ("default", "paper")
SCALES = ("smoke", "short", "paper")


@dataclass(frozen=True)
class Images:
    """Which images, and how many.

    Fields:
        data: name of a dataset. train, validation, test: how many images, stratified by class; 0 for all there
            are (validation: for none). They never overlap, and the test images are looked at once.
        pool: average squares of so many pixels, to make images smaller.
        cutout: side of the hole; 0 for none.
        shuffled: the training images get each other's labels: what a search finds then owes nothing to them.
    """

    data: str = "cifar10"
    train: int = 0
    validation: int = 5000
    test: int = 0
    pool: int = 1
    cutout: int = 0
    shuffled: bool = False

    def load(self, split: str, seed: int = 0) -> Dataset:
        """One split: "train", "validation" or "test"."""
        try:
            data = load(self.data, split, validation=self.validation)
        except ValueError as error:
            raise FormatError(f"{self.data}: {error}.") from error
        count = {"train": self.train, "validation": 0, "test": self.test}[split]
        if 0 < count < len(data):
            labels = np.asarray(data.labels)[data.rows]
            data = replace(data, rows=data.rows[stratified(labels, [count], seed)[0]])
        if self.shuffled and split == "train":
            order = np.random.default_rng(seed).permutation(len(data))
            labels = np.array(data.labels)
            labels[data.rows] = labels[data.rows[order]]
            data = replace(data, labels=labels)
        return data if self.pool == 1 else pooled(data, self.pool)

    def augment(self, size: int) -> Augment:
        """As DARTS has it, in proportion to the images' height."""
        flip = self.data not in ("digits", "mnist", "svhn")
        return Augment(pad=max(size // 8, 1), flip=flip, cutout=self.cutout)


def pooled(data: Dataset, side: int) -> Dataset:
    """The same images with every ``side``×``side`` square averaged, held in memory.

    >>> small = pooled(load("digits", "test"), 2)
    >>> small.shape
    (1, 4, 4)
    """
    images = np.asarray(data.images[data.rows]).astype(np.float32)
    count, height, width = images.shape[:3]
    squares = images.reshape(count, height // side, side, width // side, side, *images.shape[3:])
    means = np.rint(squares.mean((2, 4))).astype(np.uint8)
    return replace(data, images=means, labels=np.asarray(data.labels)[data.rows], rows=np.arange(count))


@dataclass(frozen=True)
class SearchRecipe:
    """One search. Make one with :func:`search_recipe`, which fills in a preset and a scale.

    Fields:
        space, method, preset: names. images, seed.
        channels, cells: of the supernet. epochs (may be a fraction), batch_size.
        groups: how ProxSGD runs.
        target_params: parameters that the derived network of ``target_cells`` cells and ``target_channels``
            channels may have; 0 for no target (GS-NAS: the one μ that is given).
        tolerance: how far below the target is near enough, as a fraction of the full space.
        end_penalty: the penalty ends once what stays is within the target, and the rest trains on without it.
        trials: trainings that the bisection of μ may take; all but the first last ``later`` epochs.
        threshold: read "zero" off the norms (the paper), not off the proximal step; 0: the exact support.
        lr, weight_decay, momentum: of SGD, for H2SPG, DARTS, PC-DARTS and random search.
        candidates: of random search. top: keep only so many operations per node; 0 for all.
    """

    space: str = "darts"
    method: str = "gs-nas"
    preset: str = "default"
    scale: str = "paper"
    images: Images = field(default_factory=Images)
    seed: int = 0
    channels: int = 16
    cells: int = 8
    epochs: float = 100.0
    batch_size: int = 64
    groups: GroupSettings = field(default_factory=GroupSettings)
    target_params: float = 0.0
    target_cells: int = 14
    target_channels: int = 36
    tolerance: float = 0.05
    end_penalty: bool = True
    trials: int = 6
    later: float = 30.0
    threshold: float = 0.0
    lr: float = 0.025
    weight_decay: float = 3e-4
    momentum: float = 0.9
    candidates: int = 4
    top: int = 0
    device: str = "cpu"
    amp: bool = False
    compile: bool = False

    @property
    def name(self) -> str:
        kind = f"-{self.preset}" if self.method == "gs-nas" else ""
        return f"{self.space}-{self.method}{kind}-{self.seed}"

    def settings(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class TrainRecipe:
    """The training of a derived network. Make one with :func:`train_recipe`.

    ``drop_path`` rises linearly to this probability; ``auxiliary`` is the weight of the second classifier's
    loss, 0 for none (it needs images of 32×32).
    """

    scale: str = "paper"
    images: Images = field(default_factory=lambda: Images(validation=0, cutout=16))
    seed: int = 0
    channels: int = 36
    cells: int = 14
    stem: str = "cifar"
    epochs: float = 600.0
    batch_size: int = 80
    lr: float = 0.025
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float = 5.0
    drop_path: float = 0.3
    auxiliary: float = 0.4
    device: str = "cpu"
    amp: bool = False
    compile: bool = False

    def settings(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)


def search_recipe(
    space: str = "darts",
    method: str = "gs-nas",
    preset: str = "default",
    scale: str = "paper",
    data: str = "cifar10",
    **changes: Any,
) -> SearchRecipe:
    """The recipe of a preset at a scale, with these ``changes``.

    >>> paper = search_recipe(preset="paper")
    >>> paper.groups.mu, paper.groups.lr, paper.groups.normalize, paper.epochs, paper.threshold
    (60.0, 0.001, 'div', 100.0, 1e-06)

    "paper" is GS-NAS as published (ε = 0.001 and ρ = 0.8, both constant, τ = 1, μ_k = 60 / √n, all training
    images, zero read off a threshold); "default" is what we would do. At a smaller scale ε grows so that ε
    times the number of steps, the length of the way to zero, is the paper's, and μ follows :func:`published_mu`.
    """
    for value, known in ((method, METHODS), (preset, PRESETS), (scale, SCALES)):
        if value not in known:
            raise SpaceError(f"'{value}' is not one of {', '.join(known)}.")
    recipe = SearchRecipe(space=space, method=method, preset=preset, scale=scale, images=Images(data=data))
    recipe = replace(recipe, **_search_scale(recipe))
    if method == "gs-nas" and preset == "paper":
        recipe = replace(recipe, **_as_published(recipe))
    else:
        recipe = replace(recipe, target_params=4.5e6 if recipe.space == "darts" else 3.9e6)
    if space == "nas-bench-201":
        recipe = replace(recipe, cells=max(recipe.cells // 2, 1) if scale != "paper" else 5, target_cells=5)
        recipe = replace(recipe, target_channels=16, target_params=recipe.target_params and 0.9e6)
    return replace(recipe, **changes)


def _search_scale(recipe: SearchRecipe) -> dict[str, Any]:
    images = recipe.images
    if recipe.scale == "smoke":
        smoke = replace(images, train=128, validation=64, test=64, pool=4 if images.data == "cifar10" else 1)
        groups = GroupSettings(mu=0.5, lr=0.2, patience=2, drop_every=2, norms_every=1)
        return {
            "images": smoke,
            "channels": 4,
            "cells": 3,
            "epochs": 2.0,
            "later": 1.0,
            "batch_size": 32,
            "groups": groups,
            "trials": 2,
            "candidates": 2,
        }
    if recipe.scale == "short":
        short = replace(images, train=4800, validation=2000, test=0, pool=2 if images.data == "cifar10" else 1)
        groups = GroupSettings(mu=0.08, lr=0.1, patience=10, drop_every=10, norms_every=10)
        return {
            "images": short,
            "channels": 8,
            "cells": 4,
            "epochs": 2.0,
            "later": 1.0,
            "batch_size": 32,
            "groups": groups,
            "trials": 5,
            "candidates": 4,
        }
    # a group without gradients is zero after 1 / (ε μ) steps: about half of a training, at the cosine's mean ε
    return {"groups": GroupSettings(mu=0.003, lr=0.025, patience=100, drop_every=100, norms_every=100)}


def _as_published(recipe: SearchRecipe) -> dict[str, Any]:
    images, lr = recipe.images, 1e-3
    if recipe.scale == "paper":
        images = replace(images, validation=0)
    else:
        own = recipe.epochs * (images.train // recipe.batch_size)
        lr = min(lr * 100 * 782 / own, 0.5)
    mu = published_mu(recipe.channels, recipe.cells)
    groups = replace(
        recipe.groups, mu=mu, lr=lr, rho=0.8, normalize="div", cosine=False, clip=0.0, drop_every=0, patience=1
    )
    return {"images": images, "groups": groups, "target_params": 0.0, "trials": 1, "threshold": 1e-6}


def published_mu(channels: int, cells: int, mu: float = 60.0) -> float:
    """The paper's μ for a supernet of another size.

    >>> published_mu(16, 8), round(published_mu(8, 4), 2)
    (60.0, 8.54)

    What matters is μ_k / |w_k(0)| = μ / √n_k / |w_k(0)|, the time after which a group without gradients is
    zero. It is kept as published for the 3×3 separable convolution of the normal cells: n weights in all,
    with an expected square of their norm of s.
    """

    def product(channels: int, cells: int) -> float:
        n = s = 0.0
        for i in range(cells):
            reduction = i in (cells // 3, 2 * cells // 3)
            channels *= 2 if reduction else 1
            if not reduction:
                n += 2 * (9 * channels + channels**2)
                s += 4 * channels / 3
        return float((n * s) ** 0.5)

    return mu * product(channels, cells) / product(16, 8)


def train_recipe(scale: str = "paper", data: str = "cifar10", space: str = "darts", **changes: Any) -> TrainRecipe:
    """The recipe of a scale, with these ``changes``.

    >>> train_recipe("paper", space="s4").cells, train_recipe("paper").epochs
    (17, 600.0)

    Of S1, S2, S3 and S4, "paper" stacks 17 cells and drops paths with a probability of 0.2, as published; for
    ImageNet, 14 cells of 48 channels are trained for 250 epochs.
    """
    if scale not in SCALES:
        raise SpaceError(f"'{scale}' is not one of {', '.join(SCALES)}.")
    recipe = TrainRecipe(scale=scale, images=Images(data=data, validation=0, cutout=16))
    if space in ("s1", "s2", "s3", "s4"):
        recipe = replace(recipe, cells=17, drop_path=0.2)
    if space == "nas-bench-201":
        recipe = replace(recipe, cells=5, channels=16, epochs=200.0, batch_size=256, lr=0.1, weight_decay=5e-4)
        recipe = replace(recipe, images=replace(recipe.images, cutout=0), drop_path=0.0, auxiliary=0.0, clip=0.0)
    if data == "imagenet":
        recipe = replace(recipe, stem="imagenet", channels=48, epochs=250.0, batch_size=128, lr=0.1)
        recipe = replace(recipe, weight_decay=3e-5, drop_path=0.0, images=replace(recipe.images, cutout=0))
    small: Mapping[str, Any] = {}
    pool = data == "cifar10"
    if scale == "smoke":
        images = replace(recipe.images, train=128, test=64, pool=4 if pool else 1, cutout=2)
        small = {"images": images, "channels": 4, "cells": 3, "epochs": 1.0, "batch_size": 32, "auxiliary": 0.0}
    if scale == "short":
        images = replace(recipe.images, train=9600, pool=2 if pool else 1, cutout=4)
        small = {"images": images, "channels": 8, "cells": 5, "epochs": 3.0, "batch_size": 64, "auxiliary": 0.0}
        small = {**small, "drop_path": 0.0}
    if space == "nas-bench-201" and small:
        small = {**small, "cells": 1}
    return replace(recipe, **{**small, **changes})
