"""Stochastic gates on the structures of any network: L0-HC, L0-AR, L0-ARM, and DisARM."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from espalier.errors import TrainingError
from espalier.space.search_space import SearchSpace
from espalier.space.solution import Solution
from espalier.sparsify.conditional import Narrowing
from espalier.sparsify.estimators import ESTIMATORS, draw, gradient
from espalier.sparsify.hard_concrete import HardConcrete
from espalier.sparsify.passes import frozen_statistics, same_noise
from espalier.sparsify.penalty import expected_l0, expected_l2
from espalier.sparsify.probability import Probability, Sigmoid, draw_phi, logit
from espalier.sparsify.sites import Site
from espalier.sparsify.threshold import histogram_threshold


class Gates(nn.Module):
    """A gate per structure, trained together with the network (L0-ARM; Eqs. 5, 9, 10, 17 and 18).

    >>> from espalier.sparsify import input_gates
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> gates = Gates(model, [input_gates(model, "2", producer="0")], estimator="arm", lam=0.1, examples=100)
    >>> opt = torch.optim.Adam([*model.parameters(), *gates.parameters()], lr=0.01)
    >>> x, y = torch.randn(16, 4), torch.randint(2, (16,))
    >>> for _ in range(3):
    ...     opt.zero_grad()
    ...     loss = gates.backward(lambda: nn.functional.cross_entropy(gates(x), y))
    ...     opt.step()
    >>> gates.probabilities().shape
    torch.Size([8])

    The gates multiply activations through forward hooks: the model is not edited. :meth:`backward` draws
    them, evaluates the loss once ("hc", "ar") or twice ("arm", "disarm", both passes with batch norm in the
    same mode, running statistics updated once) and leaves gradients in the model's parameters and in ``phi``.
    Outside of it, gates have their value after training, Eq. (14): π where π exceeds the threshold, else 0.

    Args:
        sites: from ``input_gates``, ``output_gates`` or ``structure_gates``.
        g: π = g(φ); not for "hc".
        lam: λ, for all sites or by site name; it is divided by ``examples``, the number N of training
            examples.
        weight_decay: factor of ½ E|θ|² over the gated layers' weights, Eq. (18).
        initial: probability of a gate to be open at the start, for all sites or by site name.
        per_sample: a draw for each example, in place of one for the whole batch; the loss must then be one
            per example.
        threshold: τ of Eq. (14), or "histogram".
        reference: the paper's gradient factor, biased unless g is the scaled sigmoid.
        conditional: in ``gates(x)``, units whose gate is 0 are not computed.
        seed: of the gates' own random numbers; equal on all ranks of a distributed run.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        *,
        estimator: str = "arm",
        g: Probability | None = None,
        lam: float | Mapping[str, float] = 0.0,
        examples: int = 1,
        weight_decay: float = 0.0,
        initial: float | Mapping[str, float] = 0.5,
        per_sample: bool = False,
        threshold: float | str = 0.5,
        reference: bool = False,
        conditional: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        if estimator not in ("hc", *ESTIMATORS):
            raise TrainingError(f"unknown estimator '{estimator}': there are hc, {', '.join(ESTIMATORS)}.")
        if not sites:
            raise TrainingError("there is nothing to gate: sites is empty.")
        self._model = [model]  # in a list, so that the model's parameters stay its own
        self.sites = tuple(sites)
        self.estimator, self.g, self.concrete = estimator, g or Sigmoid(), HardConcrete()
        self.weight_decay, self.per_sample = weight_decay, per_sample
        self.threshold, self.reference, self.conditional = threshold, reference, conditional
        self.narrowing = Narrowing.of(self.sites)
        own = dict(model.named_parameters())
        for site in self.sites:
            if not any(own[s.parameter].requires_grad for s in site.slices):
                raise TrainingError(
                    f"'{site.name}' is frozen (requires_grad=False): its gates would have nothing to train."
                )
        starts, stops = [], []
        total = 0
        for site in self.sites:
            starts.append(total)
            total += site.count
            stops.append(total)
        self._span = [slice(a, b) for a, b in zip(starts, stops, strict=True)]
        device = next(model.parameters()).device
        self._generator = torch.Generator().manual_seed(seed)
        pi = self._spread(initial, "initial")
        if bool(((pi <= 0) | (pi >= 1)).any()):
            raise TrainingError("initial: probabilities lie strictly between 0 and 1.")
        if estimator == "hc":
            noise = torch.randn(total, generator=self._generator) * 0.01
            phi = torch.tensor([logit(p) for p in pi.tolist()]) + noise
        else:
            phi = draw_phi(self.g, pi, self._generator)
        lam_of = self._spread(lam, "lam")
        if bool((lam_of < 0).any()) or examples < 1:
            raise TrainingError("lam is at least 0, and examples, the number of training examples, at least 1.")
        size = torch.cat([torch.full((s.count,), float(s.size)) for s in self.sites])
        self.phi = nn.Parameter(phi.to(device))
        self.register_buffer("_cost", (lam_of * size / examples).to(device), persistent=False)
        self._z: Tensor | None = None
        self._kept: Mapping[tuple[str, int], Tensor] | None = None
        self._hooks = [self._attach(i, site) for i, site in enumerate(self.sites)]

    @property
    def model(self) -> nn.Module:
        """The gated network."""
        return self._model[0]

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
        return {site.name: values[span] for site, span in zip(self.sites, self._span, strict=True)}

    def open_counts(self) -> dict[str, int]:
        """How many gates of each site stay open after training."""
        return {name: int((z > 0).sum()) for name, z in self.by_site(self.expected().detach()).items()}

    # Training.

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The gated network; within :meth:`backward` narrowed to the open units where ``conditional``."""
        z = self._z
        if not self.conditional or z is None or z.ndim > 1:
            return self.model(*args, **kwargs)
        self._kept = self.narrowing.kept(z.detach() > 0)
        try:
            if any(len(k) == 0 for k in self._kept.values()):
                self._kept = None  # a layer without any unit: multiply instead
                return self.model(*args, **kwargs)
            return functional_call(self.model, self.narrowing.parameters(self.model, self._kept), args, kwargs)
        finally:
            self._kept = None

    def penalty(self) -> Tensor:
        """``λ/N Σ |g| π_g + ½ weight_decay E|θ|²`` (Eqs. 17 and 18), differentiable."""
        pi = self.probabilities()
        total = expected_l0(pi, self._buffers["_cost"])  # type: ignore[arg-type]
        if self.weight_decay:
            own = dict(self.model.named_parameters())
            for site, span in zip(self.sites, self._span, strict=True):
                for part in site.scaled[:1]:
                    weight = own[part.parameter]
                    shape = [1] * weight.ndim
                    if part.dim is not None:
                        shape[part.dim] = -1
                    total = total + 0.5 * self.weight_decay * expected_l2(pi[span].view(shape), weight)
        return total

    def backward(
        self,
        loss: Callable[[], Tensor],
        batch_size: int | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """Draw gates, evaluate ``loss`` under them, and leave gradients everywhere; returns the loss (mean,
        no penalty).

        ``loss`` runs the model (through ``gates(x)`` or ``model(x)``) and returns the batch's mean loss, or
        with ``per_sample`` one loss per example [B], B = ``batch_size``. Under ``torch.distributed`` the
        gradient of ``phi`` is averaged over ranks. Raises :class:`TrainingError` for a loss that is not
        finite or misshapen.
        """
        if self.per_sample and not batch_size:
            raise TrainingError("per_sample=True: give backward() the batch_size.")
        shape = (batch_size, len(self.phi)) if self.per_sample else (len(self.phi),)
        u = torch.rand(shape, generator=self._generator).to(self.phi.device)  # type: ignore[arg-type]
        partner = None
        if self.estimator == "hc":
            f = self._evaluate(loss, self.concrete.sample(self.phi, u))
        else:
            with torch.no_grad():
                z, opposite = draw(self.phi, self.g, u)
            if self.estimator != "ar":
                with torch.no_grad(), same_noise(self.model), frozen_statistics(self.model):
                    partner = self._evaluate(loss, opposite)
            f = self._evaluate(loss, z)
        mean = f.mean()
        if mean.device.type == "cpu" and not bool(torch.isfinite(mean.detach())):
            raise TrainingError(f"the loss is {float(mean.detach())}: lower the learning rate or clip the gradients.")
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        pi = self.probabilities()
        torch.autograd.backward([mean, pi], [torch.full_like(mean, scale), scale * self._shrink(pi.detach(), scale)])
        if self.estimator != "hc":
            with torch.no_grad():
                estimate = gradient(self.estimator, f.detach(), partner, u, self.phi, self.g, self.reference)
                assert self.phi.grad is not None
                self.phi.grad += estimate * scale
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.phi.grad)
            self.phi.grad /= torch.distributed.get_world_size()  # type: ignore[operator]
        return f.detach().mean()

    def clamp_(self) -> None:
        """After the optimizer's step, for "hc": keep log α in the authors' range."""
        if self.estimator == "hc":
            with torch.no_grad():
                self.concrete.clamp_(self.phi)

    # After training.

    def solution(self, space: SearchSpace) -> Solution:
        """What stays: closed structures are removed, closed units of layers are masked.

        Structures go in ascending π as long as the network stays valid. ``space`` is the model's search
        space.
        """
        value, pi = self.expected().detach(), self.probabilities().detach()
        closed = [
            (float(pi[span]), site.structure)
            for site, span in zip(self.sites, self._span, strict=True)
            if site.structure and not bool(value[span] > 0)
        ]
        removed = space.removable_in_order([name for _, name in sorted(closed)])
        made = space.solution(removed, {"method": f"L0-{self.estimator.upper()}", "open": self.open_counts()})
        return Solution(made.removed, made.fingerprint, self.masks(), made.provenance)

    def masks(self) -> dict[str, Tensor]:
        """Boolean masks of the parameters that closed units of layers leave, by parameter name."""
        own = dict(self.model.named_parameters())
        is_open = self.expected().detach() > 0
        masks: dict[str, Tensor] = {}
        for (name, dim), which in self.narrowing.index.items():
            mask = masks.setdefault(name, torch.ones_like(own[name], dtype=torch.bool))
            for gates in which:
                shape = [1] * mask.ndim
                shape[dim] = -1
                mask &= is_open[gates].view(shape)
        return masks

    def finish(self, space: SearchSpace | None = None) -> nn.Module:
        """Fold kept gates into the model's parameters, put closed ones at zero, take the hooks off; returns
        the model.

        With ``space``, structures that its :meth:`solution` cannot remove are kept open, at their π.
        """
        value, pi = self.expected().detach(), self.probabilities().detach()
        removed = set(self.solution(space).removed) if space is not None else None
        own = dict(self.model.named_parameters())
        masks = self.masks()
        with torch.no_grad():
            for site, span in zip(self.sites, self._span, strict=True):
                gate = value[span]
                if site.structure:
                    stays = bool(gate > 0) if removed is None else site.structure not in removed
                    if not stays:
                        for part in site.slices:
                            own[part.parameter].zero_()
                        continue
                    gate = torch.maximum(gate, pi[span])
                for part in site.scaled:
                    weight = own[part.parameter]
                    shape = [1] * weight.ndim
                    if part.dim is not None:
                        shape[part.dim] = -1
                    weight.mul_((gate if part.owner is None else gate[part.owner]).view(shape))
            for name, mask in masks.items():
                own[name].mul_(mask)
        for hook in self._hooks:
            hook.remove()
        return self.model

    def get_extra_state(self) -> dict[str, Tensor]:
        """The random numbers' state, so that a resumed run draws the same gates."""
        return {"generator": self._generator.get_state()}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        self._generator.set_state(state["generator"])

    # Inside.

    @torch.no_grad()
    def _shrink(self, pi: Tensor, scale: float) -> Tensor:
        """The penalty's gradient, cheaper than by autograd: added to the weights', returned for π."""
        of_pi = self._buffers["_cost"].clone()  # type: ignore[union-attr]
        if not self.weight_decay:
            return of_pi
        own = dict(self.model.named_parameters())
        for site, span in zip(self.sites, self._span, strict=True):
            for part in site.scaled[:1]:
                weight = own[part.parameter]
                others = [d for d in range(weight.ndim) if d != part.dim]
                of_pi[span] += 0.5 * self.weight_decay * weight.square().sum(others)
                if weight.requires_grad:
                    shape = [1] * weight.ndim
                    if part.dim is not None:
                        shape[part.dim] = -1
                    decay = pi[span].to(weight.dtype).view(shape) * (self.weight_decay * scale)
                    if weight.grad is None:
                        weight.grad = torch.zeros_like(weight)
                    weight.grad.addcmul_(weight, decay)
        return of_pi

    def _spread(self, value: float | Mapping[str, float], what: str) -> Tensor:
        if isinstance(value, Mapping):
            unknown = set(value) ^ {s.name for s in self.sites}
            if unknown:
                names = ", ".join(s.name for s in self.sites)
                raise TrainingError(
                    f"{what}: '{sorted(unknown)[0]}' is missing or no site's name; the sites are {names}."
                )
        per_site = [float(value[s.name] if isinstance(value, Mapping) else value) for s in self.sites]
        return torch.cat([torch.full((s.count,), v) for s, v in zip(self.sites, per_site, strict=True)])

    def _evaluate(self, loss: Callable[[], Tensor], z: Tensor) -> Tensor:
        self._z = z
        try:
            f = loss()
        finally:
            self._z = None
        wanted = (z.shape[0],) if z.ndim > 1 else ()
        if f.shape != wanted:
            raise TrainingError(f"the loss has shape {tuple(f.shape)}, expected {wanted}; see per_sample.")
        return f

    def _attach(self, index: int, site: Site) -> Any:
        layer = self.model.get_submodule(site.layer)
        last = -1 if isinstance(layer, nn.Linear) else 1

        def value(x: Tensor) -> Tensor | None:
            z = self._z
            if z is None:
                z = self.expected().detach()
                if site.structure and not site.scaled:
                    z = (z > 0).to(z)
            z = z[..., self._span[index]]
            if self._kept is not None and not site.structure:
                if self.estimator != "hc":
                    return None  # the gates of all units that are here are 1
                part = site.scaled[0]
                assert part.owner is not None
                z = z[self._kept[part.parameter, part.dim or 0]]
            shape = [1] * x.ndim
            if z.ndim > 1:
                shape[0] = len(z)
            shape[last] = z.shape[-1]
            return z.to(x.dtype).view(shape)

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            if self._kept is not None and self._z is not None:
                chosen = self.narrowing.selection(f"{site.layer}.weight", self._z.detach() > 0)
                x = x if chosen is None else x.index_select(1, chosen)
            z = value(x)
            return (x if z is None else x * z, *args[1:])

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            z = value(output)
            return output if z is None else output * z

        return layer.register_forward_pre_hook(before) if site.side == "input" else layer.register_forward_hook(after)
