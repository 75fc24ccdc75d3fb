"""The matrix A of mini-batch gradients, from which all curvature here is built."""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from espalier.curvature import ranks
from espalier.curvature.batches import Pair as Pair
from espalier.curvature.batches import after, mapped, mini_batches, samples, taken
from espalier.curvature.batches import as_loader as as_loader
from espalier.curvature.batches import is_pair as is_pair
from espalier.curvature.explain import explanation
from espalier.curvature.layout import Predicate, WeightLayout, convolution_and_linear
from espalier.curvature.memory import check_room
from espalier.curvature.options import GradientOptions as GradientOptions
from espalier.curvature.options import checked_path
from espalier.curvature.plan import PROBE, Plan, Probe, make_plan
from espalier.curvature.rows import Loss
from espalier.curvature.watch import agreed, watching


@dataclass(frozen=True)
class Gradients:
    """A [n, p], the weights w̄ [p] at which it was taken, and the layout of the p weights.

    `batch` is the number of samples averaged in each row; `mean_loss` the mean loss over all of them.
    Under torch.distributed each rank computes `first_row` onwards of the `total_rows` rows; with a path, A is the one
    file that all ranks of the machine write, and holds all rows.
    """

    A: Tensor
    w_bar: Tensor
    layout: WeightLayout
    batch: int
    mean_loss: float
    first_row: int = 0
    total_rows: int = 0

    def gathered(self) -> Gradients:
        """All rows on every rank; itself where it has them already. MemoryError, before, where they do not fit.

        >>> found = gradients(nn.Linear(3, 2).eval(), nn.functional.mse_loss, (torch.ones(4, 3), torch.ones(4, 2)), 4)
        >>> found.gathered() is found
        True
        """
        if ranks.everywhere(self.A.shape[0] == self.total_rows):
            return self
        with agreed():
            check_room(self.total_rows, self.A.shape[1], GradientOptions(0, self.A.dtype))
        return replace(self, A=ranks.gather(self.A, self.total_rows), first_row=0)


def gradients(
    model: nn.Module,
    loss: Loss,
    data: Any,
    n: int,
    batch: int = 1,
    prunable: Predicate = convolution_and_linear,
    options: GradientOptions | None = None,
) -> Gradients:
    """Gradients of the loss of n mini-batches of `batch` samples each.

    >>> model = nn.Linear(3, 2, bias=False).eval()
    >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
    >>> gradients(model, nn.functional.cross_entropy, (x, y), n=4, batch=2).A.shape
    torch.Size([4, 6])

    `data` is a loader of (inputs, targets), or one such pair of tensors; its first n · batch samples are
    used in order, so shuffle it to draw other ones. Inputs (and targets) are tensors with one row per sample, or a
    tuple of them, the model's arguments, or a dict, its keyword arguments; NumPy arrays are taken as tensors.

    Row i is the gradient of loss(model(inputs of mini-batch i), targets), whatever the loss is; with
    ``reduction="sum"`` that is the sum over the mini-batch. Curvature and first-order terms built on A take it for a
    mean over samples, and only such a loss can be added up from parts where a row does not fit `memory_limit`. The
    first rows are compared with autograd before the fast methods are used for all (see `GradientOptions.method`).

    The model must be in eval mode: batch norm is frozen, as in A = [∇l₁(w̄), …, ∇lₙ(w̄)]ᵀ of the paper.
    Raises ValueError for a model in training mode, tied or frozen weights, n < 1, too little data, data that the model
    or the loss cannot take, or a gradient that is not finite; MemoryError (before anything is allocated) where A does
    not fit. Under torch.distributed all ranks raise what one of them raises.
    """
    options = options or GradientOptions()
    with agreed(), torch.enable_grad():
        n, batch = _count(n), _count(batch)
        layout = _checked(model, n, batch, prunable)
        first, last = _rank_rows(n)
        if options.path is not None:
            checked_path(options.path)
        check_room(last - first if options.path is None else n, layout.numel, options)
        pairs = after(as_loader(data), first * batch)
        head = taken(pairs, min(last - first, PROBE) * batch)
        if not head and not first and last:
            raise ValueError("the data is empty")
        plan = _plan(model, loss, layout, batch, head, options)
    parts = mini_batches(chain(head, pairs), 0, (last - first) * batch, plan.rows * batch if plan else 1)
    with _storage(n, first, last, layout.numel, options) as (A, own):
        cost = _cost(n, layout.numel, batch, options)
        with agreed(), torch.enable_grad(), watching(options.progress, lambda: cost) as watch:
            chunks = _Counted(parts, -(-(last - first) // (plan.rows if plan else 1)))
            total = _fill(own, model, loss, layout, batch, plan, watch(chunks, "gradients"), first)
        if last > first:
            _name_untouched(own, layout)
    average = ranks.mean(total, last - first)
    return Gradients(A, layout.flatten(model).cpu(), layout, batch, average, 0 if A.shape[0] == n else first, n)


def _count(number: int) -> int:
    try:
        return operator.index(number)
    except TypeError:
        raise ValueError(f"n or batch is {number!r}: both are whole numbers of at least 1") from None


def _checked(model: nn.Module, n: int, batch: int, prunable: Predicate) -> WeightLayout:
    if n < 1 or batch < 1:
        raise ValueError(f"n = {n} mini-batches of {batch} samples: both must be at least 1")
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(
            f"the model is in training mode ({training[0]}): per-sample gradients need frozen batch norm "
            "and no dropout. Call model.eval() first."
        )
    return WeightLayout.of(model, prunable)


def _plan(
    model: nn.Module, loss: Loss, layout: WeightLayout, batch: int, head: list[Any], options: GradientOptions
) -> Plan | None:
    """How to compute the rows, tried on the first; None where there is not one."""
    rows = min(PROBE, sum(samples(inputs) for inputs, _ in head) // batch)
    if rows == 0:
        return None
    device = next(model.parameters()).device
    inputs, targets = next(mini_batches(head, 0, rows * batch, rows * batch))
    inputs, targets = (mapped(lambda t: t.to(device), part) for part in (inputs, targets))
    return make_plan(Probe(model, loss, layout, inputs, targets, rows, batch), options)


def _fill(
    own: Tensor,
    model: nn.Module,
    loss: Loss,
    layout: WeightLayout,
    batch: int,
    plan: Plan | None,
    parts: Iterable[Any],
    first: int,
) -> float:
    """Compute this rank's rows of A; returns the sum of their losses."""
    device, done, total = next(model.parameters()).device, 0, 0.0
    for part in parts:
        assert plan is not None
        inputs, targets = (mapped(lambda t: t.to(device), tree) for tree in part)
        rows = samples(inputs) // batch
        try:
            found, mean = plan.compute(model, loss, layout, inputs, targets, rows)
        except Exception as error:
            why = explanation(model, loss, inputs, targets)
            if why is None:
                raise
            raise ValueError(f"mini-batches {first + done} to {first + done + rows - 1}: {why}") from error
        block = own[done : done + rows]
        for piece, columns in zip(found, block.split(layout.sizes, dim=1), strict=True):
            columns.copy_(piece.reshape(rows, -1))
        # a sum is not finite as soon as one value is not, and takes no mask of all values
        if not bool(torch.isfinite(torch.stack([piece.sum() for piece in found]).sum())):
            for bad in (~torch.isfinite(block)).any(dim=1).nonzero().flatten().tolist()[:1]:
                raise ValueError(
                    f"the gradient of mini-batch {bad + first + done} is not finite: the loss overflows on it"
                )
        done, total = done + rows, total + float(mean) * rows
    return total


@dataclass(frozen=True)
class _Counted:
    """Chunks and how many there will be, for the bar."""

    parts: Iterator[Any]
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return self.parts


def _cost(rows: int, p: int, batch: int, options: GradientOptions) -> str:
    size = rows * p * torch.empty(0, dtype=options.dtype).element_size()
    where = "in memory" if options.path is None else f"in {os.fspath(options.path)}"
    return (
        f"gradients: {rows} rows × {p:,} weights, {size / 2**30:.2f} GiB {where}; "
        f"{rows * batch:,} samples forward and backward"
    )


def _name_untouched(A: Tensor, layout: WeightLayout) -> None:
    """Say which whole tensors get no gradient: nothing in A tells what they are worth."""
    untouched, start = [], 0
    for name, size in zip(layout.names, layout.sizes, strict=True):
        block = A[:, start : start + size]
        if not bool(block[:1].any()) and not bool(block.any()):
            untouched.append(name)
        start += size
    if untouched:
        warnings.warn(
            f"no gradient reaches {', '.join(untouched)}: not used in the forward pass, or dead. Their columns of A "
            "are zero; leave them out with a `prunable` predicate if they are to stay.",
            stacklevel=3,
        )


def _rank_rows(n: int) -> tuple[int, int]:
    return ranks.rows_of(n, *ranks.world())


@contextmanager
def _storage(n: int, first: int, last: int, p: int, options: GradientOptions) -> Iterator[tuple[Tensor, Tensor]]:
    """A and this rank's rows of it: in memory the same, on disk one file for all ranks of the machine."""
    if options.path is None:
        A = torch.empty(last - first, p, dtype=options.dtype)
        yield A, A
        return
    path, part = Path(options.path), Path(f"{os.fspath(options.path)}.part")
    # NumPy has no bfloat16: its bits are stored as int16 and viewed
    kind = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.int16}[options.dtype]

    def on_disk(mode: Literal["w+", "r+"]) -> Tensor:
        try:
            return torch.from_numpy(np.memmap(part, dtype=kind, mode=mode, shape=(n, p))).view(options.dtype)
        except OSError as error:
            raise ValueError(f"A cannot be written to {path}: {error.strerror or error}") from error

    try:
        A = ranks.in_turn(lambda: on_disk("w+"), lambda: on_disk("r+"))
        yield A, A[first:last]
        ranks.meet()
        if ranks.world()[0] == 0:
            os.replace(part, path)  # the map stays with the file
        ranks.meet()
    except BaseException:
        part.unlink(missing_ok=True)
        raise
