"""How gradients are computed and kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

Method = Literal["auto", "layers", "vmap", "loop"]
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class GradientOptions:
    """How gradients are computed and kept.

    >>> GradientOptions(memory_limit=256 << 20, dtype=torch.bfloat16).method
    'auto'

    memory_limit: bytes that the working memory of one chunk may take beyond the model, the data and A itself: the
    chunk's gradients before they are copied into A, and what its forward and backward pass holds. The tensors of the
    first rows are measured and counted twice, for what kernels and the allocator take besides. One sample is the least
    that is worked on; a row that averages more samples than fit is added up from parts.
    dtype: storage of A: float32, bfloat16 (half the bytes read per solve), or float64 (tests).
    path: file for a memory-mapped A; None keeps it in memory. It appears under this name once it is complete.
    method: "layers" (per-layer products; Linear and Conv2d only), "vmap", "loop" (one backward per row, the
    definition), or "auto", which falls back from one to the next, with a warning that says why.
    progress: say the cost before the start and show a bar; None: where standard error is a terminal.
    """

    memory_limit: int = 1 << 30
    dtype: torch.dtype = torch.float32
    path: str | Path | None = None
    method: Method = "auto"
    progress: bool | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method={self.method!r}: one of {', '.join(map(repr, get_args(Method)))}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype}: A is stored in one of {', '.join(map(str, DTYPES))}")
        if not isinstance(self.memory_limit, int) or self.memory_limit < 0:
            raise ValueError(f"memory_limit={self.memory_limit!r}: a whole number of bytes, such as 1 << 30")


def checked_path(path: str | Path) -> Path:
    """The path, if a file can be put there; ValueError, before any work, if not.

    >>> checked_path("A.bin").name
    'A.bin'
    """
    path = Path(path)
    folder = path.resolve().parent
    if path.is_dir():
        raise ValueError(f"path={str(path)!r} is a folder: name a file in it, such as {str(path / 'A.bin')!r}")
    if not folder.is_dir():
        raise ValueError(f"path={str(path)!r}: there is no folder {folder}; create it first")
    return path
