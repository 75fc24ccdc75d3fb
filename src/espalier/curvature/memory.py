"""Whether an n × p matrix fits, said before anything is allocated."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from espalier.curvature.gradients import GradientOptions


def available_memory() -> int:
    """Bytes of main memory that can be taken without swapping (0 where the system does not say)."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0


def check_room(rows: int, p: int, options: GradientOptions) -> None:
    """Raise MemoryError, naming what would fit, when `rows` × `p` values do not."""
    size = torch.empty(0, dtype=options.dtype).element_size()
    needed = rows * p * size
    if options.path is not None:
        folder = Path(options.path).resolve().parent
        room = shutil.disk_usage(folder).free
        where = f"on the disk of {folder}"
    else:
        room = available_memory() - options.memory_limit
        where = f"in memory (beside the working memory of {_gib(options.memory_limit)})"
    if room <= 0 and options.path is None and available_memory() == 0:
        return
    if needed > room:
        fits = max(room, 0) // (p * size)
        raise MemoryError(
            f"A of {rows} × {p:,} values needs {_gib(needed)}, but {_gib(max(room, 0))} are free {where}. "
            f"n = {fits} would fit; dtype=torch.bfloat16 halves float32; path=… keeps A on disk."
        )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
