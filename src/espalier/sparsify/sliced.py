"""The narrow network that gates on layers leave, with ordinary layers of the sizes that remain."""

import copy

import torch
from torch import Tensor, nn

from espalier.errors import TrainingError
from espalier.sparsify.gates import Gates


class Select(nn.Module):
    """Takes some features of its input: [B, C, ...] → [B, len(index), ...]."""

    index: Tensor

    def __init__(self, index: Tensor):
        super().__init__()
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.index)


def sliced(gates: Gates) -> nn.Module:
    """A copy of the gated network without its closed units, kept gates folded into the weights (Eqs. 13 and
    14).

    >>> from espalier.sparsify import input_gates
    >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> gates = Gates(model, [input_gates(model, "2", producer="0")], initial=0.5, seed=1)
    >>> small = sliced(gates)
    >>> small[0].out_features == small[2].in_features == gates.open_counts()["2"]
    True

    Its output equals the gated network's in eval mode. Where features must be picked from an input that no
    layer narrows (the network's own input, a flattened image), a ``Select`` stands before the layer.
    Structure
    gates are not sliced: use ``finish`` and ``construct``. Raises :class:`TrainingError` if a layer keeps no
        unit.
    """
    value = gates.expected().detach()
    is_open = value > 0
    kept = gates.narrowing.kept(is_open)
    empty = [name for (name, _), index in kept.items() if len(index) == 0]
    if empty:
        raise TrainingError(f"'{empty[0]}' keeps no unit at all: the network's output no longer depends on its input.")
    small = _without_hooks(gates)
    scale = {name: torch.ones_like(p) for name, p in small.named_parameters()}
    for site, gate in zip(gates.sites, gates.by_site(value).values(), strict=True):
        for part in site.scaled:
            if part.owner is not None and part.dim is not None:
                shape = [1] * scale[part.parameter].ndim
                shape[part.dim] = -1
                scale[part.parameter] *= gate[part.owner].view(shape)
    for path in dict.fromkeys(name.rpartition(".")[0] for name, _ in kept):
        layer = small.get_submodule(path)
        for name, p in list(layer.named_parameters(recurse=False)):
            full = f"{path}.{name}"
            narrow = p.detach() * scale[full]
            for dim in (0, 1):
                if (full, dim) in kept:
                    narrow = narrow.index_select(dim, kept[full, dim])
            setattr(layer, name, nn.Parameter(narrow.contiguous()))
        _resize(layer)
        full = f"{path}.weight"
        chosen = gates.narrowing.selection(full, is_open) if (full, 1) in gates.narrowing.index else None
        if chosen is not None:
            small.set_submodule(path, nn.Sequential(Select(chosen), layer))
    return small


def _without_hooks(gates: Gates) -> nn.Module:
    model = copy.deepcopy(gates.model)
    for site in gates.sites:
        layer = model.get_submodule(site.layer)
        layer._forward_hooks.clear()
        layer._forward_pre_hooks.clear()
    return model


def _resize(layer: nn.Module) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    else:
        layer.out_channels, layer.in_channels = weight.shape[:2]  # type: ignore[assignment]
