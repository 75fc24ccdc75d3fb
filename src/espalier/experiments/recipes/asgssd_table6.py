"""ASGSSD, Table 6: a network of Once-for-All's kind on ImageNet."""

from dataclasses import replace

from espalier.experiments.config import Run
from espalier.experiments.recipe import Published, Recipe, smoke

_FULL = Run(
    "mobile",
    "imagenet",
    epochs=180,
    batch_size=128,
    lr=0.1,
    search=50 / 180,
    projection=50 / 180,
    weight_decay=3e-5,
    crop=224,
    validation=50_000,
    flip=True,
)
_PAPER = (_FULL, replace(_FULL, method="h2spg", sparsity=0.1))
_SHORT = tuple(replace(run, width=0.25, size=112, images=20_000, epochs=1, batch_size=64) for run in _PAPER)

RECIPES = (
    Recipe(
        name="asgssd-table6",
        title="ofa-pixel1-143 on ImageNet",
        runs={"paper": _PAPER, "short": _SHORT, "smoke": tuple(smoke(run) for run in _PAPER)},
        label=lambda run: "ofa-pixel1-143, baseline" if run.method == "full" else "ofa-pixel1-143, H2SPG",
        published={
            "ofa-pixel1-143, baseline": Published("80.1", "9.1", "511"),
            "ofa-pixel1-143, H2SPG": Published("80.2", "8.4", "470"),
        },
        notes=("The paper starts from Once-for-All's published weights; here the network is trained from scratch.",),
    ),
)
