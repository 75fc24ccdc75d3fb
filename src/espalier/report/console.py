"""What the terminal shows: the search space, the training as it goes, the outcome."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from espalier.report.operators import quantity
from espalier.report.results import PHASES, Check, History, Measurement, Step
from espalier.report.tables import before_and_after, check_rows
from espalier.space.summary import Summary


def space_table(summary: Summary, limit: int | None = None) -> Table:
    """The search space, structures first; ``limit`` rows of those that stay."""
    table = Table(title="Search space", title_justify="left", title_style="bold", header_style="dim", box=None)
    table.add_column("structure", overflow="fold")
    table.add_column("level")
    table.add_column("params", justify="right")
    table.add_column("MACs", justify="right")
    table.add_column("removable")
    staying = [row for row in summary.rows if not row.removable]
    shown = staying if limit is None else staying[:limit]
    for row in (*(r for r in summary.rows if r.removable), *shown):
        fate = Text("yes", "green") if row.removable else Text(f"no: {row.reason}", "dim")
        name = Text(row.name, "bold" if row.removable else "")
        table.add_row(name, row.level, quantity(row.params), quantity(row.macs), fate)
    if len(shown) < len(staying):
        table.add_row(Text(f"… and {len(staying) - len(shown)} more that stay", "dim"), "", "", "", "")
    for note in summary.notes:
        table.add_row(Text(f"note: {note}", "yellow"), "", "", "", "")
    return table


def results_table(networks: Mapping[str, Measurement]) -> Table:
    """Before and after."""
    table = Table(title="Before and after", title_justify="left", title_style="bold", header_style="dim", box=None)
    table.add_column("")
    for name in networks:
        table.add_column(name, justify="right")
    table.add_column("change", justify="right", style="bold")
    for row in before_and_after(networks):
        table.add_row(*row)
    return table


def checks_table(checks: Sequence[Check]) -> Table:
    """What was compared, the largest difference found, and whether it holds."""
    table = Table(title="Checks", title_justify="left", title_style="bold", header_style="dim", box=None)
    table.add_column("")
    table.add_column("max |difference|", justify="right")
    table.add_column("allowed", justify="right")
    table.add_column("")
    for name, _, found, allowed, good in check_rows(checks):
        table.add_row(name, found, allowed, Text("holds", "green") if good else Text("FAILS", "bold red"))
    return table


class LiveTraining:
    """A live display of a training; where the output is no terminal, a line at every accuracy.

    >>> with LiveTraining(history, total=600, console=Console()) as live:  # doctest: +SKIP
    ...     live.update(Step(step=1, phase="warmup", loss=2.3, lr=0.1, zero=0))
    """

    def __init__(self, history: History, total: int, console: Console):
        self.history, self.console = history, console
        self._started = time.perf_counter()
        self._accuracy: float | None = None
        self._bar = Progress(
            TextColumn("{task.description:<17}"),
            BarColumn(bar_width=36),
            TextColumn("step {task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._task: TaskID = self._bar.add_task("warm-up", total=total)
        self._live = Live(self._bar, console=console, refresh_per_second=8, transient=False)

    def __enter__(self) -> "LiveTraining":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def update(self, step: Step) -> None:
        """Note a step and show it."""
        self.history.add(step)
        if step.accuracy is not None:
            self._accuracy = step.accuracy
        if self.console.is_terminal:
            self._bar.update(self._task, completed=step.step, description=PHASES.get(step.phase, step.phase))
            self._live.update(Group(self._bar, self._words(step)))
        elif step.accuracy is not None:
            seconds = time.perf_counter() - self._started
            self.console.print(
                f"{PHASES.get(step.phase, step.phase):<17} step {step.step:>5}  "
                f"{self._words(step).plain.strip()}  {seconds:5.1f} s",
                soft_wrap=True,
            )

    def _words(self, step: Step) -> Text:
        accuracy = "–" if self._accuracy is None else f"{100 * self._accuracy:.1f} %"
        done = step.zero >= self.history.target
        return Text.assemble(
            ("loss ", "dim"), f"{step.loss:.4f}", ("   validation accuracy ", "dim"), accuracy,
            ("   lr ", "dim"), f"{step.lr:.4f}",
            ("   zero structures ", "dim"),
            (f"{step.zero}/{self.history.target}", "bold green" if done else "bold"),
        )  # fmt: skip
