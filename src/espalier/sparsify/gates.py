"""Stochastic gates on the features of named layers: L0-HC, L0-AR, L0-ARM, and DisARM."""

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
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
from espalier.sparsify.examples import refuse_batch_norms, try_examples
from espalier.sparsify.folding import along, folded, masks
from espalier.sparsify.gating import Gating, Options
from espalier.sparsify.hooks import Hook, hooks_on, is_on, take_off
from espalier.sparsify.layer_macs import layer_macs
from espalier.sparsify.passes import same_noise
from espalier.sparsify.penalty import add_decay, expected_l1, expected_l2
from espalier.sparsify.probability import Probability
from espalier.sparsify.sites import Site, checked_sites


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

    The gates multiply activations through forward hooks: the model is not edited. :meth:`finish` folds them into it,
    and :meth:`remove` takes them off without; new gates on the same side of a layer take their place, with a warning,
    and the old ones then raise :class:`TrainingError`. A copy of the gates has a model of its own; a copy of the model
    alone still computes with these gates. :meth:`train` and :meth:`eval` switch the model as well. For gates on the
    structures of a search space see :class:`SpaceGates`. :meth:`backward` draws
    them, evaluates the loss once ("hc", "ar") or twice ("arm", "disarm", both passes with batch norm in the
    same mode, running statistics updated once) and leaves gradients in the model's parameters and in ``phi``.
    Outside of it, gates have their value after training, Eq. (14): π where π exceeds the threshold, else 0.

    The first ``gates(x)`` tries out, in a few more evaluations, whether a unit of each site can go as the site says,
    and raises :class:`TrainingError` where it cannot, as with a batch norm, a sigmoid or a residual addition between
    the layers; ``sliced`` and ``conditional`` also need that no other layer reads the units. An input for which no
    number of the network's output is finite tells nothing: the next is tried.

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
            per example. Dimension 0 of what reaches each gated layer is the batch, and (but for "hc", whose gradient
            goes through the network) nothing mixes examples, as each is credited with its own loss alone: batch norms
            in training mode are refused, and so is what the first ``gates(x)`` of each mode finds out by the first row
            of outputs [B, ...]. A network with, say, the sequence first from end to end, as long as the batch is
            large, cannot be told apart: its gates would be of the wrong examples.
        threshold: τ of Eq. (14), from 0 up to but not including 1, or "histogram"; "hc" has its own.
        reference: the paper's gradient factor, biased unless g is the scaled sigmoid.
        conditional: in ``gates(x)``, units whose gate is 0 are not computed, wherever enough are closed for that to
            be faster. The layers then compute with narrow copies of their parameters, whose gradients
            :meth:`backward` adds to ``.grad``: hooks on the parameters' gradients, and the like of
            ``DistributedDataParallel``, see nothing of it (over ranks :meth:`backward` averages by itself).
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
        sites, own = checked_sites(model, sites), dict(model.named_parameters())
        options = Options(
            estimator, g, lam, examples, weight_decay, l1, initial, per_sample, threshold, reference, seed
        )
        counts = [site.count for site in sites]
        sizes = torch.tensor([float(s.size) for s in sites]).repeat_interleave(torch.tensor(counts))
        super().__init__(model, [site.name for site in sites], counts, sizes, options)
        self.sites, self.conditional, self._own = sites, conditional, own
        self.narrowing = Narrowing.of(self.sites)
        touched = dict.fromkeys(name for name, _ in self.narrowing.index)
        self._places = Places(model, touched)
        self._shapes = {name: tuple(own[name].shape) for name in touched if own[name].ndim > 1}
        stops = torch.tensor(counts).cumsum(0).tolist()
        self._span = [slice(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]
        self._scaling: dict[str, list[tuple[slice, int | None]]] = {}  # weight → the gates it is a product with
        for site, span in zip(sites, self._span, strict=True):
            self._scaling.setdefault(site.scaled[0].parameter, []).append((span, site.scaled[0].dim))
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
        self._checked, self._in_vain, self._not_narrow = False, False, ""
        self._alone: set[bool] = set()  # the model's modes in which examples are known not to mix
        self._replace()
        self._hooks = [self._hook(index).attach() for index in range(len(sites))]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The gated network; within :meth:`backward` narrowed to the open units where ``conditional``."""
        if not self._finished:
            self._need_hooks()
        if not self._checked:
            self._check(args, kwargs)
        if self.conditional:
            self.need_narrow()
        z = self._z
        if z is not None and z.ndim > 1:
            self._check_examples(z.detach(), args, kwargs)
        if not self.conditional or not self._checked or z is None or z.ndim > 1:
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
        """``E|θ|`` or ``E|θ|²`` of the gated layers' weights for gates of these probabilities, Eqs. (15) to (18).

        A weight whose layer has gates on both sides is there with the product of their probabilities.
        """
        total, expected = pi.new_zeros(()), {1: expected_l1, 2: expected_l2}[order]
        for name, gated in self._scaling.items():
            weight = self._own[name]
            both = reduce(torch.mul, [pi[span].view(along(dim, weight)) for span, dim in gated])
            total = total + expected(both, weight)
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
        self._need_hooks()
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
        self.remove()
        self._finished = True
        return self.model

    def remove(self) -> None:
        """Take the hooks off and leave the parameters as they are: the model computes without gates.

        >>> from espalier.sparsify import input_gates
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
        >>> before = model(x)
        >>> gates = Gates(model, [input_gates(model, "2", producer="0")])
        >>> torch.equal(gates(x), before)
        False
        >>> gates.remove()
        >>> torch.equal(model(x), before)
        True

        These gates then only tell what they are: to train, evaluate, fold or slice raises :class:`TrainingError`.
        """
        for hook in self._hooks:
            hook.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Gates":
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for index, handle in enumerate(made._hooks):
            if is_on(handle):  # not after finish() and remove()
                handle.hooks_dict_ref()[handle.id] = made._hook(index)
        return made

    # Inside.

    def _need_check(self) -> None:
        if not self._checked and self._in_vain:
            raise TrainingError(
                f"what lies between the gated layers, '{self.sites[0].layer}' first, is not known: {_IN_VAIN} Call "
                "gates(x) with an input whose output is finite before this."
            )
        if not self._checked:
            raise TrainingError(
                "what lies between the gated layers is not known yet: call gates(x) once, with any input, before this."
            )

    def _need_hooks(self) -> None:
        off = next((site.layer for site, h in zip(self.sites, self._hooks, strict=True) if not is_on(h)), None)
        if off is not None:
            raise TrainingError(
                f"the gates on '{off}' are off (remove(), or other gates took their place), so that these gates "
                "multiply nothing: make new ones, Gates(model, ...)."
            )

    def _hook(self, index: int) -> Hook:
        return Hook(self, index, self._span[index], self._own[self.sites[index].scaled[0].parameter])

    def _replace(self) -> None:
        """Take off what gates a side of a layer that these will gate: both would multiply."""
        for site in self.sites:
            for hook in hooks_on(self.model.get_submodule(site.layer), site.side):
                warnings.warn(
                    f"the {site.side} of '{site.layer}' has gates already: they are taken off, all of them, and the "
                    "new ones take their place. finish() folds gates into the model, remove() takes them off.",
                    stacklevel=3,
                )
                take_off(self.model, hook.gates)
                if not all(is_on(handle) for handle in hook.gates._hooks):  # else they are those of a copy
                    hook.gates.remove()

    def _evaluate(self, loss: Callable[[], Tensor], z: Tensor) -> Tensor:
        self._need_hooks()
        self._parts.clear()  # of a call that was broken off
        return super()._evaluate(loss, z)

    def _check_examples(self, z: Tensor, args: Any, kwargs: Any) -> None:
        """With gates of each example's own [B, V], refuse what mixes examples."""
        if self.estimator == "hc":
            return  # its gradient goes through whatever mixes them
        refuse_batch_norms(self.model)
        if self.model.training in self._alone or len(z) < 2:
            return
        drawn = self._z

        def run(gates: Tensor) -> Any:
            self._z = gates
            return self.model(*args, **kwargs)

        try:
            try_examples(self.model, z, run)
        finally:
            self._z = drawn
        self._alone.add(self.model.training)

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
        elif self.conditional and not self._in_vain:
            warnings.warn(f"conditional=True: {_IN_VAIN} Until one tells, all units are computed.", stacklevel=3)
        self._in_vain = faults is None

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
        decay = pi * self.weight_decay * scale
        for name, gated in self._scaling.items():
            weight = self._own[name]
            key = name, weight.dtype, weight.device
            if key not in self._squares:  # new memory at each step costs more than the arithmetic
                self._squares[key] = torch.empty_like(weight)
            add_decay(weight, gated, (pi, decay), self.weight_decay, of_pi, self._squares[key])
        return of_pi


_IN_VAIN = "the network's output held no finite number, or NaN where gates were closed, for the inputs so far."
