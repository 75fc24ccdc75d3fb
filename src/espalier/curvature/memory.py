"""Whether an n × p matrix fits, said before anything is allocated."""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from espalier.curvature.batches import Tree, apply, mapped
from espalier.curvature.options import GradientOptions


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


def sample_bytes(model: nn.Module, sample: Tree) -> int:
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
            output = apply(model, mapped(torch.clone, sample))  # a view would count for all that it is a view of
        del output
    finally:
        for handle in handles:
            handle.remove()
    return 2 * sum(held.values()) + max(patches)


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at once: what torch itself allocates, not its kernels' scratch.

    >>> with PeakBytes() as peak:
    ...     x = torch.ones(1000)
    ...     y = x + x
    ...     del x, y
    ...     z = torch.ones(10)
    >>> peak.bytes
    8000
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self._now = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = _storages((args, kwargs))  # held, so that no id is given out twice
        known = {id(storage) for storage in given}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            key = id(storage)
            if key not in known and key not in self._live:  # not a view
                self._live[key] = storage.nbytes()
                self._now += self._live[key]
                self.bytes = max(self.bytes, self._now)
                weakref.finalize(storage, self._freed, key)
        return out

    def _freed(self, key: int) -> None:
        self._now -= self._live.pop(key)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def check_room(rows: int, p: int, options: GradientOptions) -> None:
    """Raise MemoryError, naming what would fit, when `rows` × `p` values do not."""
    size = torch.empty(0, dtype=options.dtype).element_size()
    needed = rows * p * size
    if options.path is not None:
        folder = Path(options.path).resolve().parent
        room = shutil.disk_usage(folder).free
        where = f"on the disk of {folder}"
    else:
        free = available_memory()
        if free == 0:  # the system does not say
            return
        if needed and free < options.memory_limit:
            raise MemoryError(
                f"memory_limit = {spelled(options.memory_limit)} is more than the {spelled(free)} that are free: lower "
                f"it. A of n = {max(0, free - (1 << 30)) // (p * size)} rows would fit beside a limit of 1 GiB"
            )
        room = free - options.memory_limit
        where = f"in memory (beside the working memory of {spelled(options.memory_limit)})"
    if needed > room:
        raise MemoryError(
            f"A of {rows} × {p:,} values needs {spelled(needed)}, but {spelled(room)} are free {where}. "
            f"n = {room // (p * size)} would fit; dtype=torch.bfloat16 halves float32; path=… keeps A on disk."
        )


def check_store(needed: int, what: str, instead: str) -> None:
    """Raise MemoryError, before anything is allocated, where `what` takes more bytes than are free.

    >>> check_store(1 << 60, "a second A", "use DualInverse")
    Traceback (most recent call last):
    MemoryError: a second A needs 1073741824.00 GiB, but ... GiB are free in memory: use DualInverse
    """
    free = available_memory()
    if free and needed > free:
        raise MemoryError(f"{what} needs {spelled(needed)}, but {spelled(free)} are free in memory: {instead}")


def spelled(count: int) -> str:
    """A number of bytes for a message.

    >>> spelled(3 << 29), spelled(5 << 20)
    ('1.50 GiB', '5.0 MiB')
    """
    return f"{count / 2**30:.2f} GiB" if count >= 1 << 26 else f"{count / 2**20:.1f} MiB"
