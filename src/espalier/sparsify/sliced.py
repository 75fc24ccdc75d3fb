"""The narrow network that gates on layers leave, with ordinary layers of the sizes that remain."""

import copy

from torch import Tensor, nn

from espalier.errors import TrainingError
from espalier.sparsify.gates import Gates


class Select(nn.Module):
    """Takes some features of its input, along ``dim``: [B, C, ...] → [B, len(index), ...]."""

    index: Tensor

    def __init__(self, index: Tensor, dim: int = 1):
        super().__init__()
        self.dim = dim
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(self.dim, self.index)


def sliced(gates: Gates) -> nn.Module:
    """A copy of the gated network without its closed units, kept gates folded into the weights (Eqs. 13 and
    14).

    >>> import torch
    >>> from espalier.sparsify import input_gates
    >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> gates = Gates(model, [input_gates(model, "2", producer="0")], initial=0.5, seed=1)
    >>> _ = gates(torch.randn(3, 4))
    >>> small = sliced(gates)
    >>> small[0].out_features == small[2].in_features == gates.open_counts()["2"]
    True

    Its output equals the gated network's in eval mode. Where features must be picked from an input that no
    layer narrows (the network's own input, a flattened image), a ``Select`` stands before the layer.
    Structure gates are not sliced: use ``finish`` and ``construct``. Raises :class:`TrainingError` if a layer keeps
    no unit, if other layers than those named by the sites read the gated units, and before the first ``gates(x)``.
    """
    folded = gates.folded()
    gates.need_narrow()
    is_open = gates.expected().detach() > 0
    kept = gates.narrowing.kept(is_open)
    empty = [name for (name, _), index in kept.items() if len(index) == 0]
    if empty:
        raise TrainingError(f"'{empty[0]}' keeps no unit at all: the network's output no longer depends on its input.")
    small = _without_hooks(gates)
    for path in dict.fromkeys(name.rpartition(".")[0] for name, _ in kept):
        layer = small.get_submodule(path)
        for name, _ in list(layer.named_parameters(recurse=False)):
            full = f"{path}.{name}"
            if full not in folded:
                continue
            narrow = folded[full]
            for dim in (0, 1):
                if (full, dim) in kept:
                    narrow = narrow.index_select(dim, kept[full, dim])
            setattr(layer, name, nn.Parameter(narrow.contiguous()))
        _resize(layer)
        full = f"{path}.weight"
        chosen = gates.narrowing.selection(full, is_open, kept) if (full, 1) in gates.narrowing.index else None
        if chosen is not None:
            features = 1 - folded[full].ndim  # from the end: linear layers take any number of dimensions before
            small.set_submodule(path, nn.Sequential(Select(chosen, features), layer))
    return small


def _without_hooks(gates: Gates) -> nn.Module:
    copied = copy.deepcopy(gates)
    copied.remove()
    return copied.model


def _resize(layer: nn.Module) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    else:
        layer.out_channels, layer.in_channels = weight.shape[:2]  # type: ignore[assignment]
