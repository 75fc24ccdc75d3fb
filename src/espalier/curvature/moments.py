"""Second moments of what layers read, streamed in float64 over calibration batches of any length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from espalier.curvature.symmetric import add_symmetric
from espalier.curvature.watch import Watch, agreed, unwatched
from espalier.modes import evaluating


@dataclass
class Moments:
    """Running sums over samples (for convolutions: over output positions) of one layer's input columns.

    `gram` [d, d] is ``Σ h hᵀ``, `sums` [d] is ``Σ h``, `count` the number of columns h seen. Where the
    inputs are already changed by earlier pruning, `cross` [d, d] is ``Σ h_dense hᵀ``, `dense_gram` ``Σ
    h_dense h_denseᵀ`` and `dense_sums` ``Σ h_dense``. Memory O(d²); activations are not kept.

    >>> moments = Moments.zeros(3)
    >>> moments.add(torch.rand(10, 3))
    >>> moments.count
    10
    """

    gram: Tensor
    sums: Tensor
    count: int = 0
    cross: Tensor | None = None
    dense_gram: Tensor | None = None
    dense_sums: Tensor | None = None
    name: str = ""
    shared: bool = False  # the dense sums were measured before, on the same samples

    @classmethod
    def zeros(
        cls, columns: int, *, paired: bool = False, device: torch.device | str = "cpu", name: str = ""
    ) -> Moments:
        """Empty sums for `columns` input columns; `paired` also for the dense counterpart of every input."""

        def square() -> Tensor:
            return torch.zeros(columns, columns, dtype=torch.float64, device=device)

        def vector() -> Tensor:
            return torch.zeros(columns, dtype=torch.float64, device=device)

        if not paired:
            return cls(square(), vector(), name=name)
        return cls(square(), vector(), 0, square(), square(), vector(), name)

    def add(self, rows: Tensor, dense: Tensor | None = None) -> None:
        """Add samples: `rows` [B, d], and for paired moments the same samples' `dense` rows [B, d]."""
        rows = rows.detach().to(self.gram)
        total = rows.sum(0)
        if not bool(torch.isfinite(total).all()):  # NaN and infinity survive the sum
            raise ValueError(
                f"the input of {self.name or 'the layer'} holds NaN or infinity in a calibration batch "
                f"(after {self.count} good samples): check the data and the model in eval mode"
            )
        add_symmetric(self.gram, rows, rows)
        self.sums += total
        self.count += len(rows)
        if self.cross is not None and self.dense_gram is not None and self.dense_sums is not None:
            if dense is None or dense.shape != rows.shape:
                raise ValueError(f"paired moments of {self.name or 'a layer'} need dense rows of the same shape")
            dense = dense.detach().to(self.gram)
            self.cross.addmm_(dense.T, rows)
            if not self.shared:
                add_symmetric(self.dense_gram, dense, dense)
                self.dense_sums += dense.sum(0)

    def all_reduce(self) -> None:
        """Sum over all processes, if `torch.distributed` is initialised; otherwise do nothing."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        count = torch.tensor([self.count], dtype=torch.int64, device=self.gram.device)
        dense = () if self.shared else (self.dense_gram, self.dense_sums)
        for value in (self.gram, self.sums, count, self.cross, *dense):
            if value is not None:
                torch.distributed.all_reduce(value)
        self.count = int(count)


def input_rows(module: nn.Module, inputs: Tensor, name: str = "") -> Tensor:
    """What `module` reads as rows [samples, columns]: tokens for Linear, im2col patches for Conv.

    >>> input_rows(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(2, 3, 5, 5)).shape
    torch.Size([50, 27])

    The columns of a convolution are ordered like ``weight.flatten(1)``: all k² taps of a channel together.
    """
    if isinstance(module, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            raise ValueError(
                f"{name or 'the consumer'} is a grouped convolution ({module.groups} groups): a refit "
                "over its input channels is not defined; take the next dense layer as the consumer"
            )
        padding = module.padding
        if module.kernel_size == (1, 1) and padding == (0, 0):
            return inputs[:, :, :: module.stride[0], :: module.stride[1]].movedim(1, -1).flatten(0, 2)
        if padding == "same" or module.padding_mode != "zeros":
            pads = module._reversed_padding_repeated_twice
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            inputs, padding = functional.pad(inputs, pads, mode=mode), 0
        elif padding == "valid":
            padding = 0
        columns = functional.unfold(inputs, module.kernel_size, module.dilation, padding, module.stride)  # type: ignore[arg-type]
        return columns.movedim(1, -1).flatten(0, 1)
    raise TypeError(
        f"{name or 'the consumer'} is a {type(module).__name__}; its inputs can be refitted only where it "
        "is Linear or Conv2d"
    )


def input_columns(module: nn.Module) -> int:
    """Number of columns that `input_rows` gives."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(module).__name__} has no weight")
    return weight[0].numel()


@dataclass(frozen=True)
class MomentCost:
    """What an accumulation will cost per layer: `bytes` held, `flops` per sample (two per multiply-add)."""

    bytes: Mapping[str, int]
    flops: Mapping[str, int]

    def __str__(self) -> str:
        return (
            f"second moments of {len(self.bytes)} layers: {sum(self.bytes.values()) / 2**20:.1f} MiB, "
            f"{sum(self.flops.values()) / 1e6:.1f} MFLOP per sample besides the forward pass"
        )


def moment_cost(model: nn.Module, names: Sequence[str], example: Any, *, paired: bool = False) -> MomentCost:
    """Memory and work of `collect` before it starts; runs the `example` batch once, accumulating nothing.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> print(moment_cost(model, ["2"], torch.zeros(5, 4)))
    second moments of 1 layers: 0.0 MiB, 0.0 MFLOP per sample besides the forward pass
    """
    matrices = 3 if paired else 1
    held: dict[str, int] = {}
    work: dict[str, int] = {}

    def note(name: str, module: nn.Module, inputs: Tensor) -> None:
        columns = input_columns(module)
        positions = len(input_rows(module, inputs, name))
        held[name] = 8 * (matrices * columns**2 + 2 * columns)
        work[name] = work.get(name, 0) + 2 * matrices * columns**2 * positions // max(len(inputs), 1)

    with torch.no_grad(), evaluating(model), _tapped(model, names, note):
        call(model, example)
    return MomentCost(held, work)


@torch.no_grad()
def collect(
    model: nn.Module,
    names: Sequence[str],
    data: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    watch: Watch = unwatched,
) -> dict[str, Moments]:
    """Second moments of the inputs of the named Linear and Conv2d layers, all in one pass of `data`.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> collect(model, ["2"], [torch.rand(5, 4)])["2"].gram.shape
    torch.Size([8, 8])

    A batch is a tensor, or a tuple or list whose first element is the model's input (labels are not used),
    or a mapping of keyword arguments. The model runs in eval mode and is put back as it was. Sums are
    float64, on each layer's own device unless `device` says otherwise, and are added up over processes
    where `torch.distributed` is initialised; every process brings at least one batch, and an error on one is an
    error on all. Raises ValueError for an empty loader and for activations that are not finite.
    """
    found: dict[str, Moments] = {}

    def note(name: str, module: nn.Module, inputs: Tensor) -> None:
        if name not in found:
            found[name] = Moments.zeros(input_columns(module), device=device or inputs.device, name=name)
        found[name].add(input_rows(module, inputs, name))

    with agreed():
        with evaluating(model), _tapped(model, names, note):
            for batch in watch(data, "second moments"):
                call(model, batch)
        _reached(found, names)
    return _summed(found, names)


@torch.no_grad()
def collect_paired(
    dense: nn.Module,
    pruned: nn.Module,
    names: Sequence[str],
    data: Iterable[Any],
    *,
    known: Mapping[str, Moments] | None = None,
    watch: Watch = unwatched,
) -> dict[str, Moments]:
    """Moments of a model in the making, paired with the dense model's inputs of the same layers and samples.

    Both models must give the named layers inputs of the same shape (removed units as zeros). `known` are the
    dense model's moments on the same data, as `collect` gave them, which saves measuring them again.
    """
    found: dict[str, Moments] = {}
    seen: dict[str, Tensor] = {}

    def remember(name: str, module: nn.Module, inputs: Tensor) -> None:
        seen[name] = input_rows(module, inputs, name)

    def note(name: str, module: nn.Module, inputs: Tensor) -> None:
        if name not in found:
            found[name] = Moments.zeros(input_columns(module), paired=True, device=inputs.device, name=name)
            if known is not None:
                before = known[name]
                found[name].dense_gram, found[name].dense_sums = before.gram, before.sums
                found[name].shared = True
        found[name].add(input_rows(module, inputs, name), seen.pop(name))

    with agreed():
        with (
            evaluating(dense),
            evaluating(pruned),
            _tapped(dense, names, remember, last=True),
            _tapped(pruned, names, note, last=True),
        ):
            for batch in watch(data, f"what reaches {', '.join(names)} as pruned so far"):
                call(dense, batch)
                call(pruned, batch)
        _reached(found, names)
    return _summed(found, names)


def call(model: nn.Module, batch: Any) -> Any:
    """Run `model` on a batch as loaders give it; ends early where a hook needs nothing further."""
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(batch[0] if isinstance(batch, tuple | list) else batch)
    except _Done:
        return None


class _Done(Exception):
    pass


@contextmanager
def _tapped(model: nn.Module, names: Sequence[str], note: Callable[[str, nn.Module, Tensor], None], last: bool = False):
    """Call `note` on every input of the named layers; with `last`, end the pass after the only one."""
    handles = []
    for name in names:
        module = model.get_submodule(name)

        def hook(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            note(name, module, args[0])
            if last and len(names) == 1:
                raise _Done

        handles.append(module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reached(found: Mapping[str, Moments], names: Sequence[str]) -> None:
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"no calibration sample reached {', '.join(missing)}: the loader is empty, or the model does "
            "not call these layers"
        )


def _summed(found: dict[str, Moments], names: Sequence[str]) -> dict[str, Moments]:
    """Over all processes, layer by layer in one order."""
    for name in names:
        found[name].all_reduce()
    return found
