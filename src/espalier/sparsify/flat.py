"""All trained parameters as one flat vector with its groups: what ProxSGD and RMDA share."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from espalier.errors import TrainingError
from espalier.space.solution import Solution
from espalier.sparsify.frozen import Held
from espalier.sparsify.grouping import Grouping
from espalier.sparsify.prox import Runs
from espalier.sparsify.reading import first_difference, warn_of_norms
from espalier.sparsify.refusals import (
    FREE,
    WHOLE,
    at_least_zero,
    refuse_gradients,
    refuse_keys,
    refuse_parameters,
)

_copy, _zero = torch._foreach_copy_, torch._foreach_zero_  # pyright: ignore[reportPrivateImportUsage]


class FlatProximal(Optimizer):
    """Base of the proximal optimizers; a subclass writes ``_update(w, g)`` and returns a number per group, 0 where
    its solution is zero.

    Elements of no group form hidden groups, one per tensor, with μ = 0. Parameters of less than single precision are
    kept in single precision here and rounded into the model: small steps add up. A gradient that is not finite
    updates nothing: on a CPU the step raises, on an accelerator, where the host would have to wait for the answer,
    the next step or whatever reads the groups does. A step without any gradient does nothing, as in torch.optim.

    A parameter that is frozen later (``requires_grad_(False)``) holds still, whatever its gradient, and so does what
    is remembered of it; its group counts as zero only where its weights are zero. A group of which only a part is
    frozen stops the step. Where a gradient is None though the parameter is not frozen, it counts as zero: the group
    goes on shrinking.
    """

    def __init__(
        self,
        grouping: Grouping,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]] | None,
        defaults: dict[str, Any],
    ):
        self.grouping = grouping
        self._ready = False
        given = [p for p in grouping.model.parameters() if p.requires_grad] if params is None else list(params)
        if not given:
            raise TrainingError("no parameter to train: all are frozen (requires_grad=False), or params= is empty.")
        super().__init__(given, defaults)  # pyright: ignore[reportArgumentType]
        self._ready = True
        self.steps_done = 0
        self._tensors = [p for group in self.param_groups for p in group["params"]]
        self._name_parameters()
        self._check_tensors()
        self._check_values()
        self._sizes = [p.numel() for p in self._tensors]
        owners, hidden = [], len(grouping)
        for p in self._tensors:
            owner = grouping.owner.get(self._name(p), torch.tensor(-1)).cpu().expand(p.shape).flatten()
            if bool((owner < 0).any()):
                owner = torch.where(owner < 0, hidden, owner)
                hidden += 1
            owners.append(owner)
        device = self._tensors[0].device
        self.runs = Runs.of(torch.cat(owners).to(device), hidden)
        kind = torch.float64 if any(p.dtype == torch.float64 for p in self._tensors) else torch.float32
        self._w = torch.zeros(sum(self._sizes), dtype=kind, device=device)
        self._g = torch.zeros_like(self._w)
        rounds = any(p.dtype.itemsize < kind.itemsize for p in self._tensors)
        self._written = torch.full_like(self._w, float("nan")) if rounds else None
        self.dormant = torch.zeros(len(grouping), dtype=torch.long, device=device)
        self._waits = device.type == "cpu"
        self._finite: Tensor | None = None  # of the last step, where nobody waited for it
        self._host_before: dict[str, Tensor] = {}
        self._cache: dict[str, tuple[tuple[float, ...], Any]] = {}
        self._held: Held | None = None
        self._hold(tuple(i for i, p in enumerate(self._tensors) if not p.requires_grad))
        self._make_views()

    def _name_parameters(self) -> None:
        self._names = {id(p): name for name, p in self.grouping.model.named_parameters()}

    def _name(self, p: nn.Parameter) -> str:
        return self._names[id(p)]

    def _make_views(self) -> None:
        self._views, self._g_views = self._split(self._w), self._split(self._g)
        self._written_views = [] if self._written is None else self._split(self._written)

    def _split(self, flat: Tensor) -> list[Tensor]:
        return [v.view(p.shape) for v, p in zip(flat.split(self._sizes), self._tensors, strict=True)]

    # One step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; call it as any optimizer's."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_values()
        self._settle()
        grads = [p.grad if p.requires_grad else None for p in self._tensors]
        if all(grad is None for grad in grads):
            return loss
        w, g = self._gather(), self._gather_gradients(grads)
        if self._waits:
            self._check_finite(g)
            dormant = self._move(w, g)
        else:
            dormant = self._move_if_finite(w, g)
        self._scatter()
        self.dormant.copy_(dormant)
        self.steps_done += 1
        return loss

    def _move(self, w: Tensor, g: Tensor) -> Tensor:
        """Update ``w`` and the buffers; returns for how many steps every group has been zero."""
        held = self._held
        before = [] if held is None else [(t, t[held.at]) for t in (w, *self._memory())]
        decay = self.per_element("weight_decay")
        if isinstance(decay, Tensor) or decay:
            g = g.addcmul(w, decay) if isinstance(decay, Tensor) else g.add_(w, alpha=decay)
        zero = self._update(w, g)[: len(self.grouping)] == 0
        if held is not None:
            for tensor, values in before:
                tensor[held.at] = values
            zero = torch.where(held.groups, self.runs.sum(w.abs())[: len(self.grouping)] == 0, zero)
        return (self.dormant + 1).mul_(zero)

    def _move_if_finite(self, w: Tensor, g: Tensor) -> Tensor:
        """The same where all gradients are finite, else nothing, without waiting for the device to say which."""
        self._finite = (g.abs() <= self._largest()).all()
        before, old = {name: t.clone() for name, t in self._buffers().items()}, w.clone()
        dormant = self._move(w, g)
        w.copy_(torch.where(self._finite, w, old))
        self._host_before = {}
        for name, tensor in self._buffers().items():
            if tensor.device == w.device:
                tensor.copy_(torch.where(self._finite, tensor, before[name]))
            else:
                self._host_before[name] = before[name]
        return torch.where(self._finite, dormant, self.dormant)

    @abstractmethod
    def _update(self, w: Tensor, g: Tensor) -> Tensor:
        """Write the new parameters into ``w``; return a number per group [groups], 0 where its solution is zero."""

    def _memory(self) -> list[Tensor]:
        """What a subclass remembers of the past of every element [elements]."""
        return []

    def _hold(self, frozen: tuple[int, ...]) -> None:
        """Let the parameters at these places hold still, and no others."""
        if frozen != (() if self._held is None else self._held.tensors):
            parameters = {self._name(p): p.numel() for p in self._tensors}
            self._held = Held.of(frozen, parameters, self.runs, self.grouping.names) if frozen else None

    def _gather(self) -> Tensor:
        """The parameters as they are; in full precision those that are as they were written, rounded."""
        if self._written is None:
            _copy(self._views, self._tensors)
            return self._w
        fresh = torch.empty_like(self._w)
        _copy(self._split(fresh), self._tensors)
        return self._w.copy_(torch.where(fresh == self._written, self._w, fresh))

    def _gather_gradients(self, grads: list[Tensor | None]) -> Tensor:
        there = [(view, grad) for view, grad in zip(self._g_views, grads, strict=True) if grad is not None]
        if len(there) < len(grads):
            _zero([view for view, grad in zip(self._g_views, grads, strict=True) if grad is None])
        without = () if len(there) == len(grads) else [i for i, grad in enumerate(grads) if grad is None]
        self._hold(tuple(i for i in without if not self._tensors[i].requires_grad))
        try:
            _copy([view for view, _ in there], [grad for _, grad in there])
        except RuntimeError:
            sparse = [p for p in self._tensors if p.grad is not None and p.grad.layout != torch.strided]
            if not sparse:
                raise
            raise TrainingError(
                f"the gradient of '{self._name(sparse[0])}' is sparse: a group's norm needs all of it. Make the "
                "layer with sparse=False."
            ) from None
        return self._g

    def _scatter(self) -> None:
        _copy(self._tensors, self._views)
        if self._written is not None:
            _copy(self._written_views, self._tensors)

    def per_element(self, key: str, none: float = 0.0) -> Tensor | float:
        """A hyper-parameter of ``param_groups`` (``none`` for None): a number where all agree, else one per element."""
        values = tuple(none if group[key] is None else float(group[key]) for group in self.param_groups)
        if len(set(values)) == 1:
            return values[0]
        if self._cache.get(key, ((),))[0] != values:
            counts = torch.tensor([sum(p.numel() for p in group["params"]) for group in self.param_groups])
            made = torch.tensor(values, dtype=self._w.dtype).repeat_interleave(counts)
            self._cache[key] = (values, made.to(self._w.device))
        return self._cache[key][1]

    # Checks.

    def _check_values(self) -> None:
        """Raise for hyper-parameters out of their ranges; at the start and, as they may be set, at every step."""
        for group in self.param_groups:
            refuse_keys(WHOLE & group.keys(), type(self).__name__, self.defaults)
            at_least_zero("weight_decay", group["weight_decay"])

    def _largest(self) -> float:
        """The largest gradient of an element that the step can take."""
        return torch.finfo(self._w.dtype).max

    def _check_finite(self, g: Tensor) -> None:
        if not bool(torch.linalg.vector_norm(g) <= self._largest()):
            gradients = dict(zip(map(self._name, self._tensors), self._g_views, strict=True))
            refuse_gradients(gradients, self._largest(), self.steps_done)

    def _settle(self) -> None:
        """Raise if the last step's gradients were not finite: nobody waited then to know."""
        finite, self._finite = self._finite, None
        if finite is None or bool(finite):
            return
        self.steps_done -= 1
        for name, tensor in self._host_before.items():
            self._buffers()[name].copy_(tensor)
        raise TrainingError(
            f"a gradient was NaN, infinite or too large at step {self.steps_done}, the last one; it updated nothing. "
            "Lower the learning rate or clip the gradients."
        )

    def _check_tensors(self) -> None:
        unknown = [p for p in self._tensors if id(p) not in self._names]
        if unknown:
            raise TrainingError("params= holds a parameter that is not the grouping's model's own.")
        refuse_parameters(self.grouping, {self._name(p): p for p in self._tensors})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Parameters are fixed at the start."""
        if self._ready:
            raise TrainingError("parameters cannot be added later: make a new grouping and a new optimizer.")
        refuse_keys(param_group.keys() - self.defaults.keys() - FREE, type(self).__name__, self.defaults)
        super().add_param_group(param_group)

    # What is zero.

    def zero_groups(self, threshold: float | None = None, patience: int = 1) -> list[str]:
        """Names of the groups that are zero.

        Without a threshold: those whose solution ŵ of the proximal step was exactly zero in the last
        ``patience`` steps. With one, for comparison: those whose norm is at most the threshold (GSparsity:
        1e-6).
        """
        self._settle()
        if threshold is None:
            chosen = self.dormant >= patience
        else:
            with torch.no_grad():
                chosen = self.runs.norm(self._gather())[: len(self.grouping)] <= threshold
        return [self.grouping.names[i] for i in chosen.nonzero().flatten().tolist()]

    def group_norms(self) -> Tensor:
        """The norm of every group [groups]."""
        with torch.no_grad():
            return self.runs.norm(self._gather())[: len(self.grouping)]

    @torch.no_grad()
    def snap(self, patience: int = 1) -> list[str]:
        """Put the groups of :meth:`zero_groups` at exactly zero, as they are in the limit; returns their
        names.
        """
        self._settle()
        stays = torch.ones(self.runs.count, dtype=self._w.dtype, device=self._w.device)
        stays[: len(self.grouping)] = (self.dormant < patience).to(stays)
        self._gather().mul_(self.runs.spread(stays))
        self._scatter()
        return self.zero_groups(patience=patience)

    def solution(self, space: Any = None, patience: int = 1) -> Solution:
        """The groups that are zero, as a solution: structures removed, or masks where groups lie within
        layers.

        Structures go as long as the network stays valid, longest zero first. For a grouping within layers
        give the model's ``space``. Warns where a norm takes its statistics over an axis that loses something: the
        sub-network then equals ``space.masked(solution)``, not the snapped model, whose norm counts the zeros.
        """
        self._settle()
        space = self.grouping.space or space
        if space is None:
            raise TrainingError("groups within layers: give solution() the model's search space.")
        zero = (self.dormant >= patience).nonzero().flatten().tolist()
        provenance = {"method": type(self).__name__, "steps": self.steps_done, "zero_groups": len(zero)}
        if self.grouping.members:
            zero.sort(key=lambda i: -int(self.dormant[i]))
            order = [name for i in zero for name in self.grouping.members[i]]
            solution = space.solution(space.removable_in_order(order), provenance)
            warn_of_norms(space, solution)
            return solution
        gone = torch.zeros(len(self.grouping) + 1, dtype=torch.bool)  # the last place is for -1
        gone[zero] = True
        own = dict(self.grouping.model.named_parameters())
        masks = {n: ~gone[o.cpu()].expand(own[n].shape) for n, o in self.grouping.owner.items()}
        plain = space.solution((), provenance)
        return Solution((), plain.fingerprint, {n: m for n, m in masks.items() if not bool(m.all())}, provenance)

    def check_ranks(self) -> None:
        """Raise :class:`TrainingError` unless all ranks hold the same groups; every rank must call it.

        An optimizer does not average gradients: train the model in DistributedDataParallel, or average them over the
        ranks before each step. Groups are compared bit by bit (norms, and for how long they have been zero).
        """
        self._settle()
        name = first_difference(self.grouping.names, self.dormant, self.group_norms())
        if name is not None:
            raise TrainingError(
                f"the ranks hold different weights, first in group '{name}': gradients must be averaged over the ranks "
                "(wrap the model in torch.nn.parallel.DistributedDataParallel) and all ranks begin with the same model."
            )

    # Saving.

    def _settings(self) -> dict[str, Any]:
        """What was fixed at the start and must be the same to go on."""
        return {"method": type(self).__name__}

    def _buffers(self) -> dict[str, Tensor]:
        """What a subclass keeps over all elements."""
        return {} if self._written is None else {"precise": self._w, "written": self._written}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-identical continuation needs, the model aside."""
        self._settle()
        return {
            "steps_done": self.steps_done,
            "dormant": self.dormant.clone(),
            "buffers": {name: t.clone() for name, t in self._buffers().items()},
            "params": [[self._name(p) for p in group["params"]] for group in self.param_groups],
            "param_groups": [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups],
            "names": list(self.grouping.names),
            "settings": self._settings(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Continue where :meth:`state_dict` was taken. Raises :class:`TrainingError` for another grouping's
        state, and for one of other settings (method, τ, normalisation, schedule).
        """
        params = [[self._name(p) for p in group["params"]] for group in self.param_groups]
        if state_dict.get("names") != list(self.grouping.names) or state_dict["params"] != params:
            raise TrainingError("this optimizer state belongs to another grouping or to other parameters.")
        mine = self._settings()
        settings = state_dict.get("settings", mine)  # older states have none
        other = [k for k in ("method", *mine) if settings.get(k) != mine.get(k)]
        if other:
            told = [f"{k}={settings.get(k)!r}, here {mine.get(k)!r}" for k in other]
            told = told[0] if "method" in other else ", ".join(told)
            raise TrainingError(f"this optimizer state was saved with {told}: make the optimizer as it was.")
        self.steps_done = int(state_dict["steps_done"])
        self.dormant.copy_(state_dict["dormant"])
        for name, tensor in self._buffers().items():
            if "settings" in state_dict or name in state_dict["buffers"]:
                tensor.copy_(state_dict["buffers"][name])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)
        self._finite = None

    def __getstate__(self) -> dict[str, Any]:
        """All but what is made again, and a scheduler's wrapper of ``step``: a copy is of the model's copy."""
        made = {"step", "_names", "_views", "_g_views", "_written_views"}
        return {k: v for k, v in self.__dict__.items() if k not in made and not k.startswith("_optimizer_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._name_parameters()
        self._make_views()
