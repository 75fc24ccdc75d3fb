"""The commands ``espalier nas search``, ``espalier nas train`` and ``espalier nas show``."""

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from espalier.nas.loop import Folder, Line, join_ranks, own_device, rank

Scale = Literal["smoke", "short", "paper"]


@dataclass(frozen=True)
class Search:
    """Search a space of cells; writes genotype.json, result.json, log.jsonl and report.html."""

    space: str = "darts"
    """darts, s1, s2, s3, s4 or nas-bench-201."""
    data: str = "cifar10"
    """Name of a prepared dataset, or digits."""
    target_params: float | None = None
    """Parameters that the derived network may have, at the recipe's size (paper: 14 cells, 36 channels)."""
    method: Literal["gs-nas", "h2spg", "darts", "pc-darts", "random"] = "gs-nas"
    """What searches."""
    preset: Literal["default", "paper"] = "default"
    """Of gs-nas: as published, or as we would do it."""
    scale: Scale = "paper"
    """paper: 8 cells, 16 channels, 100 epochs; short: minutes on two cores; smoke: seconds."""
    mu: float | None = None
    """Weight of the penalty (the first one, where a target is given)."""
    epochs: float | None = None
    """Of each training; may be a fraction."""
    top: int = 0
    """Keep only so many operations per node, at most one per edge; 0 keeps every one that is not zero."""
    seed: int = 0
    """Of everything that is random."""
    device: str = "cpu"
    """cpu, cuda or cuda:N; under torchrun each rank takes its own GPU."""
    amp: bool = False
    """Compute in bfloat16 where that is safe."""
    compile: bool = False
    """torch.compile the supernet (compiled anew whenever operations leave it)."""
    save_every: float = 60.0
    """Seconds between checkpoints."""
    out: Path | None = None
    """Folder of the run; runs/NAME by default. A run that was stopped goes on there."""


@dataclass(frozen=True)
class Train:
    """Train the stacked cells of a genotype for themselves, and test them once."""

    genotype: Annotated[str, tyro.conf.Positional]
    """A genotype's file, or darts-v1 or darts-v2."""
    data: str = "cifar10"
    """Name of a prepared dataset, or digits."""
    scale: Scale = "paper"
    """paper: 14 cells (17 for S1 to S4), 36 channels, 600 epochs; short: minutes on two cores; smoke: seconds."""
    cells: int | None = None
    """How many are stacked: 14, 17, 20, ..."""
    channels: int | None = None
    """Of the first cells."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """imagenet: the first layers divide the images' size by eight."""
    epochs: float | None = None
    """May be a fraction."""
    seed: int = 0
    """Of everything that is random."""
    device: str = "cpu"
    """cpu, cuda or cuda:N; under torchrun each rank takes its own GPU."""
    amp: bool = False
    """Compute in bfloat16 where that is safe."""
    compile: bool = False
    """torch.compile the network."""
    save_every: float = 60.0
    """Seconds between checkpoints."""
    out: Path | None = None
    """Folder of the run; runs/train-NAME by default. A run that was stopped goes on there."""


@dataclass(frozen=True)
class Show:
    """Print a genotype and its sizes, and draw it."""

    genotype: Annotated[str, tyro.conf.Positional] = "darts-v2"
    """A genotype's file, or darts-v1 or darts-v2."""
    draw: Path | None = None
    """Where to write the drawing: .svg, or .png where a converter is installed."""


@dataclass(frozen=True)
class Nas:
    """Search spaces of cells for networks."""

    command: tyro.conf.OmitArgPrefixes[
        Annotated[Search, tyro.conf.subcommand("search", prefix_name=False)]
        | Annotated[Train, tyro.conf.subcommand("train", prefix_name=False)]
        | Annotated[Show, tyro.conf.subcommand("show", prefix_name=False)]
    ]


def run(nas: Nas, console: Console) -> None:
    """Carry out one of the commands."""
    if isinstance(nas.command, Show):
        _show(nas.command, console)
        return
    joined = join_ranks(own_device(nas.command.device))
    quiet = Console(quiet=True) if rank() else console
    try:
        if isinstance(nas.command, Search):
            _search(nas.command, quiet)
        else:
            _train(nas.command, quiet)
    finally:
        if joined:
            import torch.distributed as dist

            dist.destroy_process_group()


def _search(command: Search, console: Console) -> None:
    from espalier.nas.recipe import search_recipe
    from espalier.nas.report import write_report
    from espalier.nas.search import search
    from espalier.nas.spaces import space

    space(command.space)
    changes = {"seed": command.seed, "device": command.device, "amp": command.amp, "compile": command.compile}
    recipe = search_recipe(
        command.space, command.method, command.preset, command.scale, command.data, top=command.top, **changes
    )
    if command.target_params is not None:
        trials = recipe.trials if recipe.trials > 1 else 8  # the published preset bisects nothing by itself
        recipe = replace(recipe, target_params=command.target_params, trials=trials)
    if command.mu is not None:
        recipe = replace(recipe, groups=replace(recipe.groups, mu=command.mu))
    if command.epochs is not None:
        recipe = replace(recipe, epochs=command.epochs, later=min(recipe.later, command.epochs))
    out = command.out or Path("runs") / f"nas-{recipe.name}-{recipe.scale}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = search(recipe, Folder(out, _teller(console), command.save_every))
    for message in dict.fromkeys(str(w.message) for w in caught if "bound to be zeroed" in str(w.message)):
        console.print(f"warning: {message}", style="yellow", markup=False)
    if rank() == 0:
        write_report(out / "report.html", recipe, found)
    console.print(str(found.genotype), markup=False)
    console.print(f"{found.params:,} parameters at {recipe.target_cells} cells and {recipe.target_channels} channels")
    for name, value in found.scores.items():
        console.print(f"{name}: {value:.2f} %")
    for note in found.notes:
        console.print(f"note: {note}", markup=False)
    console.print(f"Genotype in {out / 'genotype.json'}, report in {out / 'report.html'}", soft_wrap=True)


def _train(command: Train, console: Console) -> None:
    from espalier.nas.genotype import genotype
    from espalier.nas.recipe import train_recipe
    from espalier.nas.train import train

    found = genotype(command.genotype)
    changes = {name: value for name in ("cells", "channels", "epochs") if (value := getattr(command, name)) is not None}
    changes |= {"seed": command.seed, "device": command.device, "amp": command.amp, "compile": command.compile}
    recipe = train_recipe(command.scale, command.data, found.space, stem=command.stem, **changes)
    if command.data not in ("cifar10", "cifar100", "imagenet", "svhn", "stl10"):
        recipe = replace(recipe, auxiliary=0.0)
    name = Path(command.genotype).stem
    out = command.out or Path("runs") / f"train-{name}-{recipe.scale}-{recipe.seed}"
    result = train(found, recipe, Folder(out, _teller(console), command.save_every))
    console.print(f"{result['params']:,} parameters, test accuracy {result['test accuracy']:.2f} %")
    console.print(f"Network in {out / 'network.espalier'}", soft_wrap=True)


def _show(command: Show, console: Console) -> None:
    from espalier.nas.draw import save_drawing
    from espalier.nas.genotype import genotype

    found = genotype(command.genotype)
    console.print(str(found), markup=False)
    if found.space == "nas-bench-201":
        console.print(f"{found.params(16, 5):,} parameters at 3 × 5 cells and 16 channels")
    else:
        sizes = ", ".join(f"{found.params(36, cells):,} at {cells} cells" for cells in (14, 17, 20))
        console.print(f"parameters with 36 channels: {sizes}")
    if command.draw is not None:
        save_drawing(found, command.draw)
        console.print(f"Drawing in {command.draw}", soft_wrap=True)


def _teller(console: Console):
    def tell(line: Line) -> None:
        shown = {key: value for key, value in line.items() if key not in ("norms", "dead")}
        console.print(json.dumps(shown), markup=False, soft_wrap=True)

    return tell
