"""The loop of the half-space family: what HSPG, DHSPG, H2SPG and ProxSG+ share.

A policy (:mod:`espalier.sparsify.halfspace`) says which groups head for zero, how a step moves them, and which of
them have arrived.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from espalier.errors import TrainingError
from espalier.space.search_space import SearchSpace
from espalier.space.solution import Solution
from espalier.sparsify import foreach
from espalier.sparsify.foreach import norms
from espalier.sparsify.groups import Groups, all_finite


class HalfSpace(Optimizer):
    """Base of the family: warm-up, then the hybrid phase, in which some groups x head for zero, then the rest.

    ``base`` trains; a policy writes :meth:`_search`, :meth:`_move` and, where the half-space test is not its
    own, :meth:`_gone`. A step waits for the device only where a phase ends.
    """

    moves_after_base = False  # whether ``base`` moves these groups too, and the policy adds to its step

    def __init__(
        self,
        space: SearchSpace,
        base: type[Optimizer],
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]] | None,
        warmup_steps: int,
        projection_steps: int,
        test_every: int,
        epsilon: float,
        base_arguments: Mapping[str, Any],
    ):
        if warmup_steps < 1 or projection_steps < 1:
            raise TrainingError("warmup_steps and projection_steps are at least 1.")
        if test_every < 1 or not 0.0 <= epsilon < 1.0:
            raise TrainingError("epsilon lies in [0, 1), test_every is at least 1.")
        self.space = space
        self.warmup_steps, self.projection_steps = warmup_steps, projection_steps
        self.test_every, self.epsilon = test_every, epsilon
        self.groups = Groups(space)
        self._names = {id(p): name for name, p in space.model.named_parameters()}
        given = [p for p in space.model.parameters() if p.requires_grad] if params is None else list(params)
        self.base = base(_copied(given), **base_arguments)
        self._ready = False
        super().__init__(_copied(given), dict(self.base.defaults))
        self.state = self.base.state
        self._ready = True
        self._check_parameters()
        self.steps_done = 0
        self.redundant: tuple[str, ...] = ()
        device = self.groups.group.device
        # On an accelerator, asking which groups have arrived would wait for it: a factor of 0 holds them instead.
        self._at_once = device.type == "cpu" and not self.moves_after_base
        self._alive = torch.ones(len(space), device=device)  # 0 once a group has arrived at zero
        self._left_over = torch.zeros(len(space), device=device)
        self._shrinking: list[nn.Parameter] = []  # what is on its way to zero
        self._rows = self.groups.group[:0]  # the place of each of these in groups.tensors
        self._of_group: list[Tensor] = []  # 1 where it belongs to the parameter group
        self._finite: Tensor | None = None

    # Where the training stands.

    @property
    def phase(self) -> str:
        """ "warmup", "hybrid" (the redundant groups are on their way to zero) or "done"."""
        if self.steps_done < self.warmup_steps:
            return "warmup"
        return "hybrid" if self.steps_done < self.warmup_steps + self.projection_steps else "done"

    def zero_structures(self) -> int:
        """Number of structures whose parameters are all exactly zero."""
        return len(self._zero_names())

    @torch.no_grad()
    def _zero_names(self) -> tuple[str, ...]:
        zero = (self.groups.sum(norms(self.groups.tensors)) == 0).tolist()
        return tuple(s.name for s, gone in zip(self.space.structures, zero, strict=True) if gone)

    def left_over(self) -> dict[str, float]:
        """The norm that each redundant structure still had when the last step of the hybrid phase put it to zero."""
        norm = dict(zip((s.name for s in self.space.structures), self._left_over.tolist(), strict=True))
        return {name: norm[name] for name in self.redundant}

    def solution(self) -> Solution:
        """What to remove. Raises :class:`InvalidSolution`, with the reason, if the network would not work so."""
        self._check_parameters()
        about = {"method": type(self).__name__, "steps": self.steps_done, **self._provenance()}
        return self.space.solution(self._removed(), about)

    # The policy.

    @abstractmethod
    def _search(self) -> None:
        """The warm-up is over: say which groups head for zero."""

    @abstractmethod
    def _move(self, tensors: list[nn.Parameter], before: list[Tensor], left: int) -> None:
        """Move the groups that head for zero; ``left`` steps of the hybrid phase are left, this one included."""

    @abstractmethod
    def _removed(self) -> tuple[str, ...]:
        """What the solution removes."""

    def _provenance(self) -> dict[str, Any]:
        return {}

    def _warm_up(self) -> None:
        self.base.step()

    def _finish(self) -> None:
        """The last step of the hybrid phase: all redundant groups are zero from here on."""
        if self._shrinking:
            squares = self.groups.sum(norms(self._shrinking).square(), self._rows)
            self._left_over.copy_(squares.sqrt())
            foreach.zero_(self._shrinking)
        self._head_for_zero(())

    def _gone(self, tensors: list[nn.Parameter], before: list[Tensor]) -> Tensor | None:
        """Which groups arrive at zero [structures]: those whose y has left the half-space of x."""
        x, y = norms(before).square(), norms(tensors).square()
        moved = norms(foreach.sub(tensors, before)).square()
        inner = self.groups.sum(x + y - moved, self._rows) / 2.0  # 2 <y, x> = |x|² + |y|² - |y - x|²
        square = self.groups.sum(x, self._rows)
        return (inner < self.epsilon * square) & (square > 0)

    # One step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of the present phase; call it as any optimizer's."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_finite()
        self._follow_hyper_parameters()
        phase = self.phase
        if phase == "warmup":
            self._warm_up()
        elif phase == "hybrid":
            self._hybrid()
        else:
            self.base.step()
        self.steps_done += 1
        if self.steps_done == self.warmup_steps:
            self._search()
        return loss

    def _hybrid(self) -> None:
        done = self.steps_done - self.warmup_steps
        left = self.projection_steps - done
        tensors = self._shrinking
        testing = done % self.test_every == 0
        before = [t.clone() for t in tensors] if testing or self.moves_after_base else []
        self.base.step()
        if tensors:
            self._move(tensors, before, left)
            gone = self._gone(tensors, before) if testing else None
            if gone is not None:
                self._alive.mul_(~gone)
            if not self._at_once or gone is not None:
                alive = self._alive[self.groups.group[self._rows]]
                foreach.mul_(tensors, alive.to(tensors[0].dtype).unbind())
            if self._at_once and gone is not None:
                self._drop_arrived()
        if left == 1:
            self._finish()

    def _drop_arrived(self) -> None:
        """What is zero is moved no more."""
        alive = (self._alive[self.groups.group[self._rows]] > 0).tolist()
        if all(alive):
            return
        self._head_for_zero([row for row, on in zip(self._rows.tolist(), alive, strict=True) if on])

    def _mark(self, names: Iterable[str]) -> None:
        """These groups are redundant: ``base`` trains them no longer."""
        self.redundant = tuple(names)
        chosen = {i for i, s in enumerate(self.space.structures) if s.name in set(self.redundant)}
        rows = [k for k, i in enumerate(self.groups.group.tolist()) if i in chosen]
        leaving = {id(self.groups.tensors[k]): self.groups.tensors[k] for k in rows}
        for group in self.base.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in leaving]
        for tensor in leaving.values():
            self.base.state.pop(tensor, None)
        self._head_for_zero(rows)

    def _head_for_zero(self, rows: Sequence[int]) -> None:
        self._shrinking = [self.groups.tensors[k] for k in rows]
        device = self.groups.group.device
        self._rows = torch.tensor(rows, dtype=torch.long, device=device)
        group_of = {id(p): i for i, group in enumerate(self.param_groups) for p in group["params"]}
        members = torch.tensor([group_of[id(t)] for t in self._shrinking], device=device)
        self._of_group = [(members == i).double() for i in range(len(self.param_groups))]

    def _rates(self) -> Tensor:
        """The learning rate of every tensor on its way to zero, put together on the device."""
        pairs = zip(self.param_groups, self._of_group, strict=True)
        return torch.stack([float(group["lr"]) * mine for group, mine in pairs]).sum(0)

    def _by_rate(self, tensors: list[nn.Parameter]) -> Iterable[tuple[float, list[nn.Parameter]]]:
        """The tensors of each parameter group, with its learning rate."""
        if len(self.param_groups) == 1:
            return [(float(self.param_groups[0]["lr"]), tensors)]
        wanted = {id(t) for t in tensors}
        split = [(float(g["lr"]), [p for p in g["params"] if id(p) in wanted]) for g in self.param_groups]
        return [(rate, members) for rate, members in split if members]

    def _check_finite(self) -> None:
        """Raise before anything is touched if a gradient is NaN or infinite."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return
        finite = all_finite(gradients)
        before, self._finite = self._finite, finite
        known = finite if finite.device.type == "cpu" else before
        if known is not None and not bool(known):
            named = [(self._names[id(p)], p.grad) for group in self.param_groups for p in group["params"]]
            bad = [name for name, g in named if g is not None and not g.isfinite().all()]
            raise TrainingError(
                f"the gradient of '{bad[0] if bad else '(of the step before)'}' is NaN or infinite at step "
                f"{self.steps_done} ({len(bad)} parameters in all); nothing was updated. Lower the learning rate, clip "
                f"the gradients, or scale the loss (torch.amp.GradScaler); opt.zero_grad() and go on, or reload."
            )

    def _follow_hyper_parameters(self) -> None:
        """Schedulers and users write to this optimizer's groups; ``base`` works with them."""
        for mine, theirs in zip(self.param_groups, self.base.param_groups, strict=True):
            theirs.update({key: value for key, value in mine.items() if key != "params"})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only parameters that the search space knows can be trained here."""
        if self._ready:
            raise TrainingError(
                "parameters cannot be added once the search space is made: make a new space with "
                "espalier.search_space(model, ...) and a new optimizer."
            )
        super().add_param_group(param_group)

    def _check_parameters(self) -> None:
        for name, parameter in self.space.model.named_parameters():
            if id(parameter) not in self._names:
                raise TrainingError(
                    f"parameter '{name}' was added or replaced after the search space was made: make a new space with "
                    f"espalier.search_space(model, ...) and a new optimizer."
                )
        mine = {id(p) for group in self.param_groups for p in group["params"]}
        if not mine <= set(self._names):
            raise TrainingError("params= holds a parameter that is not the search space's model's own.")
        missing = [name for name, t in zip(self.groups.names, self.groups.tensors, strict=True) if id(t) not in mine]
        if missing:
            raise TrainingError(f"params= lacks '{missing[0]}', which belongs to a removable structure.")

    # Saving.

    def _buffers(self) -> dict[str, Tensor]:
        """What the policy keeps per structure."""
        return {"alive": self._alive, "left_over": self._left_over}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-identical continuation needs, the space and the model aside."""
        names = [[self._names[id(p)] for p in group["params"]] for group in self.param_groups]
        return {
            "method": type(self).__name__,
            "fingerprint": self.space.fingerprint,
            "steps_done": self.steps_done,
            "redundant": list(self.redundant),
            "buffers": {name: tensor.clone() for name, tensor in self._buffers().items()},
            "params": names,
            "groups": [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups],
            "base": {self._names[id(p)]: _cloned(s) for p, s in self.base.state.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Continue where :meth:`state_dict` was taken.

        Raises :class:`TrainingError` for the state of another space or of another optimizer of the family.
        """
        if state_dict.get("fingerprint") != self.space.fingerprint:
            raise TrainingError("this optimizer state belongs to another model or search space.")
        if state_dict["method"] != type(self).__name__:
            raise TrainingError(f"this is a state of {state_dict['method']}, not of {type(self).__name__}.")
        by_name = {name: p for p in self.space.model.parameters() if (name := self._names[id(p)])}
        self.steps_done = int(state_dict["steps_done"])
        for group, base, names, saved in zip(
            self.param_groups, self.base.param_groups, state_dict["params"], state_dict["groups"], strict=True
        ):
            group.update(saved, params=[by_name[name] for name in names])
            base.update(saved, params=[by_name[name] for name in names])
        self.base.state.clear()
        for name, saved in state_dict["base"].items():
            self.base.state[by_name[name]] = _cloned(saved)
        for name, tensor in self._buffers().items():
            tensor.copy_(state_dict["buffers"][name])
        self._resume(state_dict["redundant"])
        self._finite = None

    def _resume(self, redundant: list[str]) -> None:
        self._mark(redundant)
        if self.phase == "done":
            self._head_for_zero(())
        elif self._at_once:
            self._drop_arrived()


def _copied(given: list[Any]) -> list[Any]:
    return [dict(g, params=list(g["params"])) if isinstance(g, dict) else g for g in given]


def _cloned(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
