"""docs/results/zoo.md from the records of zoo.py."""
from pathlib import Path
from typing import Any
def write(path: Path, names: list[str], records: dict[tuple[str, str], dict[str, Any]]) -> None:
    pass
