"""All trained parameters as one flat vector with its groups: what ProxSGD and RMDA share."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from espalier.errors import TrainingError
from espalier.space.solution import Solution
from espalier.sparsify.grouping import Grouping
from espalier.sparsify.prox import Runs

_copy, _zero = torch._foreach_copy_, torch._foreach_zero_  # pyright: ignore[reportPrivateImportUsage]


class FlatProximal(Optimizer):
    """Base of the proximal optimizers; a subclass writes ``_update(w, g)`` and returns each group's shrink
    factor.

    Elements of no group form hidden groups, one per tensor, with μ = 0.
    """

    def __init__(
        self,
        grouping: Grouping,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]] | None,
        defaults: dict[str, Any],
    ):
        self.grouping = grouping
        self._names = {id(p): name for name, p in grouping.model.named_parameters()}
        self._ready = False
        given = [p for p in grouping.model.parameters() if p.requires_grad] if params is None else list(params)
        super().__init__(given, defaults)  # pyright: ignore[reportArgumentType]
        self._ready = True
        self.steps_done = 0
        self._tensors = [p for group in self.param_groups for p in group["params"]]
        self._check_tensors()
        self._sizes = [p.numel() for p in self._tensors]
        owners, hidden = [], len(grouping)
        for p in self._tensors:
            owner = grouping.owner.get(self._names[id(p)], torch.tensor(-1)).cpu().expand(p.shape).flatten()
            if bool((owner < 0).any()):
                owner = torch.where(owner < 0, hidden, owner)
                hidden += 1
            owners.append(owner)
        device = self._tensors[0].device
        self.runs = Runs.of(torch.cat(owners).to(device), hidden)
        kind = torch.float64 if any(p.dtype == torch.float64 for p in self._tensors) else torch.float32
        self._w = torch.zeros(sum(self._sizes), dtype=kind, device=device)
        self._g = torch.zeros_like(self._w)
        self._views, self._g_views = (
            [v.view(p.shape) for v, p in zip(flat.split(self._sizes), self._tensors, strict=True)]
            for flat in (self._w, self._g)
        )
        self.dormant = torch.zeros(len(grouping), dtype=torch.long, device=device)
        self._finite: Tensor | None = None
        self._cache: dict[str, tuple[tuple[float, ...], Any]] = {}

    # One step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; call it as any optimizer's."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        w, g = self._gather(), self._g
        missing = [i for i, p in enumerate(self._tensors) if p.grad is None]
        if missing:
            _zero([self._g_views[i] for i in missing])
        at = [i for i, p in enumerate(self._tensors) if p.grad is not None] if missing else range(len(self._tensors))
        _copy([self._g_views[i] for i in at], [self._tensors[i].grad for i in at])
        self._check_finite(g)
        decay = self.per_element("weight_decay")
        if isinstance(decay, Tensor) or decay:
            g = g.addcmul(w, decay) if isinstance(decay, Tensor) else g.add_(w, alpha=decay)
        factor = self._update(w, g)
        _copy(self._tensors, self._views)
        self.dormant.add_(1).mul_(factor[: len(self.grouping)] == 0)
        self.steps_done += 1
        return loss

    @abstractmethod
    def _update(self, w: Tensor, g: Tensor) -> Tensor:
        """Write the new parameters into ``w``; return how much every group was shrunk [groups], 0 for "is
        zero".
        """

    def _gather(self) -> Tensor:
        _copy(self._views, self._tensors)
        return self._w

    def per_element(self, key: str) -> Tensor | float:
        """A hyper-parameter of ``param_groups``: one number where all agree, else one per element."""
        values = tuple(float(group[key]) for group in self.param_groups)
        if len(set(values)) == 1:
            return values[0]
        if self._cache.get(key, ((),))[0] != values:
            counts = torch.tensor([sum(p.numel() for p in group["params"]) for group in self.param_groups])
            made = torch.tensor(values, dtype=self._w.dtype).repeat_interleave(counts)
            self._cache[key] = (values, made.to(self._w.device))
        return self._cache[key][1]

    def _check_finite(self, g: Tensor) -> None:
        finite = torch.isfinite(torch.linalg.vector_norm(g))
        before, self._finite = self._finite, finite
        waited = finite if g.device.type == "cpu" else before
        if waited is None or bool(waited):
            return
        bad = [self._names[id(p)] for p in self._tensors if p.grad is not None and not bool(p.grad.isfinite().all())]
        if bad or g.device.type != "cpu":
            raise TrainingError(
                f"the gradient of '{bad[0] if bad else '(of the step before)'}' is NaN or infinite at step "
                f"{self.steps_done} ({len(bad)} parameters in all); nothing was updated. Lower the learning "
                f"rate or clip the gradients."
            )

    def _check_tensors(self) -> None:
        unknown = [p for p in self._tensors if id(p) not in self._names]
        if unknown:
            raise TrainingError("params= holds a parameter that is not the grouping's model's own.")
        mine = {self._names[id(p)] for p in self._tensors}
        missing = [name for name in self.grouping.owner if name not in mine]
        if missing:
            raise TrainingError(
                f"'{missing[0]}' belongs to a group, but is frozen (requires_grad=False) or not in params=."
            )
        if len({p.device for p in self._tensors}) > 1:
            raise TrainingError("the parameters lie on several devices: the groups' norms need one.")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Parameters are fixed at the start."""
        if self._ready:
            raise TrainingError("parameters cannot be added later: make a new grouping and a new optimizer.")
        super().add_param_group(param_group)

    # What is zero.

    def zero_groups(self, threshold: float | None = None, patience: int = 1) -> list[str]:
        """Names of the groups that are zero.

        Without a threshold: those whose solution ŵ of the proximal step was exactly zero in the last
        ``patience`` steps. With one, for comparison: those whose norm is at most the threshold (GSparsity:
        1e-6).
        """
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
        stays = torch.ones(self.runs.count, dtype=self._w.dtype, device=self._w.device)
        stays[: len(self.grouping)] = (self.dormant < patience).to(stays)
        self._gather().mul_(self.runs.spread(stays))
        _copy(self._tensors, self._views)
        return self.zero_groups(patience=patience)

    def solution(self, space: Any = None, patience: int = 1) -> Solution:
        """The groups that are zero, as a solution: structures removed, or masks where groups lie within
        layers.

        Structures go as long as the network stays valid, longest zero first. For a grouping within layers
        give the model's ``space``.
        """
        space = self.grouping.space or space
        if space is None:
            raise TrainingError("groups within layers: give solution() the model's search space.")
        zero = (self.dormant >= patience).nonzero().flatten().tolist()
        provenance = {"method": type(self).__name__, "steps": self.steps_done, "zero_groups": len(zero)}
        if self.grouping.members:
            zero.sort(key=lambda i: -int(self.dormant[i]))
            order = [name for i in zero for name in self.grouping.members[i]]
            return space.solution(space.removable_in_order(order), provenance)
        gone = torch.zeros(len(self.grouping) + 1, dtype=torch.bool)  # the last place is for -1
        gone[zero] = True
        own = dict(self.grouping.model.named_parameters())
        masks = {n: ~gone[o.cpu()].expand(own[n].shape) for n, o in self.grouping.owner.items()}
        plain = space.solution((), provenance)
        return Solution((), plain.fingerprint, {n: m for n, m in masks.items() if not bool(m.all())}, provenance)

    # Saving.

    def _buffers(self) -> dict[str, Tensor]:
        """What a subclass keeps over all elements."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-identical continuation needs, the model aside."""
        return {
            "steps_done": self.steps_done,
            "dormant": self.dormant.clone(),
            "buffers": {name: t.clone() for name, t in self._buffers().items()},
            "params": [[self._names[id(p)] for p in group["params"]] for group in self.param_groups],
            "param_groups": [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups],
            "names": list(self.grouping.names),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Continue where :meth:`state_dict` was taken. Raises :class:`TrainingError` for another grouping's
        state.
        """
        params = [[self._names[id(p)] for p in group["params"]] for group in self.param_groups]
        if state_dict.get("names") != list(self.grouping.names) or state_dict["params"] != params:
            raise TrainingError("this optimizer state belongs to another grouping or to other parameters.")
        self.steps_done = int(state_dict["steps_done"])
        self.dormant.copy_(state_dict["dormant"])
        for name, tensor in self._buffers().items():
            tensor.copy_(state_dict["buffers"][name])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)
        self._finite = None
