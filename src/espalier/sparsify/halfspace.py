"""Half-space projected gradient: one loop, and policies that differ in which groups they drive to zero.

H2SPG (ASGSSD, Algorithm 3) marks groups in ascending saliency as long as the network stays valid; DHSPG (Chen
et al., 2023) takes the least salient whatever becomes of the network.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from espalier.errors import BudgetError, TrainingError
from espalier.saliency import Saliency, cosine_magnitude
from espalier.space.budget import Budget, check_feasible, estimate, meet
from espalier.space.search_space import SearchSpace
from espalier.space.solution import Solution
from espalier.sparsify import foreach
from espalier.sparsify.foreach import norms
from espalier.sparsify.groups import Groups, all_finite


class H2SPG(Optimizer):
    """Hierarchical half-space projected gradient: train once, end with exactly the budget's structures at zero.

    >>> from espalier import Budget, search_space
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
    ...
    ...     def forward(self, x):
    ...         return self.out(self.a(x) + self.b(x))
    >>> model, x = Net(), torch.randn(8, 4)
    >>> space = search_space(model, (x,))
    >>> opt = H2SPG(space, budget=Budget(structures=0.5), lr=0.1, warmup_steps=3, projection_steps=4)
    >>> for _ in range(7):
    ...     opt.zero_grad()
    ...     model(x).square().mean().backward()
    ...     opt.step()
    >>> opt.phase, opt.zero_structures(), len(opt.solution().removed)
    ('done', 1, 1)

    ``base`` trains what stays and takes ``lr`` and all further keyword arguments; ``param_groups``, schedulers,
    gradient clipping and gradient scalers work as with ``base`` itself.

    - For ``warmup_steps`` steps, ``base`` trains everything while the saliency is averaged (exponentially, the
      past weighing ``smoothing``).
    - Then, once, structures are marked redundant in ascending saliency while the network stays valid, until
      the budget is met (Algorithm 3, lines 2 to 11).
    - For ``projection_steps`` steps, ``base`` trains the rest, and a redundant group x takes half-space steps
      (lines 12 to 15): a trial ``y = x - lr (g + lambda x / |x|)`` with lambda = |x| / (lr * steps left), a straight
      line to zero at the last step; every ``test_every`` steps, groups with ``<y, x> < epsilon |x|²`` become zero
      and stay so.
    - Then ``base`` goes on training what stays.

    Raises :class:`SpaceError` for an empty search space, :class:`BudgetError` if the budget cannot be met (at
    once, before any training), :class:`TrainingError` for gradients that are not finite (before any parameter
    is touched; on an accelerator one step later, so that a step never waits for the device) and for parameters
    that the search space does not know.
    """

    def __init__(
        self,
        space: SearchSpace,
        base: type[Optimizer] = torch.optim.SGD,
        budget: Budget | None = None,
        *,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]] | None = None,
        warmup_steps: int = 100,
        projection_steps: int = 100,
        saliency: Saliency = cosine_magnitude,
        smoothing: float = 0.9,
        test_every: int = 10,
        epsilon: float = 0.0,
        **base_arguments: Any,
    ):
        if warmup_steps < 1 or projection_steps < 1:
            raise TrainingError("warmup_steps and projection_steps are at least 1.")
        if not 0.0 <= smoothing < 1.0 or test_every < 1 or not 0.0 <= epsilon < 1.0:
            raise TrainingError("smoothing and epsilon lie in [0, 1), test_every is at least 1.")
        self.space = space
        self.budget = Budget(structures=0.5) if budget is None else budget
        self.warmup_steps, self.projection_steps = warmup_steps, projection_steps
        self.saliency, self.smoothing = saliency, smoothing
        self.test_every, self.epsilon = test_every, epsilon
        self.groups = Groups(space)
        self._names = {id(p): name for name, p in space.model.named_parameters()}
        self._check_budget()
        given = [p for p in space.model.parameters() if p.requires_grad] if params is None else list(params)
        self.base = base(_copied(given), **base_arguments)
        self._ready = False
        super().__init__(_copied(given), dict(self.base.defaults))
        self.state = self.base.state
        self._ready = True
        self._check_parameters()
        self.steps_done = 0
        self.redundant: tuple[str, ...] = ()
        self._scores = torch.zeros(len(space), device=self.groups.group.device)
        self._shrinking: list[int] = []  # positions in groups.tensors of what is on its way to zero
        self._finite: torch.Tensor | None = None

    # Where the training stands.

    @property
    def phase(self) -> str:
        """ "warmup", "hybrid" (the redundant groups are on their way to zero) or "done"."""
        if self.steps_done < self.warmup_steps:
            return "warmup"
        return "hybrid" if self.steps_done < self.warmup_steps + self.projection_steps else "done"

    @cached_property
    def expected_removals(self) -> float:
        """About how many structures will go, from random removals (appendix A.2); the search phase is exact."""
        return estimate(self.space, self.budget, generator=torch.Generator().manual_seed(0))

    def saliency_scores(self) -> dict[str, float]:
        """The averaged saliency of every structure."""
        return dict(zip((s.name for s in self.space.structures), self._scores.tolist(), strict=True))

    def zero_structures(self) -> int:
        """Number of structures whose parameters are all exactly zero."""
        with torch.no_grad():
            return int((self.groups.sum(norms(self.groups.tensors)) == 0).sum())

    def solution(self) -> Solution:
        """What to remove. Before the search phase ends: what would be marked by the saliency so far."""
        self._check_parameters()
        removed = self.redundant or tuple(self.choose(self._ascending()))
        kept = {name: round(score, 6) for name, score in self.saliency_scores().items()}
        return self.space.solution(
            removed,
            {
                "method": type(self).__name__,
                "budget": vars(self.budget),
                "steps": self.steps_done,
                "saliency": kept,
            },
        )

    # The policy.

    def choose(self, ascending: list[str]) -> list[str]:
        """Which structures to drive to zero, given their names in ascending saliency (Algorithm 3, lines 2 to 11)."""
        return meet(self.space, ascending, self.budget)

    def _check_budget(self) -> None:
        check_feasible(self.space, self.budget)

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
        if self.phase == "warmup":
            self._score()
            self.base.step()
            self.steps_done += 1
            if self.steps_done == self.warmup_steps:
                self._mark(self.choose(self._ascending()))
            return loss
        self.base.step()
        if self.phase == "hybrid":
            self._half_space_step()
        self.steps_done += 1
        return loss

    def _score(self) -> None:
        gradients = [t.grad if t.grad is not None else torch.zeros_like(t) for t in self.groups.tensors]
        score = self.saliency(self.space, self.groups.state(gradients)).to(self._scores)
        weight = self.smoothing if self.steps_done else 0.0
        self._scores.mul_(weight).add_(score, alpha=1.0 - weight)

    def _ascending(self) -> list[str]:
        order = torch.sort(self._scores, stable=True).indices.tolist()
        return [self.space.structures[i].name for i in order]

    def _mark(self, names: Iterable[str]) -> None:
        """The search phase's outcome: these groups leave ``base`` and head for zero."""
        self.redundant = tuple(names)
        chosen = {i for i, s in enumerate(self.space.structures) if s.name in set(self.redundant)}
        self._shrinking = [k for k, i in enumerate(self.groups.group.tolist()) if i in chosen]
        leaving = {id(self.groups.tensors[k]): self.groups.tensors[k] for k in self._shrinking}
        for group in self.base.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in leaving]
        for tensor in leaving.values():
            self.base.state.pop(tensor, None)

    def _half_space_step(self) -> None:
        """``y = (1 - 1 / left) x - lr g`` for all groups on their way to zero."""
        left = self.projection_steps - (self.steps_done - self.warmup_steps)
        tensors = [self.groups.tensors[k] for k in self._shrinking]
        if not tensors:
            return
        if left <= 1:
            foreach.zero_(tensors)
            self._shrinking = []
            return
        testing = (self.steps_done - self.warmup_steps) % self.test_every == 0
        before = norms(tensors).square() if testing else None
        for rate, members in self._by_rate(tensors):
            foreach.add_(members, members, alpha=-1.0 / left)
            pairs = [(t, t.grad) for t in members if t.grad is not None]
            if pairs:
                foreach.add_([t for t, _ in pairs], [g for _, g in pairs], alpha=-rate)
        if before is not None:
            self._project(tensors, before, 1.0 - 1.0 / left)

    def _project(self, tensors: list[nn.Parameter], before: torch.Tensor, shrink: float) -> None:
        """Zero the groups whose trial y has left the half-space of x."""
        rows = torch.tensor(self._shrinking, device=self.groups.group.device)
        after = norms(tensors).square()
        nothing = torch.zeros_like(tensors[0])
        moved = norms([nothing if t.grad is None else t.grad for t in tensors]).square() * self._rates(tensors).square()
        # |y|² = c² |x|² - 2 c lr <g, x> + lr² |g|², hence <y, x> = (c² |x|² + |y|² - lr² |g|²) / 2c.
        inner = self.groups.sum(shrink**2 * before + after - moved, rows) / (2.0 * shrink)
        out = (inner < self.epsilon * self.groups.sum(before, rows)) & (self.groups.sum(before, rows) > 0)
        gone = out[self.groups.group[rows]].tolist()
        if any(gone):
            foreach.zero_([t for t, left in zip(tensors, gone, strict=True) if left])
            self._shrinking = [k for k, left in zip(self._shrinking, gone, strict=True) if not left]

    def _by_rate(self, tensors: list[nn.Parameter]) -> Iterable[tuple[float, list[nn.Parameter]]]:
        """The tensors of each parameter group, with its learning rate."""
        if len(self.param_groups) == 1:
            return [(float(self.param_groups[0]["lr"]), tensors)]
        wanted = {id(t) for t in tensors}
        split = [(float(g["lr"]), [p for p in g["params"] if id(p) in wanted]) for g in self.param_groups]
        return [(rate, members) for rate, members in split if members]

    def _rates(self, tensors: list[nn.Parameter]) -> torch.Tensor:
        rate_of = {id(p): float(g["lr"]) for g in self.param_groups for p in g["params"]}
        return torch.tensor([rate_of[id(t)] for t in tensors], device=self.groups.group.device)

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

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-identical continuation needs, the space and the model aside."""
        names = [[self._names[id(p)] for p in group["params"]] for group in self.param_groups]
        return {
            "fingerprint": self.space.fingerprint,
            "steps_done": self.steps_done,
            "redundant": list(self.redundant),
            "scores": self._scores.clone(),
            "shrinking": list(self._shrinking),
            "params": names,
            "groups": [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups],
            "base": {
                self._names[id(p)]: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in s.items()}
                for p, s in self.base.state.items()
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Continue where :meth:`state_dict` was taken. Raises :class:`TrainingError` for another space's state."""
        if state_dict.get("fingerprint") != self.space.fingerprint:
            raise TrainingError("this optimizer state belongs to another model or search space.")
        by_name = {name: p for p in self.space.model.parameters() if (name := self._names[id(p)])}
        self.steps_done = int(state_dict["steps_done"])
        for group, base, names, saved in zip(
            self.param_groups, self.base.param_groups, state_dict["params"], state_dict["groups"], strict=True
        ):
            group.update(saved, params=[by_name[name] for name in names])
            base.update(saved, params=[by_name[name] for name in names])
        self.base.state.clear()
        for name, saved in state_dict["base"].items():
            self.base.state[by_name[name]] = {
                k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in saved.items()
            }
        self._mark(state_dict["redundant"])
        self._scores = state_dict["scores"].to(self._scores)
        self._shrinking = list(state_dict["shrinking"])
        self._finite = None


class DHSPG(H2SPG):
    """Dual half-space projected gradient: the least salient structures go, whether or not the network survives.

    Its :meth:`solution` raises :class:`InvalidSolution` where it does not. ``budget`` bounds structures only.
    """

    def choose(self, ascending: list[str]) -> list[str]:
        return ascending[: self.budget.structures_to_remove(len(self.space))]

    def _check_budget(self) -> None:
        if self.budget.structures is None:
            raise BudgetError("DHSPG takes a budget of structures: Budget(structures=0.5).")


def _copied(given: list[Any]) -> list[Any]:
    return [dict(g, params=list(g["params"])) if isinstance(g, dict) else g for g in given]
