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
from espalier.sparsify.groups import Groups, all_finite


class HalfSpace(Optimizer):
    """Base of the family: warm-up, then the hybrid phase, in which some groups x head for zero, then the rest.

    ``base`` trains; a policy writes :meth:`_search`, :meth:`_move` and, where the half-space test is not its
    own, :meth:`_gone`. A step waits for the device only where a phase ends.

    Whole tensors that head for zero leave ``base``. Where slices do, ``base`` trains the tensor as ever, and
    afterwards the slices are put where the policy, or the zero that they have reached, wants them: neither momentum
    nor weight decay moves them.
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
        self._held: list[tuple[nn.Parameter, Tensor]] = []  # where slices are redundant, and which: broadcasts
        self._head_for_zero(())
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
        return len(self._zeros())

    @torch.no_grad()
    def _zeros(self) -> list[int]:
        return (self.groups.largest(self.groups.tensors) == 0).nonzero().flatten().tolist()

    def _zero_names(self) -> tuple[str, ...]:
        names = self.space.structures.names
        return tuple(names[i] for i in self._zeros())

    def left_over(self) -> dict[str, float]:
        """The norm that each redundant structure still had when the last step of the hybrid phase put it to zero."""
        norm = self._left_over.tolist()
        return {name: norm[self.space.position(name)] for name in self.redundant}

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
    def _move(self, moving: list[Tensor], before: list[Tensor], left: int) -> None:
        """Move what heads for zero (one for each of ``heading.tensors``); so many steps are ``left``, this included."""

    @abstractmethod
    def _removed(self) -> tuple[str, ...]:
        """What the solution removes."""

    def _provenance(self) -> dict[str, Any]:
        return {}

    def _warm_up(self) -> None:
        self.base.step()

    def _finish(self) -> None:
        """The last step of the hybrid phase: all redundant groups are zero from here on."""
        if self._heading.tensors:
            self._left_over.copy_(self._heading.squares(self._heading.tensors).sqrt())
            if self._heading.whole:
                foreach.zero_(self._heading.tensors[: self._heading.whole])
        self._hold()
        self._head_for_zero(())

    def _gone(self, moving: list[Tensor], before: list[Tensor]) -> Tensor | None:
        """Which groups arrive at zero [structures]: those whose y has left the half-space of x."""
        square, _, inner = self._heading.products(before, moving)
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
            self._hold()
        self.steps_done += 1
        if self.steps_done == self.warmup_steps:
            self._search()
        return loss

    def _hybrid(self) -> None:
        done = self.steps_done - self.warmup_steps
        left = self.projection_steps - done
        heading = self._heading
        testing = done % self.test_every == 0
        before = [t.clone() for t in heading.tensors] if testing or self.moves_after_base else []
        apart = [] if self.moves_after_base else [t.clone() for t in heading.tensors[heading.whole :]]
        moving: list[Tensor] = [*heading.tensors[: heading.whole], *apart] if apart else list(heading.tensors)
        self.base.step()
        if moving:
            self._move(moving, before, left)
            gone = self._gone(moving, before) if testing else None
            if gone is not None:
                self._alive.mul_(~gone)
            if heading.parts or not self._at_once or gone is not None:
                alive = heading.at(self._alive, none=1.0)
                foreach.mul_(moving, heading.factors(alive.to(moving[0].dtype)))
            if apart:
                self._put_back(apart)
            if self._at_once and gone is not None:
                self._drop_arrived()
        if left == 1:
            self._finish()

    def _put_back(self, apart: list[Tensor]) -> None:
        """The redundant slices go where they were moved; the rest of each tensor stays as ``base`` left it."""
        for (tensor, where), moved in zip(self._held, apart, strict=True):
            torch.where(where, moved, tensor, out=tensor)

    def _hold(self) -> None:
        """Redundant slices are zero, whatever ``base`` did to them."""
        for tensor, where in self._held:
            tensor.masked_fill_(where, 0.0)

    def _drop_arrived(self) -> None:
        """Whole tensors that are zero are moved no more."""
        heading = self._heading
        alive = (self._alive[heading.group[: heading.whole]] > 0).tolist()
        if not all(alive):
            arrived = {id(t) for t, on in zip(heading.tensors, alive, strict=False) if not on}
            self._heading_without(self._arrived | arrived)

    def _mark(self, names: Iterable[str]) -> None:
        """These groups are redundant: ``base`` trains them no longer."""
        self.redundant = tuple(names)
        positions = [self.space.position(name) for name in self.redundant]
        self._head_for_zero(positions)
        chosen = self._heading
        leaving = {id(t): t for t in chosen.tensors[: chosen.whole]}
        for group in self.base.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in leaving]
        for tensor in leaving.values():
            self.base.state.pop(tensor, None)
        mine = chosen.factors(chosen.at(torch.ones_like(self._alive), none=0.0) > 0, torch.logical_or)
        self._held = list(zip(chosen.tensors, mine, strict=True))[chosen.whole :]

    def _head_for_zero(self, structures: Sequence[int]) -> None:
        """These structures, by position, head for zero from here on."""
        self._positions, self._arrived = structures, frozenset[int]()
        self._heading_without(frozenset())

    def _heading_without(self, arrived: frozenset[int]) -> None:
        self._arrived = arrived  # ids of tensors that are zero as a whole
        self._heading = self.groups.only(self._positions, arrived)
        group_of = {id(p): i for i, group in enumerate(self.param_groups) for p in group["params"]}
        member = [group_of[id(t)] for t in self._heading.tensors]
        self._of_group = [self._heading.rates([float(i == m) for m in member]) for i in range(len(self.param_groups))]
        self._members = [[k for k, m in enumerate(member) if m == i] for i in range(len(self.param_groups))]

    def _rates(self) -> Tensor:
        """The learning rate of every entry on its way to zero, put together on the device."""
        pairs = zip(self.param_groups, self._of_group, strict=True)
        return torch.stack([float(group["lr"]) * mine for group, mine in pairs]).sum(0)

    def _by_rate(self) -> Iterable[tuple[float, list[int]]]:
        """The learning rate of each parameter group, and which of ``heading.tensors`` are its."""
        return [(float(g["lr"]), rows) for g, rows in zip(self.param_groups, self._members, strict=True) if rows]

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
