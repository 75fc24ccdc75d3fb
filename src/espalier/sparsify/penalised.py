"""The penalty of the proximal optimizers: μ per group and its normalisation, an L1 penalty, and a box."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import TrainingError
from espalier.sparsify.flat import FlatProximal
from espalier.sparsify.grouping import Grouping
from espalier.sparsify.prox import Boxed, is_cone
from espalier.sparsify.refusals import at_least_zero

NORMALIZATIONS = ("none", "div", "mul", "init")
_first: ContextVar[tuple[nn.Module, Mapping[str, Tensor]] | None] = ContextVar("first weights", default=None)


@contextmanager
def first_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, ``normalize="init"`` goes by the norms in ``weights``, a state dict of ``model``."""
    token = _first.set((model, weights))
    try:
        yield
    finally:
        _first.reset(token)


class Penalised(FlatProximal):
    """``r(w) = Σ μ_k |w_k|₂ + sparsity |w|₁`` within a box; ``sparsity``, ``low`` and ``high`` may differ by
    ``param_groups``.

    With ``normalize="init"``, μ_k = μ |w_k(0)|, a group that starts at zero gets the norm that it would have at the
    scale of the others: √n_k times the root mean square of their elements.
    """

    _pulls = ""  # what the warning calls the numbers given to ``_warn_from``

    def __init__(
        self,
        grouping: Grouping,
        mu: float,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]] | None,
        defaults: dict[str, Any],
        normalize: str,
        exponent: float,
    ):
        at_least_zero("mu", mu)
        if normalize not in NORMALIZATIONS:
            raise TrainingError(f"normalize={normalize!r}: there are {', '.join(NORMALIZATIONS)}.")
        if not abs(exponent) < float("inf"):
            raise TrainingError(f"exponent={exponent}: a finite number.")
        super().__init__(grouping, params, defaults)
        self.normalize, self.exponent = normalize, exponent
        self._initial = self.group_norms().clone()
        self._scale = self._normalizer()
        self._bound = torch.full_like(self._initial, float("inf"))
        self._bounds: list[float] = self._bound.tolist()  # the same, on the host
        self._warned = 0
        self._cones: tuple[bool, ...] = ()
        self._boxed: Boxed | None = None
        self._set_mu(mu)

    @property
    def mu(self) -> float:
        """The weight of the penalty before normalisation; may be changed between steps."""
        return self._mu

    @mu.setter
    def mu(self, value: float) -> None:
        self._set_mu(value)
        self._warn_if_bound()

    def _set_mu(self, value: float) -> None:
        at_least_zero("mu", value)
        self._mu = float(value)
        hidden = self._scale.new_zeros(self.runs.count - len(self.grouping))
        self._unit = torch.cat([self._scale, hidden])  # μ_k / μ of all groups, hidden ones too
        self._mu_k = self._unit * self._mu

    def mu_per_group(self) -> Tensor:
        """μ_k of every group [groups]."""
        return self._mu_k[: len(self.grouping)]

    @torch.no_grad()
    def objective(self) -> Tensor:
        """The penalty ``Σ μ_k |w_k|`` of Eq. (2) at the present weights, and the L1 penalty where there is one."""
        total = (self.mu_per_group() * self.group_norms()).sum()
        sparsity = self.per_element("sparsity")
        one = isinstance(sparsity, Tensor) or sparsity
        return total + (sparsity * self._gather().abs()).sum() if one else total

    def _normalizer(self) -> Tensor:
        size = self.grouping.size.to(self._w)
        if self.normalize != "init":
            return size ** {"none": 0.0, "div": -self.exponent, "mul": self.exponent}[self.normalize]
        norms = self._first_norms()
        there = norms > 0
        if not bool(there.any()):
            raise TrainingError("normalize='init': all groups start at zero and have no norm to go by; use 'mul'.")
        typical = (norms.square().sum() / size[there].sum()).sqrt()
        return torch.where(there, norms, typical * size.sqrt())

    def _first_norms(self) -> Tensor:
        first = _first.get()
        if first is None or first[0] is not self.grouping.model:
            return self._initial
        flat = [first[1][self._names[id(p)]].to(self._w).flatten() for p in self._tensors]
        return self.runs.norm(torch.cat(flat))[: len(self.grouping)]

    # What no data can save.

    def bound_to_vanish(self) -> list[str]:
        """Groups that are zeroed at the first step unless the momentum's share of their gradient exceeds the gap
        between μ_k and what their initial weights hold against it.

        That is τ |w_k(0)| for ProxSGD, |w_k(0)| / lr for RMDA. With an adaptive τ or metric it depends on the first
        gradient: empty before the first step.
        """
        return [name for name, bound in zip(self.grouping.names, self._bounds, strict=True) if bound < self.mu]

    def _warn_from(self, pull: Tensor) -> None:
        """``pull`` [groups]: every group that is not zero is bound to vanish where μ_k is larger. The host waits."""
        pull = pull[: len(self.grouping)]
        self._bound = torch.where(pull > 0, pull / self._scale, float("inf"))
        self._bounds = self._bound.tolist()
        self._warn_if_bound()

    def _warn_if_bound(self) -> None:
        names = self.bound_to_vanish()
        if len(names) > self._warned:
            i = self.grouping.names.index(names[0])
            mu_k = float(self._mu_k[i])
            warnings.warn(
                f"{len(names)} of {len(self.grouping)} groups are bound to be zeroed whatever the data, unless their "
                f"gradients are huge: for '{names[0]}', mu = {mu_k:.3g} against {self._pulls} = "
                f"{self._bounds[i] / self.mu * mu_k:.3g}. Lower mu, or normalise it differently (now "
                f"'{self.normalize}').",
                stacklevel=4,
            )
        self._warned = max(self._warned, len(names))

    # L1 and the box.

    def _check_values(self) -> None:
        super()._check_values()
        for group in self.param_groups:
            at_least_zero("sparsity", group["sparsity"])
            low, high = group["low"], group["high"]
            if not (low is None or low <= 0.0) or not (high is None or high >= 0.0):
                raise TrainingError(f"low={low}, high={high}: the box holds 0, where groups go, so low <= 0 <= high.")

    def _box(self) -> tuple[Tensor | float | None, Tensor | float | None, Boxed | None]:
        """The bounds, and the groups of which the box is no cone, so that the maps do not follow one another."""
        sides = [(group["low"], group["high"]) for group in self.param_groups]
        if all(side == (None, None) for side in sides):
            return None, None, None
        cones = tuple(is_cone(*side) for side in sides)
        if self._cones != cones:
            self._cones, self._boxed = cones, self._groups_in_boxes(cones)
        boxed = None if self.mu == 0.0 else self._boxed
        return self.per_element("low", -float("inf")), self.per_element("high", float("inf")), boxed

    def _groups_in_boxes(self, cones: Sequence[bool]) -> Boxed | None:
        flags = [torch.full((p.numel(),), not cone) for cone, group in zip(cones, self.param_groups, strict=True)
                 for p in group["params"]]  # fmt: skip
        inside = self.runs.sum(torch.cat(flags).to(self._w)) > 0
        inside[len(self.grouping) :] = False  # without a penalty: the box is all
        return Boxed.of(self.runs, inside) if bool(inside.any()) else None

    # Saving.

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "normalize": self.normalize, "exponent": self.exponent}

    def _buffers(self) -> dict[str, Tensor]:
        return {**super()._buffers(), "initial": self._initial, "scale": self._scale, "bound": self._bound}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-identical continuation needs, the model aside."""
        return {**super().state_dict(), "mu": self.mu}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Continue where :meth:`state_dict` was taken. Raises :class:`TrainingError` for a state of other groups or
        settings.
        """
        super().load_state_dict(state_dict)
        if "scale" not in state_dict["buffers"] and self.normalize == "init":  # an older state
            self._scale.copy_(self._initial)
        self._set_mu(state_dict.get("mu", self.mu))
        self._bounds = self._bound.tolist()
        self._warned = len(self.bound_to_vanish())
