"""Every example with gates of its own: by ``torch.func.vmap``, or one after the other where vmap cannot."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils import _pytree as pytree

from espalier.errors import TrainingError
from espalier.sparsify.examples import refuse_batch_norms
from espalier.sparsify.passes import frozen_statistics, same_noise

Run = Callable[[Tensor, Any, Any, bool], Any]


class PerSample:
    """``run(gates [V], args, kwargs, vmapped)`` of a batch of one, for every row of ``z`` [B, V] with its example.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> each = PerSample(model, lambda gates, args, kwargs, vmapped: model(args[0] * gates))
    >>> each(torch.eye(2), (torch.ones(2, 2),), {}).shape
    torch.Size([2, 1])

    Every tensor among the arguments has the batch first; what is no tensor is the same for all. Whether vmap knows all
    operators is tried once (once per mode), with two examples; where it does not, a warning says so and B calls of one
    example each take its place. Raises :class:`TrainingError` for batch norms in training mode, and for inputs whose
    first dimension is not B.
    """

    def __init__(self, model: nn.Module, run: Run):
        self._model, self._run = model, run
        self._vmaps: dict[bool, bool] = {}  # by the model's mode

    def __call__(self, z: Tensor, args: Any, kwargs: Any) -> Any:
        training = self._model.training
        refuse_batch_norms(self._model)
        leaves, form = pytree.tree_flatten((args, kwargs))
        for leaf in leaves:
            if isinstance(leaf, Tensor) and (not leaf.ndim or len(leaf) != len(z)):
                raise TrainingError(
                    f"per_sample=True draws gates for {len(z)} examples, but an input has shape {tuple(leaf.shape)}: "
                    "give backward() the batch_size, and every input the batch first; or take per_sample=False."
                )
        if training not in self._vmaps:
            two = [leaf[:2] if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            self._vmaps[training] = self._try(z[:2], two, form)
        return self._together(z, leaves, form) if self._vmaps[training] else self._in_turn(z, leaves, form)

    @torch.no_grad()
    def _try(self, z: Tensor, leaves: list[Any], form: pytree.TreeSpec) -> bool:
        with same_noise(self._model), frozen_statistics(self._model):
            try:
                self._together(z, leaves, form)
            except (RuntimeError, ValueError) as error:  # what vmap raises for an operator that it does not know
                self._in_turn(z[:1], leaves, form)  # an error of the model's own is raised here
                reason = str(error).strip().split("\n")[0]
                warnings.warn(
                    f"per_sample=True: vmap cannot run {type(self._model).__name__} ({reason}), so that every example "
                    "is a call of its own: a step costs about as many passes as the batch has examples. "
                    "per_sample=False needs one.",
                    stacklevel=2,
                )
                return False
        return True

    def _together(self, z: Tensor, leaves: list[Any], form: pytree.TreeSpec) -> Any:
        dims = (0, *(0 if isinstance(leaf, Tensor) else None for leaf in leaves))
        return vmap(lambda gates, *row: self._one(gates, row, form, True), dims, randomness="different")(z, *leaves)

    def _in_turn(self, z: Tensor, leaves: list[Any], form: pytree.TreeSpec) -> Any:
        rows = [[leaf[i] if isinstance(leaf, Tensor) else leaf for leaf in leaves] for i in range(len(z))]
        made = [self._one(gates, row, form, False) for gates, row in zip(z, rows, strict=True)]
        columns = zip(*(pytree.tree_leaves(one) for one in made), strict=True)
        joined = [torch.stack(c) if isinstance(c[0], Tensor) else c[0] for c in columns]
        return pytree.tree_unflatten(joined, pytree.tree_structure(made[0]))

    def _one(self, gates: Tensor, row: Any, form: pytree.TreeSpec, vmapped: bool) -> Any:
        alone = [leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf for leaf in row]
        args, kwargs = pytree.tree_unflatten(alone, form)
        out = self._run(gates, args, kwargs, vmapped)
        return pytree.tree_map_only(Tensor, lambda t: t.squeeze(0), out)
