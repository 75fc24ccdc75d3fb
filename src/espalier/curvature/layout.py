"""Which weights are prunable, and how they lie in one long vector."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

Predicate = Callable[[str, nn.Module, nn.Parameter], bool]
"""Called with the parameter's dotted name, the module that owns it, and the parameter."""

_DENSE = (nn.Linear, nn.modules.conv._ConvNd)


def convolution_and_linear(name: str, module: nn.Module, parameter: nn.Parameter) -> bool:
    """Take the ``weight`` of every convolution and linear layer; no biases, no norms.

    >>> layer = nn.Linear(2, 3)
    >>> convolution_and_linear("fc.weight", layer, layer.weight)
    True
    """
    return isinstance(module, _DENSE) and name.rpartition(".")[2] == "weight"


@dataclass(frozen=True)
class WeightLayout:
    """Names and shapes of the prunable weights, in the order in which they are concatenated.

    >>> layout = WeightLayout.of(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).eval())
    >>> layout.names, layout.numel
    (('0.weight', '2.weight'), 9)
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: nn.Module, prunable: Predicate = convolution_and_linear) -> WeightLayout:
        """Collect what `prunable` accepts; tied, frozen or missing weights are errors."""
        chosen: dict[str, nn.Parameter] = {}
        owner: dict[int, str] = {}
        for prefix, module in model.named_modules(remove_duplicate=False):
            for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                name = f"{prefix}.{leaf}" if prefix else leaf
                first = owner.setdefault(id(parameter), name)
                accepted = prunable(name, module, parameter)
                if first != name and (accepted or first in chosen):
                    raise ValueError(
                        f"{first} and {name} are one tied tensor; a mask on one would silently prune "
                        "the other. Untie them, or leave both out with the `prunable` predicate."
                    )
                if accepted:
                    chosen[name] = parameter
        frozen = [name for name, parameter in chosen.items() if not parameter.requires_grad]
        if frozen:
            raise ValueError(
                f"frozen weights cannot be pruned: {', '.join(frozen)}. Call requires_grad_(True) on "
                "them, or leave them out with the `prunable` predicate."
            )
        if not chosen:
            raise ValueError("the `prunable` predicate accepts no parameter of this model")
        return cls(tuple(chosen), tuple(tuple(p.shape) for p in chosen.values()))

    @property
    def sizes(self) -> list[int]:
        """Number of weights per tensor."""
        return [prod(shape) for shape in self.shapes]

    @property
    def numel(self) -> int:
        """Number of prunable weights p."""
        return sum(self.sizes)

    def flatten(self, tensors: nn.Module | Mapping[str, Tensor]) -> Tensor:
        """Concatenate the weights of a model or mapping into a detached vector of length p."""
        found = dict(tensors.named_parameters()) if isinstance(tensors, nn.Module) else tensors
        return torch.cat([found[name].detach().reshape(-1) for name in self.names])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Cut a vector of length p back into named tensors (views of it)."""
        if vector.numel() != self.numel:
            raise ValueError(f"expected {self.numel} values, got {vector.numel()}")
        parts = vector.split(self.sizes)
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def holds(self, names: Collection[str]) -> Tensor:
        """Which of the p weights belong to these tensors, bool [p].

        >>> WeightLayout(("a", "b"), ((2,), (1,))).holds({"a"})
        tensor([ True,  True, False])
        """
        return torch.repeat_interleave(torch.tensor([n in names for n in self.names]), torch.tensor(self.sizes))

    def tensor_index(self) -> Tensor:
        """For each of the p weights, the index of its tensor (int64): the cells of a per-layer budget."""
        return torch.repeat_interleave(torch.arange(len(self.names)), torch.tensor(self.sizes))

    def write(self, model: nn.Module, vector: Tensor) -> None:
        """Copy a vector of length p into the model's weights."""
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self.unflatten(vector).items():
                parameters[name].copy_(value)
