"""Progress over passes of calibration data, shown where somebody looks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Watch = Callable[[Iterable[Any], str], Iterable[Any]]


def unwatched(batches: Iterable[Any], title: str) -> Iterable[Any]:
    """The batches themselves.

    >>> list(unwatched([1, 2], "pass"))
    [1, 2]
    """
    return batches


@contextmanager
def watching(show: bool | None, first: Callable[[], str]) -> Iterator[Watch]:
    """Say what ``first()`` returns, then show a bar for every pass of the data that goes through the watch.

    >>> with watching(False, lambda: "8 MiB") as watch:
    ...     list(watch([1, 2], "second moments"))
    [1, 2]

    ``show`` None shows it on a terminal only (on standard error, and on the first rank of several); with False
    ``first`` is not called.
    """
    if show is None:
        show = sys.stderr.isatty()
    if not show or _rank() > 0:
        yield unwatched
        return
    console = Console(stderr=True)
    console.print(first())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:

        def watch(batches: Iterable[Any], title: str) -> Iterator[Any]:
            task = bar.add_task(title, total=len(batches) if hasattr(batches, "__len__") else None)  # type: ignore[arg-type]
            for batch in batches:
                yield batch
                bar.advance(task)
            bar.remove_task(task)

        yield watch


def _rank() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if ready else 0


@contextmanager
def agreed() -> Iterator[None]:
    """An error on one process is the same error on all, rather than a wait for sums that never come.

    >>> with agreed():
    ...     pass

    Every process must come through here as often as the others. Where one of them has failed, the others raise its
    error too: of the same type where that is a usual one, else a RuntimeError, and with its number before the text.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gpu = torch.distributed.get_backend() == "nccl"
        failed = torch.tensor([int(problem is not None)], device="cuda" if gpu else "cpu")
        torch.distributed.all_reduce(failed)
        if int(failed):
            problem = _first_of_all(problem)
    if problem is not None:
        raise problem


_KINDS = {kind.__name__: kind for kind in (ValueError, TypeError, MemoryError, RuntimeError)}


def _first_of_all(problem: Exception | None) -> Exception:
    """This process's own error, else that of the first process that has one."""
    mine = None if problem is None else (type(problem).__name__, str(problem))
    found: list[tuple[str, str] | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    if problem is not None:
        return problem
    rank, (kind, text) = next((rank, said) for rank, said in enumerate(found) if said is not None)
    return _KINDS.get(kind, RuntimeError)(f"process {rank} of {len(found)}: {text}")
