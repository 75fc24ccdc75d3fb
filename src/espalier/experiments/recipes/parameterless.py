"""Beyond the paper: what removable skips and pools buy, on SuperResNet and the 8-cell DARTS network."""

from dataclasses import replace

from espalier.experiments.config import Run
from espalier.experiments.recipe import Recipe, smoke

_SUPER = Run(
    "super-resnet",
    "cifar10",
    epochs=300,
    search=50 / 300,
    projection=50 / 300,
    cycles=(50 / 300, 250 / 300),
    weight_decay=5e-4,
    pad=4,
    flip=True,
)
_DARTS = replace(_SUPER, network="darts8", lr=0.01, cycles=(0.5, 0.5), weight_decay=3e-4, clip=5.0)


def _both(base: Run, params: float) -> tuple[Run, ...]:
    plain = replace(base, method="h2spg", params=params, saliency="balanced")
    return (base, plain, replace(plain, parameterless=True))


_PAPER = _both(_SUPER, 0.5) + _both(_DARTS, 0.5)
_SMALL = {"size": 16, "epochs": 2, "lr": 0.05, "search": 0.3, "projection": 0.2, "cycles": (0.3, 0.7)}
_NARROW = {"super-resnet": ("super-resnet-14blocks", 0.25), "darts8": ("darts8-2nodes", 1 / 6)}


def _short(run: Run) -> Run:
    network, width = _NARROW[run.network]
    return replace(run, network=network, width=width, construct_early=True, **_SMALL)


_SHORT = tuple(_short(run) for run in _PAPER)


def _label(run: Run) -> str:
    name = "SuperResNet" if run.network.startswith("super") else "DARTS (8 cells)"
    if run.method == "full":
        return f"{name}, full"
    return f"{name}, H2SPG{', skips and pools removable' if run.parameterless else ''}"


RECIPES = (
    Recipe(
        name="parameterless",
        title="SuperResNet and DARTS (8 cells) on CIFAR-10, with and without removable skips and pools",
        runs={"paper": _PAPER, "short": _SHORT, "smoke": tuple(smoke(run) for run in _PAPER)},
        label=_label,
        published={},
        notes=(
            "Not in the paper, which keeps operations without parameters and names this as its limit.",
            "Both spaces get the same budget of parameters, and the saliency that ranks scalars and weights apart.",
        ),
    ),
)
