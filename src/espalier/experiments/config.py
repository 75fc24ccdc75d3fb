"""One training as a frozen dataclass: the network, the data, the method and its schedule."""

import hashlib
import json
import math
from dataclasses import dataclass, fields

from espalier.space.budget import Budget

__all__ = ["METHODS", "Run"]

METHODS = ("full", "h2spg", "dhspg", "proxsg+", "magnitude", "random")


@dataclass(frozen=True)
class Run:
    """Everything that decides the outcome of one training.

    >>> run = Run("demonet", "fashion-mnist", method="h2spg", params=0.55, epochs=2)
    >>> run.name, run.budget
    ('demonet-h2spg-params0.55-0', Budget(params=0.55))

    Fields:
        network, width: a name in ``experiments.networks`` and its factor on the channels.
        dataset, images, size: the data; how many training images (None: all) and their side (None: as published;
            images are shrunk by averaging). ``stand_in`` takes made-up images of the dataset's shape instead.
        crop: side of the square cut out of larger images, at random to train on, else the middle; 0: all of it.
        validation: training images that are held out.
        method: "full" trains everything; "magnitude" and "random" remove at once, after the search phase, valid sets
            in ascending magnitude or in random order, and train on; the others are the half-space family.
        sparsity, params: what is asked for: structures to remove, or parameters that may stay, as fractions.
        at_end: remove at the very last step, with no training after it: the way to the sub-network without fine-tuning
            for a method that does not train towards it.
        saliency: a name in ``espalier.saliency.SALIENCIES``, for the half-space family.
        search, projection: shares of all steps: the search phase (warm-up), and the way to zero.
        cycles: shares of all steps; in each, the rate falls from ``lr`` to ``lr_end`` along a cosine.
        search_lr: instead of ``lr`` in the first cycle.
        decay: instead of the last cycle: the rate is ``lr`` times 0.1 for every so many epochs since the search.
        shared: runs that differ only in what happens after the search phase share its steps up to ``watched``
            steps before its end. The same steps are taken as without sharing.
        construct_early: go on with the sub-network, its momentum at zero, as soon as the structures are at zero (the
            paper's own way for DARTS on ImageNet).
        clip: bound on the gradient's norm; 0 for none.
    """

    network: str
    dataset: str
    method: str = "full"
    sparsity: float | None = None
    params: float | None = None
    width: float = 1.0
    images: int | None = None
    size: int | None = None
    stand_in: bool = False
    validation: int = 5000
    epochs: float = 300
    batch_size: int = 64
    lr: float = 0.1
    lr_end: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip: float = 0.0
    search: float = 0.3
    projection: float = 0.3
    cycles: tuple[float, ...] = (1.0,)
    search_lr: float | None = None
    decay: float = 0.0
    pad: int = 0
    flip: bool = False
    cutout: int = 0
    mixup: float = 0.0
    crop: int = 0
    parameterless: bool = False
    shared: bool = False
    watched: int = 50
    construct_early: bool = False
    at_end: bool = False
    saliency: str = "cosine_magnitude"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is one of {', '.join(METHODS)}, not {self.method!r}")
        if self.method != "full" and (self.sparsity is None) == (self.params is None):
            raise ValueError("give either sparsity= or params= to a method that removes")
        if not math.isclose(sum(self.cycles), 1.0):
            raise ValueError(f"cycles are shares of all steps and add up to 1, not to {sum(self.cycles):g}")

    @property
    def name(self) -> str:
        """A name for folders and logs."""
        what = f"{self.network}{'-parameterless' if self.parameterless else ''}-{self.method}"
        if self.method != "full":
            what += "-end" if self.at_end else ""
            what += f"-params{self.params:g}" if self.params is not None else f"-{self.sparsity:g}"
        return f"{what}-{self.seed}"

    @property
    def way(self) -> str:
        """The method in words: what removes at once may go on training.

        >>> Run("demonet", "mnist", "random", sparsity=0.5).way
        'random, trained on'
        """
        trained_on = self.method in ("magnitude", "random") and not self.at_end
        return f"{self.method}, trained on" if trained_on else self.method

    @property
    def digest(self) -> str:
        """Six hexadecimal digits of all fields that are not the default: another configuration has another folder."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:6]

    @property
    def budget(self) -> Budget | None:
        """What may stay."""
        if self.params is not None:
            return Budget(params=self.params)
        return None if self.sparsity is None else Budget(structures=1.0 - self.sparsity)

    def phases(self, steps: int) -> tuple[int, int]:
        """Steps of the search phase, and of the way to zero.

        >>> Run("demonet", "mnist", "h2spg", sparsity=0.5).phases(100)
        (30, 30)
        """
        if self.at_end:
            return steps - 1, 1
        to_zero = 1 if self.method in ("magnitude", "random") else max(1, round(self.projection * steps))
        return max(1, round(self.search * steps)), to_zero

    def rate(self, step: int, per_epoch: int, steps: int) -> float:
        """The learning rate of a step, counted from 0.

        >>> [round(Run("demonet", "mnist", cycles=(0.5, 0.5)).rate(s, 5, 20), 3) for s in (0, 5, 10, 15)]
        [0.1, 0.05, 0.1, 0.05]
        """
        begin = 0.0
        for i, share in enumerate(self.cycles):
            end = begin + share * steps
            if step < end or i == len(self.cycles) - 1:
                if self.decay and i == len(self.cycles) - 1:
                    return self.lr * 0.1 ** int((step - begin) / per_epoch / self.decay)
                peak = self.search_lr if self.search_lr is not None and i == 0 else self.lr
                cosine = 0.5 * (1 + math.cos(math.pi * min((step - begin) / (end - begin), 1.0)))
                return self.lr_end + (peak - self.lr_end) * cosine
            begin = end
        raise AssertionError("a run has at least one cycle")

    def differences(self, other: "Run") -> dict[str, tuple[object, object]]:
        """Fields that differ: name → (here, there)."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
