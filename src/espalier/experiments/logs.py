"""The log of a run: JSON lines, and TensorBoard's format where its package is installed."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

__all__ = ["Log", "forget_after", "tensorboard_missing"]

MISSING = "No TensorBoard log: it needs a package of its own. pip install 'espalier[experiments]'"


def tensorboard_missing() -> str:
    """'' where TensorBoard's format can be written, else what to install."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        return MISSING
    return ""


def forget_after(path: Path, key: str, last: int) -> None:
    """Drop the lines of a log whose ``key`` is beyond ``last``: those of a killed run that its checkpoint does not
    know, among them a line that was cut short.
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() and last else []
    path.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)[key] <= last))


class Log:
    """Appends to ``log.jsonl`` and ``tensorboard/`` of a folder; lines after ``step`` are dropped."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        forget_after(self.path, "step", step)
        self.writer: Any = None
        if not tensorboard_missing():
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, **values: Any) -> None:
        """One line; numbers go to TensorBoard, too."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush what is buffered."""
        if self.writer is not None:
            self.writer.close()


def explain_logs(console: Console) -> None:
    """Say once where TensorBoard's format is missing."""
    words = tensorboard_missing()
    if words:
        console.print(f"[yellow]{words.replace('[', chr(92) + '[')}[/]")
