"""Stochastic gates on the features of named layers: L0-HC, L0-AR, L0-ARM, and DisARM."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from espalier.errors import TrainingError
from espalier.modes import evaluating
from espalier.space.search_space import SearchSpace
from espalier.space.solution import Solution
from espalier.sparsify.claims import try_sites
from espalier.sparsify.conditional import Narrowing, Part, Places
from espalier.sparsify.folding import along, folded, masks
from espalier.sparsify.gating import Gating, Options
from espalier.sparsify.layer_macs import layer_macs
from espalier.sparsify.passes import same_noise
from espalier.sparsify.penalty import expected_l1, expected_l2
from espalier.sparsify.probability import Probability
from espalier.sparsify.sites import Site


class Gates(Gating):
    """A gate per feature of named layers, trained with the network (L0-ARM; Eqs. 5, 9, 10, 17 and 18).

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

    The gates multiply activations through forward hooks: the model is not edited. A copy of the gates has a model of
    its own; a copy of the model alone still computes with these gates. For gates on the structures
    of a search space see :class:`SpaceGates`. :meth:`backward` draws
    them, evaluates the loss once ("hc", "ar") or twice ("arm", "disarm", both passes with batch norm in the
    same mode, running statistics updated once) and leaves gradients in the model's parameters and in ``phi``.
    Outside of it, gates have their value after training, Eq. (14): π where π exceeds the threshold, else 0.

    The first ``gates(x)`` tries out, in a few more evaluations, whether a unit of each site can go as the site says,
    and raises :class:`TrainingError` where it cannot, as with a batch norm, a sigmoid or a residual addition between
    the layers; ``sliced`` and ``conditional`` also need that no other layer reads the units.

    Args:
        sites: from ``input_gates`` and ``output_gates``.
        g: π = g(φ); not for "hc".
        lam: λ, for all sites or by site name; it is divided by ``examples``, the number N of training
            examples.
        weight_decay: factor of ½ E|θ|² over the gated layers' weights, Eq. (18).
        l1: factor of E|θ| over the same weights, Eq. (15). For "hc", whose gates also lie between 0 and 1, both are
            Louizos et al.'s upper bounds, with P(z ≠ 0) in place of E z and E z².
        initial: probability π of a gate to be open at the start, for all sites or by site name. For "hc" it is
            σ(log α), 1 - droprate in the authors' code: such a gate is not 0 with the larger probability
            σ(logit(initial) - β log(-γ/ζ)), for 0.5 with 0.832, for 0.8 with 0.952.
        per_sample: a draw for each example, in place of one for the whole batch; the loss must then be one
            per example.
        threshold: τ of Eq. (14), from 0 up to but not including 1, or "histogram"; "hc" has its own.
        reference: the paper's gradient factor, biased unless g is the scaled sigmoid.
        conditional: in ``gates(x)``, units whose gate is 0 are not computed, wherever enough are closed for that to
            be faster.
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
        l1: float = 0.0,
        initial: float | Mapping[str, float] = 0.5,
        per_sample: bool = False,
        threshold: float | str = 0.5,
        reference: bool = False,
        conditional: bool = False,
        seed: int = 0,
    ):
        if not sites:
            raise TrainingError("there is nothing to gate: sites is empty.")
        names = [site.name for site in sites]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise TrainingError(
                f"two sites are called '{twice}': give one of them another name, input_gates(..., name='...')."
            )
        own = dict(model.named_parameters())
        for site in sites:
            if not any(own[s.parameter].requires_grad for s in site.slices):
                raise TrainingError(
                    f"'{site.name}' is frozen (requires_grad=False): its gates would have nothing to train."
                )
        options = Options(
            estimator, g, lam, examples, weight_decay, l1, initial, per_sample, threshold, reference, seed
        )
        counts = [site.count for site in sites]
        sizes = torch.tensor([float(s.size) for s in sites]).repeat_interleave(torch.tensor(counts))
        super().__init__(model, names, counts, sizes, options)
        self.sites, self.conditional, self._own = tuple(sites), conditional, own
        self.narrowing = Narrowing.of(self.sites)
        touched = dict.fromkeys(name for name, _ in self.narrowing.index)
        self._places = Places(model, touched)
        self._shapes = {name: tuple(own[name].shape) for name in touched if own[name].ndim > 1}
        stops = torch.tensor(counts).cumsum(0).tolist()
        self._span = [slice(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]
        self._kept: dict[tuple[str, int], Tensor] | None = None
        self._is_open: Tensor | None = None  # of the gates that _kept was found from
        self._arriving_whole = [
            part.parameter
            for site in sites
            for part in site.scaled
            if not site.narrow and len(self.narrowing.index[part.parameter, 1]) == 1
        ]
        self._parts: list[Part] = []
        self._squares: dict[tuple[Any, ...], Tensor] = {}
        self._hooks = [self._attach(i, site) for i, site in enumerate(self.sites)]
        self._checked, self._not_narrow = False, ""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The gated network; within :meth:`backward` narrowed to the open units where ``conditional``."""
        if not self._checked:
            self._check(args, kwargs)
        if self.conditional:
            self.need_narrow()
        z = self._z
        if not self.conditional or z is None or z.ndim > 1:
            return self.model(*args, **kwargs)
        self._is_open = z.detach() > 0
        self._kept = self.narrowing.kept(self._is_open)
        try:
            if any(len(k) == 0 for k in self._kept.values()) or not self._pays(self._kept):
                self._kept = None  # a layer without any unit, or little to leave out: multiply instead
                return self.model(*args, **kwargs)
            for weight in self._arriving_whole:
                if len(self._kept[weight, 1]) > 0.6 * self._own[weight].shape[1]:
                    del self._kept[weight, 1]  # zeros among its inputs cost less than taking its columns out
            parts = self.narrowing.parameters(self._own, self._kept)
            self._parts += parts if torch.is_grad_enabled() else []
            with self._places.holding({part.name: part.value for part in parts}):
                return self.model(*args, **kwargs)
        finally:
            self._kept = None

    def _pays(self, kept: Mapping[tuple[str, int], Tensor]) -> bool:
        """Whether gathering what is open costs less than it saves; limits as measured (benchmarks/conditional.py)."""
        left = sum(
            (len(kept[name, 0]) if (name, 0) in kept else shape[0])
            * (len(kept[name, 1]) if (name, 1) in kept else shape[1])
            * math.prod(shape[2:])
            for name, shape in self._shapes.items()
        )
        total = sum(math.prod(shape) for shape in self._shapes.values())
        return left <= total * (0.9 if any(len(shape) > 2 for shape in self._shapes.values()) else 0.45)

    def expected_norm(self, pi: Tensor, order: int) -> Tensor:
        """``E|θ|`` or ``E|θ|²`` of the gated layers' weights for gates of these probabilities, Eqs. (17) and (18)."""
        own, total, expected = self._own, pi.new_zeros(()), {1: expected_l1, 2: expected_l2}[order]
        for site, span in zip(self.sites, self._span, strict=True):
            for part in site.scaled[:1]:
                total = total + expected(pi[span].view(along(part.dim, own[part.parameter])), own[part.parameter])
        return total

    @torch.no_grad()
    def expected_macs(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *, training: bool = False
    ) -> float:
        """Expected MACs of one forward pass with drawn gates, closed units left out, as a share of the full network's.

        ``args`` and ``kwargs`` are an example input. ``training``: of all passes of a training step, two for "arm"
        and "disarm" (Figure 3 of the paper). A layer's share is the mean over its weights of the probability that
        both their units are open, gates being drawn alone; all that is not gated counts in full.
        """
        weights = {name.rpartition(".")[0]: name for name in self._shapes}
        found, pi = layer_macs(self.model, weights, args, kwargs), self.probabilities()
        saved = sum(found[layer] * (1.0 - self.narrowing.expected_share(name, pi)) for layer, name in weights.items())
        passes = 2 if training and self.estimator in ("arm", "disarm") else 1
        return passes * (1.0 - saved / max(found[""], 1))

    # After training.

    def solution(self, space: SearchSpace) -> Solution:
        """What stays: masks of the closed units; ``space`` is the model's search space, of any level."""
        self._need_check()
        made = space.solution((), {"method": f"L0-{self.estimator.upper()}", "open": self.open_counts()})
        return Solution(made.removed, made.fingerprint, self.masks(), made.provenance)

    def masks(self) -> dict[str, Tensor]:
        """Boolean masks of the parameters that closed units of layers leave, by parameter name."""
        self._need_check()
        return masks(self.narrowing, self._own, self.expected().detach() > 0)

    def folded(self) -> dict[str, Tensor]:
        """The gated layers' parameters with kept gates folded in and closed units at zero, by parameter name."""
        self._need_check()
        if self._finished:
            raise TrainingError("these gates are folded into the model already (finish): once is enough.")
        return folded(self.sites, self.narrowing, self._own, self.expected().detach())

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """Fold kept gates into the model's parameters, put closed ones at zero, take the hooks off; returns the
        model. A second call changes nothing.
        """
        if self._finished:
            return self.model
        for name, value in self.folded().items():
            self._own[name].copy_(value)
        for hook in self._hooks:
            hook.remove()
        self._finished = True
        return self.model

    def __deepcopy__(self, memo: dict[int, Any]) -> "Gates":
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for index, (site, handle) in enumerate(zip(made.sites, made._hooks, strict=True)):
            hooks = handle.hooks_dict_ref()
            if hooks is not None and handle.id in hooks:  # not after finish()
                hooks[handle.id] = made._hook(index, site)
        return made

    # Inside.

    def _need_check(self) -> None:
        if not self._checked:
            raise TrainingError(
                "what lies between the gated layers is not known yet: call gates(x) once, with any input, before this."
            )

    def need_narrow(self) -> None:
        """Raises :class:`TrainingError` where the network cannot do without its closed units' slices."""
        if self._not_narrow:
            raise TrainingError(self._not_narrow)

    def _check(self, args: Any, kwargs: Any) -> None:
        """Try out, once, what every site says, on this input; in eval mode, and nothing of the model changes."""
        outside, kind = self._z, self.phi.device.type
        if torch.is_autocast_enabled(kind):
            first = next(self.model.parameters()).dtype
            args, kwargs = pytree.tree_map_only(
                Tensor, lambda t: t.to(first) if t.is_floating_point() else t, (args, kwargs)
            )

        def run(z: Tensor, own: Mapping[str, Tensor], kept: dict[tuple[str, int], Tensor] | None = None) -> Any:
            self._z, self._kept, self._is_open = z, kept, z > 0
            with same_noise(self.model):
                return functional_call(self.model, dict(own), args, dict(kwargs))

        try:
            with torch.no_grad(), evaluating(self.model), torch.autocast(kind, enabled=False):
                faults = try_sites(self.model, self.sites, self.narrowing, self.phi, run)
        finally:
            self._z, self._kept = outside, None
        if faults is not None:
            self._checked, self._not_narrow = True, next(iter(faults), "")

    def _collect(self) -> None:
        for part in self._parts:
            part.put_back()
        self._parts.clear()

    @torch.no_grad()
    def _shrink(self, pi: Tensor, scale: Tensor) -> Tensor:
        """The penalty's gradient, cheaper than by autograd: added to the weights', returned for π."""
        of_pi = self._buffers["_cost"].clone()  # type: ignore[union-attr]
        if self.l1:
            return super()._shrink(pi, scale)
        if not self.weight_decay:
            return of_pi
        own, decay = self._own, pi * self.weight_decay * scale
        for site, span in zip(self.sites, self._span, strict=True):
            for part in site.scaled[:1]:
                weight = own[part.parameter]
                others = [d for d in range(weight.ndim) if d != part.dim]
                key = part.parameter, weight.dtype, weight.device
                if key not in self._squares:  # new memory at each step costs more than the arithmetic
                    self._squares[key] = torch.empty_like(weight)
                squares = torch.mul(weight, weight, out=self._squares[key])
                of_pi[span].add_(squares.sum(others), alpha=0.5 * self.weight_decay)
                if weight.requires_grad:
                    if weight.grad is None:
                        weight.grad = torch.zeros_like(weight)
                    weight.grad.addcmul_(weight, decay[span].to(weight.dtype).view(along(part.dim, weight)))
        return of_pi

    def _attach(self, index: int, site: Site) -> Any:
        layer, hook = self.model.get_submodule(site.layer), self._hook(index, site)
        return layer.register_forward_pre_hook(hook) if site.side == "input" else layer.register_forward_hook(hook)

    def _hook(self, index: int, site: Site) -> Callable[..., Any]:
        layer = self.model.get_submodule(site.layer)
        last = -1 if isinstance(layer, nn.Linear) else 1
        own = (site.scaled[0].parameter, site.scaled[0].dim or 0)

        def value(x: Tensor) -> Tensor | None:
            z = self._z
            if z is None:
                z = self.expected().detach()
            z = z[..., self._span[index]]
            if self._kept is not None and own in self._kept:
                if self.estimator != "hc":
                    return None  # the gates of all units that are here are 1
                z = z[self._kept[own]]
            shape = [1] * x.ndim
            if z.ndim > 1:
                shape[0] = len(z)
            shape[last] = z.shape[-1]
            return z.to(x.dtype).view(shape)

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            if self._kept is not None and own in self._kept and self._is_open is not None:
                chosen = self.narrowing.selection(f"{site.layer}.weight", self._is_open, self._kept)
                x = x if chosen is None else x.index_select(1, chosen)
            z = value(x)
            return (x if z is None else x * z, *args[1:])

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            z = value(output)
            return output if z is None else output * z

        return before if site.side == "input" else after
