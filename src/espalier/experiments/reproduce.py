"""``espalier reproduce``: do a recipe's runs, and show our numbers beside the paper's."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from espalier.data import DataError
from espalier.errors import EspalierError
from espalier.experiments import modules
from espalier.experiments.config import Run
from espalier.experiments.logs import explain_logs
from espalier.experiments.ranks import join
from espalier.experiments.recipe import Recipe, Scale, all_recipes, cuts, find
from espalier.experiments.training import is_done, train
from espalier.report.operators import quantity

__all__ = ["Reproduce", "Row", "reproduce", "rows"]


@dataclass(frozen=True)
class Reproduce:
    """Do the runs of one table or figure of a paper; killed, it goes on where it was."""

    name: Annotated[str, tyro.conf.Positional] = "list"
    """Name of the recipe; without one, all are listed."""
    scale: Scale = "smoke"
    """smoke: seconds, on made-up images. short: at most 90 minutes on two cores. paper: the paper's settings."""
    out: Path = Path("runs")
    """Folder of the runs; each recipe and scale has its own below it."""
    only: str = ""
    """Do only the runs whose names contain this."""
    device: str = "cpu"
    """cpu or cuda. Under torchrun every process takes its own."""
    threads: int = 0
    """Threads of torch; 0 leaves it to torch."""
    draw: bool = True
    """Draw the search spaces and plot the accuracies."""
    train: bool = True
    """Do the runs; --no-train only reports those that are done."""


@dataclass(frozen=True)
class Row:
    """One row of the table: means over seeds, and the sample deviation of the accuracy."""

    label: str
    seeds: int
    params: float
    macs: float
    accuracy: float
    deviation: float
    refused: str = ""

    @property
    def text(self) -> str:
        """The accuracy as it is printed."""
        if self.refused:
            return "✗ (invalid)"
        return f"{self.accuracy:.2f}" + (f" ± {self.deviation:.2f}" if self.seeds > 1 else "")


def reproduce(command: Reproduce, console: Console) -> bool:
    """Whether every run was done."""
    if command.name == "list":
        for recipe in all_recipes().values():
            console.print(f"[bold]{recipe.name}[/]  {recipe.title}", soft_wrap=True)
        for name, experiment in modules.EXPERIMENTS.items():
            console.print(f"[bold]{name}[/]  {experiment.title}", soft_wrap=True)
        return True
    if command.name in modules.EXPERIMENTS:
        return modules.run(command.name, command.scale, command.out, console)
    recipe = find(command.name)
    if command.threads:
        torch.set_num_threads(command.threads)
    team = join(command.device)
    console = console if team.leads else Console(quiet=True)
    _explain(recipe, command.scale, console)
    root = command.out / f"{recipe.name}-{command.scale}"
    wanted = [run for run in recipe.runs[command.scale] if command.only in run.name]
    if not wanted:
        raise EspalierError(f"--only {command.only!r} matches no run of {recipe.name} at scale {command.scale}.")
    done: list[tuple[Run, dict[str, Any]]] = []
    missing: dict[str, str] = {}
    if not command.train:
        wanted = [run for run in wanted if is_done(run, root)]
    for i, run in enumerate(wanted, 1):
        try:
            line = train(run, root, team, console)
        except DataError as error:
            missing[run.dataset] = str(error)
            continue
        done.append((run, line))
        words = "refused" if "refused" in line else f"test {line['test']:.2f} %, {line['params']:,} parameters"
        console.print(f"{i}/{len(wanted)} {run.name}: {words}, {line['seconds']:.0f} s")
    if team.leads and done:
        _report(recipe, command, root, done, console)
    team.leave()
    for problem in missing.values():
        console.print(f"[bold red]not done:[/] {problem.replace('[', chr(92) + '[')}", soft_wrap=True)
    return not missing


def rows(recipe: Recipe, done: Sequence[tuple[Run, Mapping[str, Any]]]) -> list[Row]:
    """The table's rows, in the order of the runs."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for run, line in done:
        grouped.setdefault(recipe.label(run), []).append(line)
    found = []
    for label, lines in grouped.items():
        valid = [line for line in lines if "refused" not in line]
        if not valid:
            found.append(Row(label, len(lines), 0.0, 0.0, 0.0, 0.0, str(lines[0]["refused"])))
            continue
        tests = [float(line["test"]) for line in valid]
        found.append(
            Row(
                label,
                len(valid),
                statistics.mean(line["params"] for line in valid),
                statistics.mean(line["macs"] for line in valid),
                statistics.mean(tests),
                statistics.stdev(tests) if len(tests) > 1 else 0.0,
            )
        )
    return found


def _explain(recipe: Recipe, scale: str, console: Console) -> None:
    console.print(f"[bold]{recipe.name}[/], {scale}: {recipe.title}")
    for note in recipe.notes:
        console.print(f"  {note}")
    for name, (there, here) in (cuts(recipe, scale) if scale != "paper" else {}).items():
        console.print(f"  [yellow]cut[/] {name}: {there} → {here}")
    explain_logs(console)


def _report(
    recipe: Recipe,
    command: Reproduce,
    root: Path,
    done: Sequence[tuple[Run, dict[str, Any]]],
    console: Console,
) -> None:
    found = rows(recipe, done)
    table = Table(title=f"{recipe.name}, {command.scale}")
    for head in ("", "top-1, %", "paper", "parameters", "paper, M", "MACs", "paper, FLOPs, M"):
        table.add_column(head, justify="right" if head else "left", no_wrap=bool(head))
    for row in found:
        paper = recipe.published.get(row.label)
        sizes = ("", "") if row.refused else (quantity(round(row.params)), quantity(round(row.macs)))
        published = (paper.accuracy, paper.params, paper.flops) if paper else ("", "", "")
        table.add_row(row.label, row.text, published[0], sizes[0], published[1], sizes[1], published[2])
    console.print(table)
    for row in found:
        if row.refused:
            console.print(f"  {row.label} is refused: {row.refused}", soft_wrap=True)
    for words in dict.fromkeys(line["note"] for _, line in done if line.get("note")):
        console.print(f"  {words}")
    with (root / "results.jsonl").open("w") as file:
        file.writelines(json.dumps(line) + "\n" for _, line in done)
    summary = {
        "recipe": recipe.name,
        "scale": command.scale,
        "rows": [vars(row) for row in found],
        "published": {label: vars(paper) for label, paper in recipe.published.items()},
        "cuts": cuts(recipe, command.scale),
    }
    (root / "table.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    if command.draw:
        from espalier.experiments.pictures import draw_runs, plot_rows

        plot_rows(recipe, done, root / "plot.png", console)
        if recipe.draw:
            draw_runs(done, root, console)
    console.print(f"Wrote {root}/results.jsonl, table.json and what belongs to them")
