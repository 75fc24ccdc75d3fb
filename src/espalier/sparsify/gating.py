"""What all gates share: their parameters φ, the estimators, and the training step (section 3 of L0-ARM)."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from espalier.errors import TrainingError
from espalier.sparsify.estimators import ESTIMATORS, draw, gradient
from espalier.sparsify.finite import Watch
from espalier.sparsify.foreach import flattened
from espalier.sparsify.hard_concrete import HardConcrete
from espalier.sparsify.passes import frozen_statistics, same_noise
from espalier.sparsify.penalty import expected_l0
from espalier.sparsify.probability import Probability, Sigmoid, draw_phi
from espalier.sparsify.recomputation import recomputation_refused
from espalier.sparsify.threshold import checked_threshold, histogram_threshold


@dataclass(frozen=True)
class Options:
    """How gates are trained; see :class:`Gating`."""

    estimator: str = "arm"
    g: Probability | None = None
    lam: float | Mapping[str, float] = 0.0
    examples: int = 1
    weight_decay: float = 0.0
    l1: float = 0.0
    initial: float | Mapping[str, float] = 0.5
    per_sample: bool = False
    threshold: float | str = 0.5
    reference: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.estimator not in ("hc", *ESTIMATORS):
            raise TrainingError(f"unknown estimator '{self.estimator}': there are hc, {', '.join(ESTIMATORS)}.")
        if self.g is not None and not hasattr(self.g, "logit_slope"):
            raise TrainingError(f"g is a function such as Sigmoid(k=7.0) or HardSigmoid(), not {self.g!r}.")
        for name in ("lam", "initial"):
            value = getattr(self, name)
            numbers = value.values() if isinstance(value, Mapping) else [value]
            if not all(hasattr(n, "__float__") for n in numbers):
                raise TrainingError(f"{name} is a number, or one for each site by its name, not {value!r}.")


class Gating(nn.Module):
    """Gates of a model; a subclass says what they multiply. ``phi`` [V] are their parameters, site after site.

    ``names``, ``counts`` and ``sizes`` describe the sites: sizes [V] are the weights behind each gate (|g| of Eq.
    17).
    """

    phi: nn.Parameter
    acts_in_calls = False  # whether the gates act in ``gates(x)`` alone, and not wherever the model is called

    def __init__(self, model: nn.Module, names: Sequence[str], counts: Sequence[int], sizes: Tensor, options: Options):
        super().__init__()
        self._model = [model]  # in a list, so that the model's parameters stay its own
        self.names, self.counts = tuple(names), tuple(counts)
        self.estimator, self.g, self.concrete = options.estimator, options.g or Sigmoid(), HardConcrete()
        self.weight_decay, self.l1, self.per_sample = options.weight_decay, options.l1, options.per_sample
        self.threshold, self.reference = options.threshold, options.reference
        self._generator = torch.Generator().manual_seed(options.seed)
        pi = self._spread(options.initial, "initial")
        if not bool(((pi > 0) & (pi < 1)).all()):
            raise TrainingError("initial: probabilities lie strictly between 0 and 1.")
        if self.estimator == "hc":
            phi = torch.logit(pi) + torch.randn(len(pi), generator=self._generator) * 0.01
        else:
            phi = draw_phi(self.g, pi, self._generator)
        lam = self._spread(options.lam, "lam")
        if not bool(((lam >= 0) & (lam < math.inf)).all()) or not 1 <= options.examples < math.inf:
            raise TrainingError(
                "lam is at least 0, and examples, the number of training examples, at least 1; both are finite."
            )
        if not (0 <= self.weight_decay < math.inf and 0 <= self.l1 < math.inf):
            raise TrainingError(f"weight_decay and l1 are at least 0 and finite, not {self.weight_decay}, {self.l1}.")
        device = next(model.parameters()).device
        self.phi = nn.Parameter(phi.to(device))
        self.register_buffer("_cost", (lam * sizes / options.examples).to(phi.dtype).to(device), persistent=False)
        self._z: Tensor | None = None
        self._was_called = False
        self._watch = Watch()
        self._finished = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._was_called = True
        return super().__call__(*args, **kwargs)

    @property
    def threshold(self) -> float | str:
        """τ of Eq. (14), in [0, 1), or "histogram"."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float | str) -> None:
        self._threshold = checked_threshold(value)

    @property
    def model(self) -> nn.Module:
        """The gated network."""
        return self._model[0]

    def train(self, mode: bool = True) -> Self:
        """Training mode, or eval mode, for the gates and for the model."""
        self.model.train(mode)
        return super().train(mode)

    # What the gates are.

    def probabilities(self) -> Tensor:
        """The probability of every gate to be open [V], site after site."""
        return self.concrete.open_probability(self.phi) if self.estimator == "hc" else self.g(self.phi)

    def expected(self) -> Tensor:
        """The value of every gate after training [V]: Eq. (14), or the hard concrete's own."""
        if self.estimator == "hc":
            return self.concrete.expected(self.phi)
        pi = self.g(self.phi)
        tau = histogram_threshold(pi) if self.threshold == "histogram" else float(self.threshold)
        return torch.where(pi > tau, pi, 0.0)

    def by_site(self, values: Tensor) -> dict[str, Tensor]:
        """Split a vector over all gates into one per site."""
        return dict(zip(self.names, values.split(self.counts), strict=True))

    def open_counts(self) -> dict[str, int]:
        """How many gates of each site stay open after training."""
        return {name: int((z > 0).sum()) for name, z in self.by_site(self.expected().detach()).items()}

    # Training.

    @abstractmethod
    def expected_norm(self, pi: Tensor, order: int) -> Tensor:
        """``E|θ|`` (order 1, Eqs. 15 and 17) or ``E|θ|²`` (order 2, Eqs. 16 and 18) of the gated parameters, for gates
        of these probabilities.
        """

    def penalty(self) -> Tensor:
        """``λ/N Σ |g| π_g + l1 E|θ| + ½ weight_decay E|θ|²`` (Eqs. 15 to 18), differentiable."""
        pi = self.probabilities()
        total = expected_l0(pi, self._buffers["_cost"])  # type: ignore[arg-type]
        return total + self._of_weights(pi)

    def backward(
        self,
        loss: Callable[[], Tensor],
        batch_size: int | None = None,
        scaler: torch.amp.GradScaler | None = None,
        penalty_share: float = 1.0,
    ) -> Tensor:
        """Draw gates, evaluate ``loss`` under them, and leave gradients everywhere; returns the loss (mean,
        no penalty).

        ``loss`` runs the model through ``gates(x)`` and returns the batch's mean loss, or with ``per_sample``
        one loss per example [B], B = ``batch_size``. With a ``scaler`` all gradients are scaled, for
        ``scaler.unscale_(opt)`` and ``scaler.step(opt)`` to follow. Under ``torch.distributed`` all gradients are
        averaged over ranks, which draw the same gates (``per_sample``: the same for their first, second, ... example).
        ``penalty_share`` is the share of the penalty that this call adds: 1/k where k calls, with losses divided by k,
        make one step of the optimizer.

        Raises :class:`TrainingError` for a misshapen loss, one that nothing trainable depends on, for activation
        checkpointing, and for losses (of either pass, on any rank: then on all) or gradients that are not finite; with
        an enabled scaler gradients are its business. On an accelerator, which the step does not wait for, what is not
        finite is raised two steps later.
        """
        if self._finished:
            raise TrainingError("these gates are folded into the model (finish): there is nothing left to train.")
        if not callable(loss):
            raise TrainingError(
                f"backward takes a function that evaluates the loss, backward(lambda: criterion(gates(x), y)), not a "
                f"{type(loss).__name__}: the gates are drawn before it is called."
            )
        if not self.phi.requires_grad:
            raise TrainingError("phi is frozen (requires_grad=False): the gates would not train.")
        if not penalty_share >= 0.0:
            raise TrainingError(f"penalty_share is at least 0, not {penalty_share}.")
        if self.per_sample and not batch_size:
            raise TrainingError("per_sample=True: give backward() the batch_size.")
        u, partner = self._noise(batch_size), None
        if self.estimator == "hc":
            f = self._evaluate(loss, self.concrete.sample(self.phi, u))
        else:
            with torch.no_grad():
                z, opposite = draw(self.phi, self.g, u)
            if self.estimator != "ar":
                with torch.no_grad(), same_noise(self.model), frozen_statistics(self.model):
                    partner = self._evaluate(loss, opposite)
            f = self._evaluate(loss, z)
        if not f.requires_grad:
            raise TrainingError(self._why_no_gradient())
        mean, scale = f.mean(), torch.ones((), device=f.device)
        if scaler is not None:
            scale = scaler.scale(scale)
        pi = self.probabilities()
        share = scale if penalty_share == 1.0 else scale * penalty_share
        of_pi = share * self._shrink(pi.detach(), share)
        with recomputation_refused(self.model):
            torch.autograd.backward([mean * scale, pi], [torch.ones_like(mean), of_pi])
        self._collect()
        with torch.no_grad():
            if self.estimator != "hc":
                estimate = gradient(self.estimator, f.detach(), partner, u, self.phi, self.g, self.reference)
                assert self.phi.grad is not None
                self.phi.grad += estimate * scale
            both = mean.detach() if partner is None else mean.detach() + partner.mean()
            self._exchange(both, scaled=scaler is not None and scaler.is_enabled())
        return mean.detach()

    def clamp_(self) -> None:
        """After the optimizer's step, for "hc": keep log α in the authors' range."""
        if self.estimator == "hc":
            with torch.no_grad():
                self.concrete.clamp_(self.phi)

    def get_extra_state(self) -> dict[str, Any]:
        """The random numbers' state, so that a resumed run draws the same gates, and what φ means."""
        return {"generator": self._generator.get_state(), "gate": self._gate}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        saved = state.get("gate", self._gate)
        if saved != self._gate:
            raise TrainingError(
                f"this state is of gates whose π is {saved}, and these are {self._gate}: make the gates with the same "
                "estimator and g."
            )
        self._generator.set_state(state["generator"].cpu())  # torch.load may have mapped it to a device

    # Inside.

    @property
    def _gate(self) -> str:
        """How φ is read."""
        return "hard concrete" if self.estimator == "hc" else f"{type(self.g).__name__}(k={float(self.g.k)})"

    def _noise(self, batch_size: int | None) -> Tensor:
        """Uniform noise [V], or with ``per_sample`` [B, V]; either takes as much of the generator, whatever B is."""
        if not self.per_sample:
            return torch.rand(len(self.phi), generator=self._generator).to(self.phi.device)
        seed = int(torch.randint(2**62, (), generator=self._generator))
        own = torch.Generator().manual_seed(seed)
        return torch.rand((batch_size or 0, len(self.phi)), generator=own).to(self.phi.device)

    def _why_no_gradient(self) -> str:
        frozen = [name for name, p in self.model.named_parameters() if not p.requires_grad]
        if frozen:
            return (
                f"nothing trainable is left in the loss: '{frozen[0]}' is frozen (requires_grad=False). Gates are "
                "trained with their network: set requires_grad_(True), or stop calling backward()."
            )
        return "the loss has no gradient: return it as the model gives it, not detached, and not under torch.no_grad()."

    def _exchange(self, loss: Tensor, scaled: bool) -> None:
        """Average gradients over ranks, and see that all is finite."""
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        if self.phi.grad is not None:
            gradients["phi"] = self.phi.grad
        self._watch.lag = 0 if loss.device.type == "cpu" else 2
        own = float(loss) if self._watch.lag == 0 else None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            loss = loss.reshape(1).to(self.phi.dtype, copy=True)
            _average([loss, *gradients.values()])
            loss = loss[0]
        self._watch.see(loss, {} if scaled else gradients, own)

    def _collect(self) -> None:
        """Bring gradients that the backward pass left elsewhere to the model's parameters."""

    def _of_weights(self, pi: Tensor) -> Tensor:
        """The penalty on the weights' norms."""
        total = pi.new_zeros(())
        if self.l1:
            total = total + self.l1 * self.expected_norm(pi, 1)
        if self.weight_decay:
            total = total + 0.5 * self.weight_decay * self.expected_norm(pi, 2)
        return total

    def _shrink(self, pi: Tensor, scale: Tensor) -> Tensor:
        """The penalty's gradient: times ``scale`` added to the weights', returned for π."""
        of_pi = self._buffers["_cost"].clone()  # type: ignore[union-attr]
        if not self.weight_decay and not self.l1:
            return of_pi
        own = [p for p in self.model.parameters() if p.requires_grad]
        pi = pi.requires_grad_()
        with torch.enable_grad():
            norms = self._of_weights(pi)
        for_pi, *for_own = torch.autograd.grad(norms, [pi, *own], allow_unused=True)
        for p, found in zip(own, for_own, strict=True):
            if found is not None:
                p.grad = found * scale if p.grad is None else p.grad.addcmul_(found, scale)
        return of_pi + for_pi

    def _spread(self, value: float | Mapping[str, float], what: str) -> Tensor:
        if isinstance(value, Mapping):
            unknown = set(value) ^ set(self.names)
            if unknown:
                raise TrainingError(
                    f"{what}: '{sorted(unknown)[0]}' is missing or no site's name; the sites are "
                    f"{', '.join(self.names)}."
                )
        per_site = [float(value[name] if isinstance(value, Mapping) else value) for name in self.names]
        return torch.tensor(per_site).repeat_interleave(torch.tensor(self.counts))

    def _evaluate(self, loss: Callable[[], Tensor], z: Tensor) -> Tensor:
        self._z, self._was_called = z, False
        try:
            f = loss()
        finally:
            self._z = None
        if not isinstance(f, Tensor):
            raise TrainingError(f"the loss is a {type(f).__name__}, expected a tensor: return it from the function.")
        if self.acts_in_calls and not self._was_called:
            raise TrainingError("the loss did not run the model through gates(x), where the gates act: call that.")
        wanted = (z.shape[0],) if z.ndim > 1 else ()
        if f.shape != wanted:
            raise TrainingError(f"the loss has shape {tuple(f.shape)}, expected {wanted}; see per_sample.")
        return f


def _average(gradients: Sequence[Tensor]) -> None:
    """The mean over all ranks, in one exchange per type."""
    for kind in dict.fromkeys(g.dtype for g in gradients):
        mine = [g for g in gradients if g.dtype == kind]
        joined = flattened(mine)
        torch.distributed.all_reduce(joined)
        joined /= torch.distributed.get_world_size()
        for own, part in zip(mine, joined.split([g.numel() for g in mine]), strict=True):
            own.copy_(part.view_as(own))
