"""ASGSSD, Table 4: RegNet on CIFAR-10, H2SPG against other sparse optimizers at five sparsities."""

from dataclasses import replace

from espalier.experiments.config import Run
from espalier.experiments.recipe import Published, Recipe, smoke

__all__ = ["FULL", "RECIPES", "SMALL", "label"]

SPARSITIES = (0.5, 0.9, 0.1, 0.7, 0.3)
FULL = Run(
    "regnet-800m",
    "cifar10",
    epochs=300,
    search=50 / 300,
    projection=50 / 300,
    cycles=(50 / 300, 250 / 300),
    decay=75,
    weight_decay=5e-4,
    pad=4,
    flip=True,
)
SMALL = replace(
    FULL,
    width=0.125,
    size=16,
    batch_size=128,
    epochs=4,
    search=1 / 3,
    projection=0.2,
    cycles=(1 / 3, 2 / 3),
    decay=0.0,
    shared=True,
    construct_early=True,
)


def _grid(base: Run, seeds: int, rest: tuple[float, ...]) -> tuple[Run, ...]:
    """All methods at one sparsity after the other, so that an unfinished table has whole rows.

    At ``rest``, magnitude and random removal are also trained on. What the rivals have one seed of, at short, is
    what costs a training each.
    """
    end = replace(base, at_end=True, watched=5)
    runs = [replace(end, seed=seed) for seed in range(seeds)]
    for sparsity in SPARSITIES:
        for seed in range(seeds):
            pick = {"sparsity": sparsity, "seed": seed}
            runs += [replace(base, method="h2spg", **pick)]
            runs += [replace(end, method=method, **pick) for method in ("magnitude", "random")]
            if seed == 0 or base is FULL:
                runs += [replace(base, method=method, **pick) for method in ("dhspg", "proxsg+")]
                runs += [replace(base, method=m, **pick) for m in ("magnitude", "random") if sparsity in rest]
    return tuple(runs)


_SIZES = tuple(replace(FULL, network=f"regnet-{size}m", seed=seed) for size in (200, 400, 600) for seed in range(3))


def label(run: Run) -> str:
    """The row of a run."""
    if run.method == "full":
        return f"{run.network}, full"
    return f"{run.way}, {run.sparsity:g}"


_SMOKE = (
    *(
        smoke(replace(SMALL, method=method, sparsity=sparsity))
        for method, sparsity in (("h2spg", 0.5), ("random", 0.9), ("dhspg", 0.9), ("proxsg+", 0.5))
    ),
    smoke(replace(SMALL, method="magnitude", sparsity=0.5, at_end=True)),
)

RECIPES = (
    Recipe(
        name="asgssd-table4",
        title="RegNet-800M on CIFAR-10: H2SPG, DHSPG, ProxSG+, magnitude and random removal",
        runs={
            "paper": _grid(FULL, 3, SPARSITIES) + _SIZES,
            "short": _grid(SMALL, 3, (0.5, 0.9)),
            "smoke": _SMOKE,
        },
        label=label,
        published={
            "regnet-800m, full": Published("95.01"),
            "h2spg, 0.1": Published("above 95.01"),
            "h2spg, 0.3": Published("above 95.01"),
            "h2spg, 0.5": Published("94.61 ± 0.19"),
            "dhspg, 0.9": Published("✗ (invalid)"),
        },
        notes=(
            "The paper's text has the table as a picture; beside ours stands what its text says of it.",
            "All methods take the same number of steps, and no sub-network is fine-tuned.",
            "Magnitude and random: from the network that the same number of plain steps has trained, structures go in "
            "ascending magnitude or in random order, each only if the network stays valid.",
            "Magnitude and random, trained on: they go at once when H2SPG's search phase ends, and the rest of the "
            "steps trains what is left.",
            "RegNet-800M has 20 structures, of which 16 can go together: at 0.9, all methods but DHSPG remove 16.",
        ),
        axis="sparsity",
    ),
)
