"""The half-space family over slices: channels, kernels and segments in one space, against loops over structures."""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from test_halfspace_policies import NoWaiting
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import espalier
from espalier.errors import BudgetError, InvalidSolution
from espalier.saliency import SALIENCIES
from espalier.sparsify.groups import Groups
from espalier.sparsify.loop import HalfSpace

HALF = espalier.Budget(structures=0.5)
JOINT = ("segment", "channel", "kernel")


class Small(nn.Module):
    """A stem and two residual blocks with batch norms; a tensor lies in up to three families."""

    def __init__(self, width: int = 6, inner: int = 5) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.first = nn.ModuleList(nn.Conv2d(width, inner, 3, padding=1, bias=False) for _ in range(2))
        self.first_norm = nn.ModuleList(nn.BatchNorm2d(inner) for _ in range(2))
        self.second = nn.ModuleList(nn.Conv2d(inner, width, 3, padding=1) for _ in range(2))
        self.out = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        for first, norm, second in zip(self.first, self.first_norm, self.second, strict=True):
            x = x + second(norm(first(x)).relu())
        return self.out(x.mean((2, 3)))


@functools.cache
def made(levels: tuple[str, ...], dtype: torch.dtype) -> tuple[Small, espalier.SearchSpace, Mapping[str, Tensor]]:
    torch.manual_seed(0)
    model = Small().to(dtype)
    for norm in (model.norm, *model.first_norm):
        assert isinstance(norm, nn.BatchNorm2d)
        nn.init.uniform_(norm.weight, 0.3, 1.5)
        nn.init.normal_(norm.bias, 0.0, 0.3)
    space = espalier.search_space(model.eval(), (torch.randn(2, 3, 6, 6, dtype=dtype),), levels=levels)
    space.reachable_cost(())  # counted once per space
    return model, space, copy.deepcopy(model.state_dict())


def fresh(
    levels: tuple[str, ...] = ("channel",), dtype: torch.dtype = torch.float64
) -> tuple[Small, espalier.SearchSpace, Tensor, Tensor]:
    """The same model and space every time, as they were in the beginning; one at a time is in use."""
    model, space, initial = made(levels, dtype)
    model.train().load_state_dict(initial)
    model.zero_grad()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 3, 6, 6, generator=generator, dtype=dtype)
    return model, space, x, torch.randint(0, 4, (16,), generator=generator)


def train(model: nn.Module, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int) -> None:
    for _ in range(steps):
        opt.zero_grad()
        cross_entropy(model(x), y).backward()
        opt.step()


def members(space: espalier.SearchSpace, name: str) -> dict[str, Tensor]:
    """Parameter → where its elements belong to this structure (bool, of its shape), element by element."""
    k, index = space.structures.place(space.position(name))
    found: dict[str, Tensor] = {}
    for s in space.families[k].slices:
        p = space.model.get_parameter(s.parameter)
        mask = torch.zeros(p.shape, dtype=torch.bool)
        if s.owner is None or s.dim is None:
            mask[...] = True
        else:
            for at in (s.owner == index).nonzero().tolist():
                mask[(slice(None),) * s.dim + tuple(at)] = True
        found[s.parameter] = found.get(s.parameter, torch.zeros_like(mask)) | mask
    return found


def chosen(values: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([values[n][mask] for n, mask in own.items()])


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("levels", [("channel",), ("kernel",), JOINT])
def test_sums_equal_the_loop_over_structures(levels: tuple[str, ...]) -> None:
    model, space, x, y = fresh(levels)
    cross_entropy(model(x), y).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    groups = Groups(space)
    assert len(set(groups.names)) == len(groups.names)
    state = groups.state([gradients[n] for n in groups.names])
    few = groups.only(range(1, len(space), 3))
    partial = few.squares([model.get_parameter(n).detach() for n in few.names])
    for i, structure in enumerate(space.structures):
        own = members(space, structure.name)
        w, g = chosen(weights(model), own), chosen(gradients, own)
        torch.testing.assert_close(state.weight_sq[i], w @ w)
        torch.testing.assert_close(state.grad_sq[i], g @ g)
        torch.testing.assert_close(state.dot[i], w @ g, rtol=1e-6, atol=1e-12)
        assert state.size[i] == len(w)
        torch.testing.assert_close(partial[i], w @ w if i % 3 == 1 else torch.zeros_like(partial[i]))


def test_saliencies_give_one_score_per_structure() -> None:
    model, space, x, y = fresh(JOINT)
    cross_entropy(model(x), y).backward()
    groups = Groups(space)
    state = groups.state([t.grad for t in groups.tensors if t.grad is not None])
    scores = {
        name: SALIENCIES[name](space, state)
        for name in ("magnitude", "taylor", "bn_scale", "synflow", "balanced", "random", "relative")
    }
    assert all(score.shape == (len(space),) for score in scores.values())
    norms = {"norm.weight", "first_norm.0.weight", "first_norm.1.weight"}
    flows = _flows(model)
    for i, structure in enumerate(space.structures):
        own = members(space, structure.name)
        w = chosen(weights(model), own)
        g = chosen({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, own)
        torch.testing.assert_close(scores["magnitude"][i], w.square().mean().sqrt())
        torch.testing.assert_close(scores["taylor"][i], (w @ g).abs(), rtol=1e-6, atol=1e-12)
        scales = [weights(model)[n][mask].abs() for n, mask in own.items() if n in norms]
        torch.testing.assert_close(scores["bn_scale"][i], torch.cat(scales).mean() if scales else torch.ones_like(w[0]))
        torch.testing.assert_close(scores["synflow"][i], chosen(flows, own).sum())
    sizes = dict(zip(space.structures.names, scores["magnitude"].tolist(), strict=True))
    kinds = [family.names for family in space.families if family.count > 1]
    kinds.append(tuple(family.name for family in space.families if family.count == 1))
    relative = dict(zip(space.structures.names, scores["relative"].tolist(), strict=True))
    for names in kinds:
        mean = sum(sizes[n] for n in names) / len(names)
        assert [relative[n] for n in names] == pytest.approx([sizes[n] / mean for n in names])


def _flows(model: nn.Module) -> dict[str, Tensor]:
    """``|x| dR/d|x|`` of the network of absolute values on ones, with fresh norms."""
    plain = copy.deepcopy(model).eval()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    with torch.no_grad():
        for p in plain.parameters():
            p.abs_()
    plain.zero_grad()
    plain(torch.ones(2, 3, 6, 6, dtype=torch.float64)).sum().backward()
    return {n: p.detach() * p.grad for n, p in plain.named_parameters() if p.grad is not None}


BASES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9, weight_decay=0.02),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}
ARGUMENTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.02}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}


def one_segment_first(space: espalier.SearchSpace, state: Any) -> Tensor:
    """A segment, then anything: what is within the segment as well as what is not."""
    scores = SALIENCIES["random"](space, state)
    segments = [i for i, s in enumerate(space.structures) if s.level == "segment"]
    scores[segments[:1]] = -1.0
    return scores


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("levels", [("channel",), JOINT])
def test_h2spg_equals_the_loop_over_structures(base: str, levels: tuple[str, ...]) -> None:
    """Marked elements go y = (1 - 1/left) x - lr g, whatever ``base`` keeps; all others are its own."""
    model, space, x, y = fresh(levels)
    kind, arguments = ARGUMENTS[base]
    phases: dict[str, Any] = {"warmup_steps": 2, "projection_steps": 7, "test_every": 2, "epsilon": 0.8}
    opt = espalier.H2SPG(space, kind, HALF, saliency=one_segment_first, **phases, **arguments)
    plain = copy.deepcopy(model)
    other = BASES[base](plain.parameters())
    gone: set[str] = set()
    early = 0
    own: dict[str, dict[str, Tensor]] = {}
    for step in range(12):
        train(model, opt, x, y, 1)
        before = weights(plain)
        other.zero_grad()
        cross_entropy(plain(x), y).backward()
        trial = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
        other.step()
        if step >= 2:
            done = step - 2
            own = {name: members(space, name) for name in opt.redundant}
            left = max(7 - done, 1)
            trial = {n: (1 - 1 / left) * before[n] - arguments["lr"] * g for n, g in trial.items()}
            arrived = set()
            for name, mine in own.items():
                a, b = chosen(before, mine), chosen(trial, mine)
                if done < 7 and done % 2 == 0 and a @ b < 0.8 * (a @ a) and a @ a > 0:
                    arrived.add(name)
            gone |= arrived
            early = len(gone) if done < 4 else early
            with torch.no_grad():
                for p, mask in ((n, m) for mine in own.values() for n, m in mine.items()):
                    plain.get_parameter(p)[mask] = trial[p][mask]
                for name, mine in own.items():
                    for n, mask in mine.items() if name in gone or left == 1 else ():
                        plain.get_parameter(n)[mask] = 0.0
        for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, n=name, s=step: f"{n} at {s}: {m}")
    assert opt.phase == "done"
    assert 0 < early < len(opt.redundant)
    if levels == JOINT:  # groups of all three levels head for zero, and some share elements
        assert {space[name].level for name in opt.redundant} == set(levels)
        segment = next(members(space, name) for name in opt.redundant if space[name].level == "segment")
        inside = [
            name for name in opt.redundant if space[name].level != "segment" and segment.keys() & own[name].keys()
        ]
        assert {space[name].level for name in inside} == {"channel", "kernel"}


def test_prox_sg_and_hspg_equal_the_loop_over_structures() -> None:
    """Where groups overlap, shrinking factors are multiplied and penalties added."""
    lam, lr = 0.4, 0.05
    model, space, x, y = fresh(JOINT)
    opt = espalier.ProxSGPlus(space, budget=HALF, lam=lam, lr=lr, momentum=0.9, warmup_steps=1, projection_steps=6)
    train(model, opt, x, y, 1)
    own = {name: members(space, name) for name in opt.redundant}
    for _ in range(4):
        before = weights(model)
        train(model, opt, x, y, 1)
        trial = {n: before[n] - lr * p.grad for n, p in model.named_parameters() if p.grad is not None}
        expected = {n: t.clone() for n, t in trial.items()}
        for mine in own.values():
            shrink = max(0.0, 1.0 - lr * lam / float(chosen(trial, mine).norm()))
            for n, mask in mine.items():
                expected[n][mask] *= shrink
        for mine in own.values():
            torch.testing.assert_close(chosen(weights(model), mine), chosen(expected, mine), rtol=1e-9, atol=1e-12)

    model, space, x, y = fresh(JOINT)
    plain = copy.deepcopy(model)
    hspg = espalier.HSPG(space, lam=lam, lr=lr, warmup_steps=2, projection_steps=6, epsilon=0.5)
    own = {name: members(space, name) for name in space.structures.names}
    zero: set[str] = set()
    for step in range(8):
        train(model, hspg, x, y, 1)
        before = weights(plain)
        plain.zero_grad()
        cross_entropy(plain(x), y).backward()
        moved = {n: before[n] - lr * p.grad for n, p in plain.named_parameters() if p.grad is not None}
        for mine in own.values():
            size = float(chosen(before, mine).norm())
            for n, mask in mine.items():
                moved[n][mask] -= lr * lam * before[n][mask] / size if size else 0.0
        for name, mine in own.items():
            a, b = chosen(before, mine), chosen(moved, mine)
            if step >= 2 and a @ b < 0.5 * (a @ a):
                zero.add(name)
        for name in zero:
            for n, mask in own[name].items():
                moved[n][mask] = 0.0
        with torch.no_grad():
            for n, p in plain.named_parameters():
                p.copy_(moved[n])
                torch.testing.assert_close(model.get_parameter(n), p, rtol=1e-9, atol=1e-12)
    assert 0 < len(zero) < len(space)
    assert zero <= set(hspg.redundant)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("levels", "bound"),
    [
        (("channel",), {"macs": 0.5}),
        (("channel",), {"params": 0.4, "macs": 0.6}),
        (("segment", "channel"), {"macs": 0.3}),
        (JOINT, {"structures": 0.5}),
    ],
)
def test_the_trained_model_equals_the_sub_network(levels: tuple[str, ...], bound: dict[str, float], base: str) -> None:
    model, space, x, y = fresh(levels)
    kind, arguments = ARGUMENTS[base]
    opt = espalier.H2SPG(space, kind, espalier.Budget(**bound), warmup_steps=3, projection_steps=5, **arguments)
    train(model, opt, x, y, 8)
    assert opt.phase == "done"
    own = [members(space, name) for name in opt.redundant]
    for _ in range(4):  # zero, and nothing that base keeps brings them back
        assert all(bool((model.get_parameter(n)[mask] == 0).all()) for mine in own for n, mask in mine.items())
        train(model, opt, x, y, 1)
    survivors = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}
    for mine in own:
        for n, mask in mine.items():
            survivors[n] &= ~mask
    assert all(bool((model.get_parameter(n)[mask] != 0).all()) for n, mask in survivors.items())
    zero = set(opt._zero_names())
    assert set(opt.redundant) <= zero
    assert opt.zero_structures() == len(zero)
    solution = opt.solution()
    small = espalier.construct(space, solution)
    for training in (False, True):
        model.train(training)
        small.train(training)
        with torch.no_grad():
            expected = copy.deepcopy(model)(x)
            torch.testing.assert_close(copy.deepcopy(small)(x), expected, rtol=1e-10, atol=1e-10)
            masked = space.masked(solution).train(training)
            torch.testing.assert_close(masked(x), expected, rtol=1e-10, atol=1e-10)
    full, cost = space.cost(), space.cost(solution.removed)
    assert cost.macs <= bound.get("macs", 1.0) * full.macs
    assert cost.params <= bound.get("params", 1.0) * full.params
    assert len(space) - len(opt.redundant) <= bound.get("structures", 1.0) * len(space)


FAMILY: dict[str, Callable[..., HalfSpace]] = {
    "HSPG": lambda space, base, **more: espalier.HSPG(space, base, lam=0.8, epsilon=0.9, test_every=2, **more),
    "DHSPG": lambda space, base, **more: espalier.DHSPG(space, base, HALF, epsilon=0.9, test_every=2, **more),
    "H2SPG": lambda space, base, **more: espalier.H2SPG(space, base, HALF, epsilon=0.9, test_every=2, **more),
    "ProxSG+": lambda space, base, **more: espalier.ProxSGPlus(space, base, HALF, lam=0.5, **more),
}


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("base", BASES)
def test_resumes_bit_identically(name: str, base: str, tmp_path: Any) -> None:
    kind, arguments = ARGUMENTS[base]

    def start() -> tuple[Small, HalfSpace, Tensor, Tensor]:
        model, space, x, y = fresh(JOINT, torch.float32)
        return model, FAMILY[name](space, kind, warmup_steps=3, projection_steps=6, **arguments), x, y

    model, opt, x, y = start()
    train(model, opt, x, y, 12)
    expected, redundant = copy.deepcopy(model.state_dict()), opt.redundant
    for stop in (2, 6, 10):
        model, opt, x, y = start()
        train(model, opt, x, y, stop)
        torch.save((model.state_dict(), opt.state_dict()), tmp_path / "c.pt")
        model, opt, x, y = start()
        state, own = torch.load(tmp_path / "c.pt", weights_only=True)
        model.load_state_dict(state)
        opt.load_state_dict(own)
        train(model, opt, x, y, 12 - stop)
        assert all(torch.equal(value, expected[n]) for n, value in model.state_dict().items())
        assert opt.redundant == redundant


@pytest.mark.parametrize("name", FAMILY)
def test_a_step_never_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And steps that do not ask what has arrived equal those that do."""
    seen: list[list[dict[str, Tensor]]] = [[], []]
    for asking in (True, False):
        model, space, x, y = fresh(JOINT)
        opt = FAMILY[name](space, torch.optim.SGD, lr=0.03, momentum=0.9, warmup_steps=3, projection_steps=6)
        opt._at_once = opt._at_once and asking
        for step in range(11):
            opt.zero_grad()
            cross_entropy(model(x), y).backward()
            with monkeypatch.context() as patched:
                if asking or step in (2, 8):  # the search phase, and the last step of the hybrid phase
                    opt.step()
                else:
                    patched.setattr(opt, "_check_finite", lambda: None)
                    patched.setattr(Tensor, "tolist", _refuse)
                    with NoWaiting():
                        opt.step()
            seen[asking].append(weights(model))
    for a, b in zip(*seen, strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)


def _refuse(tensor: Tensor) -> list[Any]:
    raise AssertionError("tolist")


def test_parameter_groups_have_their_own_rates() -> None:
    model, space, x, y = fresh()
    split = [{"params": [*model.first.parameters()], "lr": 0.1}]
    mine = {id(p) for p in model.first.parameters()}
    split.append({"params": [p for p in model.parameters() if id(p) not in mine], "lr": 0.01})
    opt = espalier.H2SPG(space, budget=HALF, params=split, lr=0.5, warmup_steps=1, projection_steps=9, test_every=50)
    train(model, opt, x, y, 2)
    before = weights(model)
    train(model, opt, x, y, 1)
    for name in opt.redundant:
        for n, mask in members(space, name).items():
            gradient = model.get_parameter(n).grad
            assert gradient is not None
            rate = 0.1 if n.startswith("first.") else 0.01
            expected = (1 - 1 / 8) * before[n][mask] - rate * gradient[mask]
            torch.testing.assert_close(model.get_parameter(n).detach()[mask], expected, rtol=1e-12, atol=1e-14)


def test_dhspg_takes_the_least_salient_and_may_empty_a_family() -> None:
    model, space, x, y = fresh()

    def one_family_first(space: espalier.SearchSpace, state: Any) -> Tensor:
        return torch.tensor([0.0 if n.startswith("first.0[") else 1.0 for n in space.structures.names])

    budget = espalier.Budget(macs=0.6)
    given: dict[str, Any] = {"budget": budget, "lr": 0.01, "saliency": one_family_first}
    dhspg = espalier.DHSPG(space, warmup_steps=1, projection_steps=1, **given)
    train(model, dhspg, x, y, 2)
    full = space.reachable_cost(())
    assert space.reachable_cost(dhspg.redundant).macs <= 0.6 * full.macs
    assert space.reachable_cost(dhspg.redundant[:-1]).macs > 0.6 * full.macs
    with pytest.raises(InvalidSolution, match="keep at least one"):
        dhspg.solution()
    model, space, x, y = fresh()
    h2spg = espalier.H2SPG(space, warmup_steps=1, projection_steps=1, **given)
    train(model, h2spg, x, y, 2)
    assert sum(n.startswith("first.0[") for n in h2spg.solution().removed) == 4
    with pytest.raises(BudgetError, match="not even without all"):
        espalier.DHSPG(space, budget=espalier.Budget(params=0.0), lr=0.1)


def test_tiny_is_not_zero() -> None:
    """The square of 1e-30 is zero in single precision; the structure is not."""
    model, space, _, _ = fresh(("channel",), torch.float32)
    opt = espalier.HSPG(space, lr=0.1)
    with torch.no_grad():
        for n, mask in members(space, "first.0[2]").items():
            model.get_parameter(n)[mask] = 0.0
        model.get_parameter("first.1.weight")[3] = 0.0
        model.get_parameter("first_norm.1.weight")[3] = 1e-30
        model.get_parameter("first_norm.1.bias")[3] = 0.0
    assert opt.solution().removed == ("first.0[2]",)
