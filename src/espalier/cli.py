"""The command line: ``espalier inspect``, ``demo``, ``data prepare``, ``nas`` and ``reproduce``."""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import Progress, TaskID

from espalier.demo import Demo, run
from espalier.errors import EspalierError
from espalier.experiments.reproduce import Reproduce, reproduce
from espalier.nas.commands import Nas


@dataclass(frozen=True)
class Inspect:
    """Print and draw the search space of a model."""

    factory: Annotated[str, tyro.conf.Positional]
    """package.module:name of a function or class that makes the model without arguments, or of the model
    itself. The current directory is importable."""
    input: tyro.conf.UseAppendAction[tuple[str, ...]]
    """Shape of an example input, the batch first: 1x3x32x32. Give the option once per input. A type follows
    a colon (1x16:int64), and a keyword argument's name precedes an equals sign (mask=1x16:bool)."""
    levels: tuple[str, ...] = ("segment",)
    """What may be removed."""
    keep: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Dotted path of a module that must stay, with all below it. Give the option once per module."""
    out: Path = Path("espalier.html")
    """Where to write the page with the drawings."""
    svg: bool = False
    """Write every drawing as an SVG file beside the page, too."""


@dataclass(frozen=True)
class Data:
    """Turn a published dataset into the arrays that the recipes read."""

    action: tyro.conf.Positional[Literal["prepare"]]
    """prepare: download what is missing, decode, write {train,test}-{images,labels}.npy."""
    name: tyro.conf.Positional[str]
    """Name of the dataset: cifar10, fashion-mnist, imagenet, ..."""
    root: Path | None = None
    """Folder of all datasets; by default what the environment variable ESPALIER_DATA names."""
    raw: Path | None = None
    """Folder of the published files, if they are at hand."""
    download: bool = True
    """Let torchvision fetch missing files."""


Command = (
    Annotated[Inspect, tyro.conf.subcommand("inspect", prefix_name=False)]
    | Annotated[Demo, tyro.conf.subcommand("demo", prefix_name=False)]
    | Annotated[Data, tyro.conf.subcommand("data", prefix_name=False)]
    | Annotated[Nas, tyro.conf.subcommand("nas", prefix_name=False)]
    | Annotated[Reproduce, tyro.conf.subcommand("reproduce", prefix_name=False)]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Exit status: 0, 1 (a check failed), 2 (an error), 130 (interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    console = Console(highlight=False)
    if arguments in (["--version"], ["-V"]):
        from espalier import __version__

        console.print(f"espalier {__version__}")
        return 0
    # torch's own pytree specs warn about themselves whenever one is copied
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*", category=FutureWarning)
    try:
        command = tyro.cli(
            Command,  # type: ignore[arg-type]
            prog="espalier",
            description="Train any PyTorch network once and get back the smaller network worth keeping. "
            "espalier --version tells the version.",
            args=arguments,
        )
        if isinstance(command, Demo):
            return 0 if run(command, console) else 1
        if isinstance(command, Data):
            _prepare(command, console)
            return 0
        if isinstance(command, Nas):
            from espalier.nas.commands import run as run_nas

            run_nas(command, console)
            return 0
        if isinstance(command, Reproduce):
            return 0 if reproduce(command, console) else 2
        from espalier.report.inspection import inspect

        inspect(command.factory, command.input, command.levels, command.keep, command.out, command.svg, console)
    except (EspalierError, OSError, ImportError) as error:
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {_plain(error)}", soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        Console(stderr=True, highlight=False).print("interrupted; what was written is whole.")
        return 130
    return 0


def _prepare(command: Data, console: Console) -> None:
    from espalier.data import prepare

    with Progress(console=console) as display:
        tasks: dict[str, TaskID] = {}

        def progress(split: str, done: int, total: int) -> None:
            if split not in tasks:
                tasks[split] = display.add_task(f"{command.name} {split}")
            display.update(tasks[split], completed=done, total=total)

        folder = prepare(command.name, command.root, command.raw, command.download, progress=progress)
    console.print(f"Arrays in {folder}")


def _plain(error: Exception) -> str:
    return str(error).replace("[", "\\[")


if __name__ == "__main__":
    sys.exit(main())
