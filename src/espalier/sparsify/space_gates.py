"""Gates on the structures of any search space, or on single weights: θ = θ̃ z, with the model left as it is."""

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from espalier.errors import SpaceError, TrainingError
from espalier.space.search_space import SearchSpace
from espalier.space.solution import Solution
from espalier.space.structure import Family, Slices
from espalier.sparsify import foreach
from espalier.sparsify.factors import Factors
from espalier.sparsify.gating import Gating, Options
from espalier.sparsify.last_linear import last_linear
from espalier.sparsify.over_open import averages, over_what_stays, statistics_over_open
from espalier.sparsify.per_sample import PerSample
from espalier.sparsify.probability import Probability
from espalier.sparsify.scaling import elements, scaled_slices
from espalier.sparsify.skipping import skipping_of


class SpaceGates(Gating):
    """A gate per structure of a search space (segment, channel, head, kernel), or per weight.

    >>> from espalier import construct, search_space
    >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 4)
    >>> space = search_space(model, x, levels=("channel",))
    >>> gates = SpaceGates(space, estimator="arm", lam=0.1, examples=100, seed=1)
    >>> opt = torch.optim.Adam([*model.parameters(), *gates.parameters()], lr=0.01)
    >>> for _ in range(3):
    ...     opt.zero_grad()
    ...     loss = gates.backward(lambda: nn.functional.cross_entropy(gates(x), torch.zeros(16, dtype=torch.long)))
    ...     opt.step()
    >>> before, solution = gates(x), gates.solution()
    >>> gates.finish() is model
    True
    >>> torch.allclose(construct(space, solution)(x), before, atol=1e-6)
    True

    Call ``gates(x)`` in place of ``model(x)``. A gate multiplies the slices of the parameters that write its
    structure's output, so that a gate at 0 is the structure removed, exactly: norms and means over an axis with
    closed gates take their statistics over the open ones. Within :meth:`backward` gates are drawn; outside of it
    they have their value after training, Eq. (14), and structures that cannot go together with the others stay
    open at their π, in ascending order of it.

    Args:
        space: the model's search space, at any levels; one site per family.
        levels: the levels to gate, of the space's, or "weight": one gate per element of every linear and
            convolutional weight (of ``weights`` alone, where these names of parameters are given).
        families: names of the space's families to gate; by default all of these levels.
        per_sample: a draw for each example, by ``torch.func.vmap`` (where it cannot run the model, a warning says so
            and each example is a pass of its own): every input has the batch first, and batch norms are in eval mode.
        conditional: segments whose gate is 0 are not computed, and their norms' running statistics stay as they were.
            Gates of all other levels multiply; so do those of segments with ``per_sample`` and beside gated channels
            that a norm averages over: a warning names them.

    A segment's gate multiplies its last linear operators (a convolution's batch norm, attention's output projection),
    and so what the segment yields, once. Where there are none (an LSTM), every gate is 0 or 1: a warning says that what
    is kept is 1 and not its π, and "hc", whose gates lie between, raises :class:`TrainingError`.

    With ``conditional``, and where a norm or a mean goes over gated channels, the network runs as traced: it takes
    the arguments that the space was made with, with their sizes, at any batch size. Others, say ``labels`` or another
    length of sequence, raise :class:`TrainingError`: make the space with them.

    All other arguments are those of :class:`Gates`. Raises :class:`TrainingError` for frozen parameters, where an
    operator averages over a gated axis in a way that gates do not know, and where the model's parameters are no longer
    those that the gates were made for (``load_state_dict(..., assign=True)``).
    """

    acts_in_calls = True

    def __init__(
        self,
        space: SearchSpace,
        *,
        levels: Sequence[str] | None = None,
        families: Sequence[str] | None = None,
        weights: Sequence[str] | None = None,
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
        model = space.model
        shapes = {name: p.shape for name, p in model.named_parameters()}
        self_families, every, scaled = _families(space, levels, families, weights)
        _check_trainable(model, self_families)
        options = Options(
            estimator, g, lam, examples, weight_decay, l1, initial, per_sample, threshold, reference, seed
        )
        counts = [len(f) for f in self_families]
        sizes = torch.cat([elements(f.slices, shapes, len(f)) for f in self_families])
        super().__init__(model, [f.name for f in self_families], counts, sizes, options)
        self.space, self.families = space, self_families
        device, total = self.phi.device, sum(counts)
        self._every, self._scaled = Factors(model, every, total, device), Factors(model, scaled, total, device)
        place = {f.name: k for k, f in enumerate(space.families)}
        self._starts = starts = [0, *torch.tensor(counts).cumsum(0).tolist()]
        whole = [f.segments != () and last_linear(space, f) is None for f in self_families]
        _check_whole([f.name for f, w in zip(self_families, whole, strict=True) if w], estimator)
        self._whole = torch.tensor(whole).repeat_interleave(torch.tensor(counts)).to(device)  # gates that are 0 or 1
        self._structures = [  # first gate, first structure, count
            (starts[k], int(space.structures.offsets[place[f.name]]), len(f))
            for k, f in enumerate(self_families)
            if f.level != "weight"
        ]
        gate_of = torch.full((len(space) + 1,), total)  # structure → gate; total, where none closes it
        for gate, structure, count in self._structures:
            gate_of[structure : structure + count] = torch.arange(gate, gate + count)
        self._gate_of, self._open = gate_of.to(device), torch.ones(len(space) + 1, dtype=torch.bool, device=device)
        norms = averages(space, gate_of < total)
        self._graph = [statistics_over_open(space, gate_of < total, lambda: self._open)]
        self._skipping = skipping_of(space, self_families, norms, per_sample) if conditional else None
        self._each = PerSample(model, self._run)
        self._resolved: tuple[Tensor, float | str, Tensor] | None = None
        self._folded: list[nn.Module] = []  # what finish() returns; in a list, as the model is

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The gated network; after :meth:`finish`, what that returned."""
        if self._finished:
            self._folded[0].training = self.model.training
            return self._folded[0](*args, **kwargs)
        self._check_parameters()
        z = self._z if self._z is not None else self.expected().detach()
        return self._each(z, args, kwargs) if z.ndim > 1 else self._run(z, args, kwargs)

    def expected(self) -> Tensor:
        """The value of every gate after training [V]; what cannot go together with the rest is open at its π."""
        value = super().expected()
        if not self._structures:
            return value
        with torch.inference_mode(False):  # what is kept must serve a later pass with gradients
            phi = self.phi.detach().cpu().to(torch.float64, copy=True)  # by value: not every write raises its version
            known = self._resolved
            if known is None or known[1] != self.threshold or not torch.equal(known[0], phi):
                known = self._resolved = (phi, self.threshold, self._stays(value.detach()))
        value = torch.where(known[2].to(value.device), torch.maximum(value, self.probabilities()), value)
        return torch.where(self._whole & (value > 0), 1.0, value)

    def expected_norm(self, pi: Tensor, order: int) -> Tensor:
        """``E|θ|`` or ``E|θ|²`` of all gated parameters for gates of these probabilities, Eqs. (15) to (18)."""
        powers = [p.square() if order == 2 else p.abs() for p in self._every.tensors]
        return torch.stack([s.sum() for s in foreach.mul(powers, self._every.of(pi))]).sum()

    @torch.no_grad()
    def expected_macs(self) -> float:
        """Share of the MACs of layers with a weight that one pass with drawn gates needs, in expectation (Figure 3).

        Every gate is drawn alone, so that a layer's share is the product over its sliced axes of the mean probability
        that an index is open. "arm" and "disarm" make two passes in training; after it, the cost is that of
        :meth:`solution`.
        """
        pi, macs = self.probabilities(), self._macs
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        share: dict[tuple[str, int], Tensor] = {}
        for family, start in zip(self.families, self._starts, strict=False):
            values = torch.cat([pi[start : start + len(family)], pi.new_ones(1)])
            for s in (*family.slices, *family.readers):
                owner = torch.zeros(1, dtype=torch.long) if s.owner is None else s.owner
                at = (s.parameter, -1 if s.owner is None else s.dim or 0)
                own = values[torch.where(owner < 0, len(family), owner).to(pi.device)]
                share[at] = share[at] * own if at in share else own
        total = 0.0
        for name, amount in macs.items():
            dims = [share[name, d].mean() for d in range(-1, len(shapes[name])) if (name, d) in share]
            total += amount * float(torch.stack(dims).prod() if dims else 1.0)
        return total / max(sum(macs.values()), 1)

    @cached_property
    def _macs(self) -> dict[str, int]:
        """MACs of every layer, counted once."""
        return self.space.macs_by_weight()

    # After training.

    def solution(self) -> Solution:
        """What stays: closed structures are removed, closed weights are masked.

        ``construct`` of it, once :meth:`finish` has folded the gates into the model, equals the gated network
        outside of :meth:`backward`.
        """
        value = self.expected().detach()
        removed = self._names((value == 0).tolist(), self.probabilities().tolist())
        provenance = {"method": f"L0-{self.estimator.upper()}", "open": self.open_counts()}
        made = self.space.solution(removed, provenance)
        masks = {
            f.slices[0].parameter: (z > 0).view(f.grid)
            for f, z in zip(self.families, value.split(self.counts), strict=True)
            if f.level == "weight"
        }
        return Solution(made.removed, made.fingerprint, masks, made.provenance)

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """Fold kept gates into the model's parameters, put closed structures at zero; returns what then computes as
        the gated network and as ``construct`` of :meth:`solution`.

        That is the model itself, unless a norm or a mean goes over channels that are closed: the model's own would
        count their zeros, so that this is the traced network over the model's parameters
        (:func:`~espalier.sparsify.over_open.over_what_stays`). A second call folds nothing and returns the same.
        """
        if not self._finished:
            self._check_parameters()
            value, solution = self.expected(), self.solution()
            foreach.mul_(self._scaled.tensors, self._scaled.of(value))
            foreach.mul_(self._every.tensors, self._every.of((value > 0).to(value)))
            self._folded.append(over_what_stays(self.space, solution))
            self._finished = True
        return self._folded[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> "SpaceGates":
        raise TrainingError(
            "gates hang on the graph of their search space, which cannot be copied: copy the model, make "
            "SpaceGates(space.of(the copy), ...) with the same arguments, and load_state_dict(gates.state_dict())."
        )

    # Inside.

    def _run(self, z: Tensor, args: Any, kwargs: Any, vmapped: bool = False) -> Any:
        self._open = torch.cat([z > 0, z.new_ones(1, dtype=torch.bool)]).index_select(0, self._gate_of)
        factors = self._scaled.of(z)
        pairs = zip(self._scaled.tensors, factors, strict=True)
        scaled = [t * f for t, f in pairs] if vmapped else foreach.mul(self._scaled.tensors, factors)  # no rule there
        network, named = self._graph[0], dict(zip(self._scaled.names, scaled, strict=True))
        if self._skipping is not None:
            closed = (z == 0).tolist()
            names = [
                f.name for f, first in zip(self.families, self._starts, strict=False) if f.segments and closed[first]
            ]
            return self._skipping(names, named, args, kwargs)
        if network is not None:
            network.training = self.model.training
        return functional_call(self.model if network is None else network, named, args, kwargs)

    def _check_parameters(self) -> None:
        """Raise unless the gated parameters are still the model's own."""
        gone = self._every.replaced()
        if gone:
            raise TrainingError(
                f"'{gone}' of the model is not the parameter that these gates were made for: it was replaced "
                "(load_state_dict(assign=True), a parametrization, pruning, a new layer). Load weights without "
                "assign=True, or make the search space, SpaceGates and the optimizer anew, and load_state_dict() the "
                "gates' state."
            )

    def _names(self, chosen: Sequence[bool], order: Sequence[float]) -> list[str]:
        """Names of the structures of the chosen gates, in ascending order."""
        rows = [
            (order[gate + i], self.space.structures[structure + i].name)
            for gate, structure, count in self._structures
            for i in range(count)
            if chosen[gate + i]
        ]
        return [name for _, name in sorted(rows, key=lambda row: row[0])]

    def _stays(self, value: Tensor) -> Tensor:
        """Which closed gates must open again, because the network would not survive: bool [V]."""
        closed = (value == 0).tolist()
        names = self._names(closed, self.probabilities().detach().tolist())
        goes = set(self.space.removable_in_order(names))
        stays = torch.zeros(len(value), dtype=torch.bool)
        for gate, structure, count in self._structures:
            for i in range(count):
                if closed[gate + i] and self.space.structures[structure + i].name not in goes:
                    stays[gate + i] = True
        return stays.to(value.device)


Placed = list[tuple[int, Slices]]


def _families(
    space: SearchSpace, levels: Sequence[str] | None, chosen: Sequence[str] | None, weights: Sequence[str] | None
) -> tuple[list[Family], Placed, Placed]:
    """The gated families, and (first gate, slices) of all their slices and of those that gates multiply."""
    there = list(dict.fromkeys(f.level for f in space.families))
    wanted = ([] if weights else there) if levels is None else list(levels)
    unknown = [level for level in wanted if level not in (*there, "weight")]
    if unknown:
        raise SpaceError(
            f"the search space has no level '{unknown[0]}': it has {', '.join(there) or 'none'}, and there is 'weight'."
        )
    missing = [name for name in chosen or () if name not in {f.name for f in space.families}]
    if missing:
        known = ", ".join(f.name for f in space.families)
        raise SpaceError(f"no family of the search space is called '{missing[0]}'; there are {known}.")
    families = [f for f in space.families if f.level in wanted and (chosen is None or f.name in chosen)]
    if "weight" in wanted or weights:
        families += _weight_families(space, weights)
    if not families:
        raise SpaceError("there is nothing to gate: the search space has no structure of these levels.")
    every: Placed = []
    scaled: Placed = []
    start = 0
    for family in families:
        every += [(start, s) for s in family.slices]
        writes = family.slices if family.level == "weight" else scaled_slices(space, family)
        scaled += [(start, s) for s in writes]
        start += len(family)
    return families, every, scaled


def _weight_families(space: SearchSpace, names: Sequence[str] | None) -> list[Family]:
    own = dict(space.model.named_parameters())
    if names is None:
        first = {id(p): name for name, p in own.items()}
        layers = {n: m for n, m in space.model.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
        computed = [path for path, m in layers.items() if "weight" not in m._parameters]
        if computed:
            raise TrainingError(
                f"'{computed[0]}' computes its weight from other parameters (weight_norm, spectral_norm, pruning): "
                "single weights of it cannot have gates. Make it a parameter first (torch.nn.utils.parametrize."
                "remove_parametrizations, torch.nn.utils.remove_weight_norm, torch.nn.utils.prune.remove), or name "
                "those to gate: weights=[...]."
            )
        there = list(dict.fromkeys(first[id(m.weight)] for m in layers.values()))
        names = [name for name in there if own[name].requires_grad]
        if there and not names:
            raise TrainingError(
                f"all {len(there)} linear and convolutional weights ('{there[0]}' first) are frozen "
                "(requires_grad=False): their gates would have nothing to train with."
            )
    missing = [name for name in names if name not in own]
    if missing:
        raise SpaceError(f"'{missing[0]}' is no parameter of the model (a shared one has its first name only).")
    return [
        Family(
            "weight",
            name,
            own[name].numel(),
            (Slices(name, 0, torch.arange(own[name].numel()).view(own[name].shape)),),
            grid=tuple(own[name].shape),
        )
        for name in names
    ]


def _check_whole(names: Sequence[str], estimator: str) -> None:
    """Refuse, or warn of, segments that a gate between 0 and 1 cannot multiply."""
    if not names:
        return
    listed = ", ".join(f"'{name}'" for name in names)
    why = f"no parameters of {listed} multiply its output once (see espalier.sparsify.last_linear)"
    if estimator == "hc":
        raise TrainingError(
            f"{why}, and the gates of 'hc' lie between 0 and 1: take estimator='arm', or leave it out (families=)."
        )
    warnings.warn(f"{why}: a gate that is kept in the end is 1 there, not its probability.", stacklevel=3)


def _check_trainable(model: nn.Module, families: Sequence[Family]) -> None:
    own = dict(model.named_parameters())
    for family in families:
        if not any(own[name].requires_grad for name in family.parameters):
            raise TrainingError(
                f"'{family.name}' is frozen (requires_grad=False): its gates would have nothing to train with."
            )
