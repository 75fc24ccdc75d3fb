"""ASGSSD, Table 2: SuperResNet on CIFAR-10."""

from dataclasses import replace

from espalier.experiments.config import Run
from espalier.experiments.recipe import Published, Recipe, smoke

_FULL = Run(
    "super-resnet",
    "cifar10",
    epochs=300,
    search=50 / 300,
    projection=50 / 300,
    cycles=(50 / 300, 125 / 300, 125 / 300),
    weight_decay=5e-4,
    pad=4,
    flip=True,
    mixup=0.2,
)
_PAPER = (_FULL, replace(_FULL, method="h2spg", params=0.225))
_SHORT = tuple(
    replace(
        run,
        network="super-resnet-14blocks",
        width=0.25,
        size=16,
        epochs=3,
        batch_size=128,
        search=1 / 3,
        projection=1 / 3,
        cycles=(1 / 3, 2 / 3),
    )
    for run in _PAPER
)

RECIPES = (
    Recipe(
        name="asgssd-table2",
        title="SuperResNet on CIFAR-10",
        runs={"paper": _PAPER, "short": _SHORT, "smoke": tuple(smoke(run) for run in _PAPER)},
        label=lambda run: "SuperResNet, full" if run.method == "full" else "SuperResNet, H2SPG",
        published={"SuperResNet, H2SPG": Published("97.5", "2.0")},
        notes=(
            "The paper gives no full network: the budget is the paper's 2.0 M of our 8.9 M parameters.",
            "MixUp's α is not published (ours: 0.2), nor are the lengths of the cosine's periods.",
        ),
    ),
)
