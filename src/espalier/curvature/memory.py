"""Whether an n × p matrix fits, said before anything is allocated."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

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


def sample_bytes(model: nn.Module, sample: Tensor) -> int:
    """Bytes that one sample's forward and backward pass holds at once, measured by running the forward pass.

    >>> sample_bytes(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(1, 4)) > 0
    True

    Counted are the tensors that autograd keeps for the backward pass (parameters aside), the largest unfolded input of
    a convolution, which per-layer products make for a moment, and as much again for gradients on the way.
    """
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    held: dict[int, int] = {}
    patches, handles = [0], []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    def unfolded(module: nn.Module, _: object, output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        patches.append(weight[0].numel() * output[0, 0].numel() * output.element_size())

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(unfolded))
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.enable_grad():
            output = model(sample.clone())  # a view would count for all that it is a view of
        del output
    finally:
        for handle in handles:
            handle.remove()
    return 2 * sum(held.values()) + max(patches)


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
