"""Every saliency against a value worked out by hand on a tiny network, and none depends on the structures' order."""

import copy
import hashlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import Nested, Residual
from torch import Tensor, nn

import espalier
from espalier.errors import SpaceError, TrainingError
from espalier.saliency import (
    SALIENCIES,
    Saliency,
    balanced,
    bn_scale,
    group_norm,
    magnitude,
    naswot,
    ntk,
    random,
    synflow,
    taylor,
    worth,
    zen_score,
    zico,
)
from espalier.space.search_space import SearchSpace
from espalier.space.structure import Family, Slices, Structures
from espalier.sparsify.groups import Groups


class Sum(nn.Module):
    """``a x + b x² + c x³`` (or fewer terms) with given factors, each a linear layer without bias."""

    def __init__(self, *factors: float, power: bool = True):
        super().__init__()
        self.power = power
        self.a: nn.Module
        for name, factor in zip("abc", factors, strict=False):
            layer = nn.Linear(1, 1, bias=False).double()
            nn.init.constant_(layer.weight, factor)
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        total, at = self.a(x), x
        for layer in list(self.children())[1:]:
            at = at * x if self.power else at
            total = total + layer(at)
        return total


class Gates(nn.Module):
    """``relu(x) + relu(x - 2) + relu(x + 5)``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(1, 1).double() for _ in range(3))
        with torch.no_grad():
            for layer, shift in ((self.a, 0.0), (self.b, -2.0), (self.c, 5.0)):
                layer.weight.fill_(1.0)
                layer.bias.fill_(shift)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).relu() + self.b(x).relu() + self.c(x).relu()


class Normed(nn.Module):
    """``bn(a x) + b x``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1), nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.a.weight, 3.0)
        nn.init.constant_(self.b.weight, -2.0)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.a(x)) + self.b(x)


def column(*values: float) -> Tensor:
    return torch.tensor([[v] for v in values], dtype=torch.float64)


def scored(model: nn.Module, x: Tensor, saliency: Saliency, gradients: dict[str, float] | None = None) -> list[float]:
    space = espalier.search_space(model, (x,))
    groups = Groups(space)
    given = [
        torch.full_like(t, (gradients or {}).get(n, 0.0)) for n, t in zip(groups.names, groups.tensors, strict=True)
    ]
    scores = dict(zip((s.name for s in space.structures), saliency(space, groups.state(given)).tolist(), strict=True))
    return [scores[name] for name in sorted(scores)]


def test_taylor() -> None:
    """a: 2 · 3 = 6; b: -5 · 4 = -20."""
    found = scored(Sum(2.0, -5.0), column(1, 2), taylor, {"a.weight": 3.0, "b.weight": 4.0})
    assert found == pytest.approx([6.0, 20.0])


def test_taylor_adds_up_before_the_absolute_value() -> None:
    """Weights 1 and -3 under a gradient of 2: |2 - 6| = 4."""
    model = Sum(1.0, 1.0)
    model.a = nn.Linear(1, 1).double()
    nn.init.constant_(model.a.weight, 1.0)
    nn.init.constant_(model.a.bias, -3.0)
    found = scored(model, column(1, 2), taylor, {"a.weight": 2.0, "a.bias": 2.0})
    assert found == pytest.approx([4.0, 0.0])


def test_magnitude() -> None:
    assert scored(Sum(2.0, -5.0), column(1, 2), magnitude) == pytest.approx([2.0, 5.0])


def test_group_norm() -> None:
    assert scored(Sum(2.0, -5.0), column(1, 2), group_norm) == pytest.approx([4.0, 25.0])


def test_what_an_average_is_worth() -> None:
    scores, size = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([10.0, 5.0, 2.0])
    assert worth(taylor, scores, size) is scores
    assert worth(magnitude, scores, size).tolist() == [30.0, 0.0, 5.0]
    assert worth(random(), scores.abs(), size).tolist() == [10.0, 10.0, 1.0]


def test_bn_scale() -> None:
    """The branch with the norm has |-0.25|; the other has none, hence 1."""
    model = Normed()
    nn.init.constant_(model.bn.weight, -0.25)
    assert scored(model, column(1, 2), bn_scale) == pytest.approx([0.25, 1.0])


def test_bn_scale_of_slices() -> None:
    """Channels 0 and 2 of a norm; 1 and 3 of it and the first of another: (1 + 3) / 2 and (2 + 4 + 9) / 3."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(2))
    weights = {"0.weight": torch.tensor([1.0, -2.0, 3.0, -4.0]), "1.weight": torch.tensor([9.0, 7.0])}
    model.load_state_dict(weights, strict=False)
    slices = (Slices("0.weight", 0, torch.tensor([0, 1, 0, 1])), Slices("1.weight", 0, torch.tensor([1, -1])))
    family = Family("channel", "c", 2, slices)

    class Space:
        families, structures = (family,), Structures([family])

        def __init__(self) -> None:
            self.model = model

        def __len__(self) -> int:
            return 2

    state: Any = SimpleNamespace(weight_sq=torch.zeros(2))
    assert bn_scale(Space(), state).tolist() == pytest.approx([2.0, 5.0])  # type: ignore[arg-type]


def test_balanced() -> None:
    """Scores 5, 7 of scalars and 0.1, 0.4, 0.3, 0.3 of others: ranks (k - 1/2) / 2 and / 4, the middle of a tie."""
    model = nn.ParameterDict({"a": torch.ones(1), "a2": torch.ones(1), "b": torch.ones(9), "c": torch.ones(1)})
    model.update({"d": torch.ones(9), "e": torch.ones(4, 2)})
    families = [  # two numbers of two cells may be one structure
        Family("segment", "a", 1, (Slices("a"), Slices("a2")), segments=(0,)),
        *(Family("segment", name, 1, (Slices(name),), segments=(i,)) for i, name in enumerate("bcd", 1)),
        Family("channel", "e", 2, (Slices("e", 0, torch.tensor([0, 0, 1, 1])),)),
    ]
    space: Any = SimpleNamespace(model=model, families=families)
    scores = torch.tensor([5.0, 0.1, 7.0, 0.4, 0.3, 0.3])
    state: Any = None
    found = balanced(lambda space, state: scores)(space, state)  # type: ignore[arg-type]
    assert found.tolist() == pytest.approx([0.25, 0.125, 0.75, 0.875, 0.5, 0.5])


def test_random() -> None:
    expected = [int.from_bytes(hashlib.sha256(f"3:{n}".encode()).digest()[:6], "big") / 2**48 for n in "ab"]
    assert scored(Sum(1.0, 1.0), column(1, 2), random(seed=3)) == pytest.approx(expected)
    assert scored(Sum(1.0, 1.0), column(1, 2), random(seed=4)) != pytest.approx(expected)


def test_synflow() -> None:
    """R = (|2| + |-3| + |4|) · 2 examples of ones, whatever the signs and the input."""
    assert scored(Sum(2.0, -3.0, 4.0), column(7, 8), synflow()) == pytest.approx([4.0, 6.0, 8.0])


def test_synflow_runs_norms_as_in_a_fresh_network() -> None:
    """R = 2 (3 s + |beta| + 2), s = 1 / sqrt(1 + eps): a and gamma each have 3 s, beta its own 0.5."""
    model = Normed()
    model.bn.running_mean.fill_(9.0)  # type: ignore[union-attr]
    nn.init.constant_(model.bn.bias, -0.5)
    s = 1.0 / math.sqrt(1.0 + model.bn.eps)
    assert scored(model, column(1, 2), synflow()) == pytest.approx([2.0 * (3.0 * s + 3.0 * s + 0.5), 2.0 * 2.0])


def test_zico() -> None:
    """Gradients of mean(f y): a sees x, b sees x²; over the batches x = 1 and 3: 1, 3 and 1, 9.

    a: mean 2, deviation 1, log 2; b: mean 5, deviation 4, log 1.25.
    """
    batches = [(column(1.0), column(1.0)), (column(3.0), column(1.0))]
    saliency = zico(batches, lambda output, y: (output * y).mean())
    assert scored(Sum(2.0, -5.0), column(1, 2), saliency) == pytest.approx([math.log(2.0), math.log(1.25)])
    with pytest.raises(TrainingError, match="two batches"):
        zico(batches[:1])


def test_naswot() -> None:
    """x = -1 and 3: units a and b are off and on, c is on for both. det K = |3 1; 1 3| = 8.

    Without a or b, |2 1; 1 2| = 3; without c, |2 0; 0 2| = 4.
    """
    expected = [math.log(8 / 3), math.log(8 / 3), math.log(8 / 4)]
    assert scored(Gates(), column(1, 2), naswot(column(-1, 3))) == pytest.approx(expected)


def test_naswot_of_examples_that_look_alike() -> None:
    """x = 3 and 4: all on, K = |3 3; 3 3|, eigenvalues 6 and 6e-9; without one unit 4 and 4e-9."""
    expected = math.log(36e-9) - math.log(16e-9)
    assert scored(Gates(), column(1, 2), naswot(column(3, 4))) == pytest.approx([expected] * 3)
    with pytest.raises(SpaceError, match="rectifiers"):
        scored(Sum(1.0, 1.0), column(1, 2), naswot())


def test_ntk() -> None:
    """J of x = 1 and 2: (1, 1, 1) and (2, 4, 8). K = |3 14; 14 84|: trace 87, determinant 56.

    Without a (1, 1), (4, 8): |2 12; 12 80|, 82 and 16; without b (1, 1), (2, 8): |2 10; 10 68|, 70 and 36;
    without c (1, 1), (2, 4): |2 6; 6 20|, 22 and 4.
    """

    def kappa(trace: float, det: float) -> float:
        return ((trace + math.sqrt(trace**2 - 4 * det)) / 2) ** 2 / det

    expected = [kappa(*k) - kappa(87, 56) for k in ((82, 16), (70, 36), (22, 4))]
    found = scored(Sum(2.0, -5.0, 1.0), column(5, 6), ntk(column(1, 2)))
    assert found == pytest.approx(expected, rel=1e-9)


def test_zen_score() -> None:
    """f(x) - f(x + alpha e) = -(2 - 5) alpha e: log 3, and log 5 or log 2 with one term left."""
    found = scored(Sum(2.0, -5.0, power=False), column(1, 2), zen_score(redraw=False))
    assert found == pytest.approx([math.log(3 / 5), math.log(3 / 2)])


def test_zen_score_adds_what_norms_divide_by() -> None:
    generator = torch.Generator().manual_seed(0)
    x, e = (torch.randn(8, 1, generator=generator).double() for _ in range(2))
    y = x + 0.1 * e

    def normed(z: Tensor) -> Tensor:
        return (z - z.mean()) / (z.var(correction=0) + 1e-5).sqrt()

    log_sigma = 0.5 * math.log(float((3.0 * x).var(correction=0)) + 1e-5)
    full = math.log(float((normed(3 * x) - normed(3 * y) - 2 * (x - y)).abs().mean())) + log_sigma
    without_a = math.log(float((2 * (x - y)).abs().mean()))
    without_b = math.log(float((normed(3 * x) - normed(3 * y)).abs().mean())) + log_sigma
    found = scored(Normed(), torch.zeros(8, 1).double(), zen_score(alpha=0.1, redraw=False))
    assert found == pytest.approx([full - without_a, full - without_b])


def test_zen_score_draws_its_own_weights() -> None:
    first = scored(Sum(2.0, -5.0), column(1, 2), zen_score(seed=1))
    assert scored(Sum(7.0, 8.0), column(1, 2), zen_score(seed=1)) == first
    assert scored(Sum(7.0, 8.0), column(1, 2), zen_score(seed=2)) != first


# What holds for all.

BATCHES = [
    (torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)).double(), torch.arange(4)) for i in range(3)
]
ALL: dict[str, Saliency] = {**SALIENCIES, "zico": zico(BATCHES)}


def test_the_registry_holds_all() -> None:
    assert set(ALL) == {
        "balanced", "bn_scale", "cosine_magnitude", "group_norm", "magnitude", "naswot", "ntk", "random", "relative",
        "synflow", "taylor", "zen_score", "zico",
    }  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_the_order_of_structures_does_not_matter(name: str) -> None:
    torch.manual_seed(0)
    model = Residual().double()
    space = espalier.search_space(model, (BATCHES[0][0],))
    nn.functional.cross_entropy(model(BATCHES[0][0]), BATCHES[0][1]).backward()
    before = copy.deepcopy(model.state_dict())
    model.train()

    def scores(one: SearchSpace) -> dict[str, float]:
        groups = Groups(one)
        gradients = [t.grad for t in groups.tensors if t.grad is not None]
        with torch.no_grad():  # as within a step
            found = ALL[name](one, groups.state(gradients))
        assert found.shape == (len(one),)
        assert bool(found.isfinite().all())
        return dict(zip((s.name for s in one.structures), found.tolist(), strict=True))

    first = scores(space)
    turned = SearchSpace(space.trace, space.graph, space.families[::-1], space.kept)
    draws = torch.random.get_rng_state()
    assert scores(turned) == pytest.approx(first, rel=1e-9, abs=1e-12)
    assert torch.equal(draws, torch.random.get_rng_state())
    assert len(first) > 2
    assert model.training
    assert all(m.training for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", sorted(SALIENCIES))
def test_a_name_stands_for_the_function(name: str) -> None:
    def train(saliency: Saliency | str) -> tuple[str, ...]:
        torch.manual_seed(0)
        model, x = Residual().double(), BATCHES[0][0]
        space = espalier.search_space(model, (x,))
        opt = espalier.H2SPG(space, lr=0.1, warmup_steps=2, projection_steps=1, saliency=saliency, score_every=2)
        for _ in range(3):
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), BATCHES[0][1]).backward()
            opt.step()
        return opt.solution().removed

    assert train(name) == train(SALIENCIES[name]) != ()


def test_unknown_names() -> None:
    space = espalier.search_space(Residual(), (torch.randn(2, 3, 8, 8),))
    with pytest.raises(TrainingError, match=r"'taylr': there are balanced, bn_scale, cosine_magnitude"):
        espalier.H2SPG(space, lr=0.1, saliency="taylr")
    with pytest.raises(TrainingError, match=r"espalier\.saliency\.zico\(\.\.\.\)"):
        espalier.H2SPG(space, lr=0.1, saliency="zico")


def test_score_every() -> None:
    calls = []

    def count(space: SearchSpace, state: Any) -> Tensor:
        calls.append(1)
        return torch.arange(len(space), dtype=torch.float64)

    model = Residual()
    space = espalier.search_space(model, (torch.randn(2, 3, 8, 8),))
    opt = espalier.H2SPG(space, lr=0.1, warmup_steps=7, projection_steps=1, saliency=count, score_every=3)
    for _ in range(8):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        opt.step()
    assert len(calls) == 3
    with pytest.raises(TrainingError, match="score_every"):
        espalier.H2SPG(space, lr=0.1, score_every=0)


def test_a_structure_that_cannot_go_alone_scores_as_the_highest() -> None:
    """In ``a(x) b(x)`` alone neither factor may go while the product is returned."""

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(2, 2).double() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return (self.a(x) * self.b(x)) * (self.c(x) + self.d(x)).relu()

    model = Alone()
    x = torch.randn(3, 2).double()
    found = scored(model, x, naswot())
    space = espalier.search_space(model, (x,))
    assert [space.is_valid([n]) for n in "abcd"] == [False, False, True, True]
    assert found[0] == found[1] == max(found[2:])


def test_a_dead_part_goes_with_its_reader() -> None:
    """Without c, a and b are no longer read: their rectifiers (none here) and weights leave the kernel too."""
    torch.manual_seed(0)
    model = Nested().double()
    x = torch.randn(3, 4).double()
    a, b, c = scored(model, x, ntk())
    jacobian = []
    for example in x:
        model.zero_grad()
        model(example[None]).sum().backward()
        jacobian.append({n: p.grad.flatten().clone() for n, p in model.named_parameters() if p.grad is not None})

    def kappa(*kept: str) -> float:
        rows = torch.stack([torch.cat([g for n, g in row.items() if n[0] in kept]) for row in jacobian])
        values = torch.linalg.eigvalsh(rows @ rows.T)
        return float(values[-1] / values[0])

    assert c == pytest.approx(1e9 - kappa("a", "b", "c"))
    assert min(a, b) < c
