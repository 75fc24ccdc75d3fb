"""Pruned linear layers in torch's compressed row layout, where that runs faster."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn


class SparseLinear(nn.Module):
    """A linear layer for inference whose weight is stored as compressed sparse rows (CSR).

    >>> layer = nn.Linear(4, 2)
    >>> torch.allclose(SparseLinear(layer)(torch.ones(3, 4)), layer(torch.ones(3, 4)))
    True

    Input [..., in_features], output [..., out_features]. Stored are three buffers (row starts, columns, values: 8
    bytes per nonzero in float32 and 4 per row), so that `state_dict` holds no zeros. `torch.export` and ONNX have no
    such layout: what they export makes the dense weight from the buffers.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        with warnings.catch_warnings():  # that the layout is in beta
            warnings.simplefilter("ignore")
            weight = layer.weight.detach().to_sparse_csr()
        self.register_buffer("rows", weight.crow_indices().int())  # the type that the CPU's library takes
        self.register_buffer("columns", weight.col_indices().int())
        self.register_buffer("values", weight.values().clone())  # no view, which no exporter takes
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return nn.functional.linear(x, self.dense(), self.bias)
        size = (self.out_features, self.in_features)
        weight = torch.sparse_csr_tensor(self.rows, self.columns, self.values, size, check_invariants=False)
        y = (weight @ x.reshape(-1, self.in_features).t()).t().reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def dense(self) -> Tensor:
        """The weight with its zeros, [out_features, in_features], by operators that export formats have.

        >>> layer = nn.Linear(4, 2)
        >>> SparseLinear(layer).dense().equal(layer.weight)
        True
        """
        count, bounds = len(self.values), self.rows[1:-1].long()
        starts = torch.zeros(count + 1, dtype=torch.int64, device=bounds.device)
        row = starts.scatter_add(0, bounds, torch.ones_like(bounds)).cumsum(0)[:count]
        flat = self.values.new_zeros(self.out_features * self.in_features)
        flat = flat.scatter(0, row * self.in_features + self.columns.long(), self.values)
        return flat.view(self.out_features, self.in_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, nonzeros={len(self.values)}"


def sparse_layout(
    model: nn.Module,
    args: tuple[Any, ...] | Tensor,
    where: Literal["faster", "always"] = "faster",
    repeats: int = 20,
) -> nn.Module:
    """A copy of a pruned model for inference with `SparseLinear` layers where these are faster on inputs like `args`.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    >>> _ = model[0].weight.data.fill_diagonal_(0).tril_()
    >>> type(sparse_layout(model, torch.ones(2, 8), where="always")[0]).__name__
    'SparseLinear'

    Each linear layer that is at least half zeros is timed both ways on the input that it gets (the best of `repeats`
    runs). Torch has no sparse convolution on the CPU, so convolutions stay dense, and so do layers of a type that it
    has no sparse product for (bfloat16 on the CPU); there "always" raises a ValueError that names the layer. The copy
    is in eval mode.
    """
    if where not in ("faster", "always"):
        raise ValueError(f"where={where!r}: 'faster' or 'always'")
    model = copy.deepcopy(model).eval()
    inputs: dict[str, Tensor] = {}
    chosen = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and (m.weight == 0).float().mean() >= 0.5}

    def note(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[name] = args[0].detach()

    handles = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in chosen.items()]
    with torch.no_grad():
        model(*(args if isinstance(args, tuple) else (args,)))
        for handle in handles:
            handle.remove()
        for name, layer in chosen.items():
            if name not in inputs:
                continue
            sparse, x = SparseLinear(layer), inputs[name]
            if not _runs(sparse, x):
                if where == "always":
                    raise ValueError(
                        f"'{name}': torch has no product of compressed rows in {x.dtype} on {x.device.type}; "
                        "where='faster' leaves such layers dense, float32 has one"
                    )
                continue
            fast = where == "always" or seconds(partial(sparse, x), repeats) < seconds(partial(layer, x), repeats)
            if fast:
                if not name:
                    return sparse
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, sparse)
    return model


def _runs(layer: SparseLinear, x: Tensor) -> bool:
    try:
        layer(x)
    except (NotImplementedError, RuntimeError):  # some builds of torch raise the one, some the other
        return False
    return True


def seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """The shortest wall time of `repeats` calls, in seconds, after one that is not counted."""
    call()
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best
