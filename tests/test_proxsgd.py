"""ProxSGD and RMDA: against the loop over groups, exact sparsity, schedules, resuming, search of μ."""

import sys
import warnings

import optuna
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from espalier import construct, search_space
from espalier.errors import SpaceError, TrainingError
from espalier.models import DemoNet
from espalier.sparsify import (
    PAPER,
    RAMDA,
    RMDA,
    PowerDecay,
    ProxSGD,
    bisect_mu,
    layer_groups,
    named_groups,
    space_groups,
)
from espalier.sparsify.bisect import search


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, bias=False),
        nn.Flatten(),
        nn.Linear(54, 3),
    ).double()


def data():
    make = torch.Generator().manual_seed(1)
    return torch.randn(16, 2, 7, 7, generator=make).double(), torch.randint(3, (16,), generator=make)


def backward(model):
    x, y = data()
    model.zero_grad()
    cross_entropy(model(x), y).backward()


class Oracle:
    """ProxSGD as a loop over groups, each element's group looked up one tensor at a time."""

    def __init__(self, grouping, mu_k, lr, rho, tau, weight_decay=0.0, beta=0.999, delta=1e-8):
        self.grouping, self.mu_k, self.lr, self.rho, self.tau = grouping, mu_k, lr, rho, tau
        self.weight_decay, self.beta, self.delta, self.t = weight_decay, beta, delta, 0
        self.own = dict(grouping.model.named_parameters())
        self.v = {n: torch.zeros_like(p) for n, p in self.own.items()}
        self.r = {n: torch.zeros_like(p) for n, p in self.own.items()}

    @torch.no_grad()
    def step(self):
        self.t += 1
        for name, p in self.own.items():
            g = p.grad + self.weight_decay * p
            self.v[name] = (1 - self.rho) * self.v[name] + self.rho * g
            self.r[name] = self.beta * self.r[name] + (1 - self.beta) * g * g
        parts = [(k, self._parts(k)) for k in range(len(self.grouping))]
        for name, p in self.own.items():
            owner = self.grouping.owner.get(name, torch.tensor(-1)).expand(p.shape)
            if (owner < 0).any():
                parts.append((None, [(name, owner < 0)]))
        for k, members in parts:
            if self.tau == "adaptive":
                roots = [(self.r[n][m] / (1 - self.beta**self.t)).sqrt() for n, m in members]
                tau = float(torch.cat(roots).mean()) + self.delta
            else:
                tau = self.tau
            b = [self.own[n][m] - self.v[n][m] / tau for n, m in members]
            norm = float(torch.cat(b).norm())
            mu = 0.0 if k is None else float(self.mu_k[k])
            factor = max(0.0, 1 - mu / (tau * norm)) if norm > 0 else 1.0
            for (n, m), part in zip(members, b, strict=True):
                self.own[n][m] += self.lr * (factor * part - self.own[n][m])

    def _parts(self, k):
        masks = {n: (o == k).expand(self.own[n].shape) for n, o in self.grouping.owner.items()}
        return [(n, m) for n, m in masks.items() if m.any()]


GROUPINGS = {
    "filter": lambda m: layer_groups(m, ["0", "3"], "filter"),
    "input": lambda m: layer_groups(m, ["3", "5"], "input"),
    "kernel": lambda m: layer_groups(m, ["0", "3"], "kernel"),
    "weight": lambda m: layer_groups(m, ["0"], "weight"),
    "tensor": lambda m: layer_groups(m, None, "tensor"),
    "named": lambda m: named_groups(m, {"both": ["0.weight", "3.weight"], "norm": ["1.weight", "1.bias"]}),
}


@pytest.mark.parametrize("tau", [1.0, 2.5, "adaptive"])
@pytest.mark.parametrize("level", GROUPINGS)
def test_equals_the_loop_over_groups(level, tau):
    model, twin = net(), net()
    settings = {"lr": 0.05, "rho": 0.7, "tau": tau, "weight_decay": 0.01}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = ProxSGD(GROUPINGS[level](model), mu=0.03, normalize="mul", **settings)
    oracle = Oracle(GROUPINGS[level](twin), 0.03 * opt.grouping.size**0.5, **settings)
    for _ in range(5):
        backward(model), opt.step()
        backward(twin), oracle.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_group_sizes_and_tied_segments():
    model = DemoNet(width=0.1)
    space = search_space(model, (torch.randn(2, 3, 8, 8),))
    single = space_groups(space)
    assert single.names == tuple(s.name for s in space.structures)
    tied = space_groups(space, key=lambda name: "odd" if name == single.names[0] else "rest")
    assert tied.names == ("odd", "rest")
    assert tied.size.sum() == single.size.sum()
    assert tied.members[1] == single.names[1:]


def train(model, opt, steps, teacher=None):
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(2)).double()
    y = x[:, :2].sum(1)
    for _ in range(steps):
        opt.zero_grad()
        mse_loss(model(x)[:, 0], y).backward()
        opt.step()
    return mse_loss(model(x)[:, 0], y).item()


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 1)).double()


@pytest.mark.parametrize(
    "make",
    [
        lambda g: ProxSGD(g, mu=0.05, lr=0.05, rho=0.5),
        lambda g: RMDA(g, mu=0.02, lr=0.2),
        lambda g: RAMDA(g, mu=0.02, lr=0.1),
    ],
)
def test_support_is_exact_and_snapping_changes_nothing_that_matters(make):
    model = perceptron()
    opt = make(layer_groups(model, ["0"]))
    before = train(model, opt, 600)
    zero = opt.zero_groups()
    assert 0 < len(zero) < 20
    assert opt.snap() == zero
    norms = model[0].weight.detach().norm(dim=1)
    assert sorted(f"0[{i}]" for i in (norms == 0).nonzero().flatten().tolist()) == sorted(zero)
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(2)).double()
    assert mse_loss(model(x)[:, 0], x[:, :2].sum(1)).item() == pytest.approx(before, abs=1e-6)
    assert before < 1.5


def test_a_threshold_misses_groups_that_die_late():
    model = perceptron()
    opt = ProxSGD(layer_groups(model, ["0"]), mu=0.05, lr=0.02, rho=0.5)
    train(model, opt, 500)
    assert set(opt.zero_groups(threshold=1e-6)) < set(opt.zero_groups())


def test_solution_of_segments_is_valid_and_constructs():
    torch.manual_seed(0)
    model, x = DemoNet(width=0.1), torch.randn(4, 3, 8, 8)
    space = search_space(model, (x,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = ProxSGD(space_groups(space), mu=100.0, lr=1.0)
    for _ in range(2):
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
    assert len(opt.zero_groups()) == len(space)  # all of them: not valid together
    solution = opt.solution()
    assert 0 < len(solution.removed) < len(space)
    opt.snap()
    assert torch.allclose(construct(space, solution).eval()(x), space.masked(solution).eval()(x), atol=1e-5)


def test_solution_of_filters_is_masks():
    model = perceptron()
    opt = ProxSGD(layer_groups(model, ["0"]), mu=0.05, lr=0.05, rho=0.5)
    train(model, opt, 300)
    zero = opt.snap()
    space = search_space(model, (torch.randn(3, 6).double(),))
    solution = opt.solution(space)
    assert int((~solution.masks["0.bias"]).sum()) == len(zero)
    x = torch.randn(3, 6).double()
    assert torch.equal(construct(space, solution)(x), model(x))


@pytest.mark.parametrize("tau", [1.0, "adaptive"])
@pytest.mark.parametrize("kind", [ProxSGD, RMDA, RAMDA])
def test_resume_is_bit_identical(kind, tau):
    more = {"tau": tau, "schedule": PowerDecay(offset=5)} if kind is ProxSGD else {}
    model = net()
    opt = kind(layer_groups(model), mu=0.01, lr=0.05, **more)
    for _ in range(6):
        backward(model), opt.step()
    half = net()
    first = kind(layer_groups(half), mu=0.01, lr=0.05, **more)
    for _ in range(3):
        backward(half), first.step()
    rest = net()
    rest.load_state_dict(half.state_dict())
    second = kind(layer_groups(rest), mu=0.01, lr=0.05, **more)
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        backward(rest), second.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), rest.parameters(), strict=True))
    assert torch.equal(opt.dormant, second.dormant)


def test_schedulers_param_groups_and_constants_of_the_paper():
    model = perceptron()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.01}]
    opt = ProxSGD(layer_groups(model, ["0"]), mu=0.0, params=groups, rho=1.0)
    halved = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, opt, 1)
    for p, was, lr in zip(model.parameters(), before, (0.1, 0.1, 0.01, 0.01), strict=True):
        assert torch.allclose(p, was - lr * p.grad)  # μ = 0, ρ = τ = 1: plain SGD
    halved.step()
    assert [g["lr"] for g in opt.param_groups] == [0.05, 0.005]
    before = [p.detach().clone() for p in model.parameters()]
    train(model, opt, 1)
    for p, was, lr in zip(model.parameters(), before, (0.05, 0.05, 0.005, 0.005), strict=True):
        assert torch.allclose(p, was - lr * p.grad)
    grouping = layer_groups(perceptron(), ["0"])
    opt = ProxSGD(grouping, mu=0.6, **PAPER)
    assert opt.defaults["lr"] == 1e-3
    assert opt.mu_per_group()[0].item() == pytest.approx(0.6 / grouping.size[0].item() ** 0.5)


def test_gradient_scaler():
    model = perceptron().float()
    opt = ProxSGD(layer_groups(model, ["0"]), mu=0.01, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.randn(8, 6)
    before = model[0].weight.detach().clone()
    scaler.scale(model(x).square().mean()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e3)
    scaler.step(opt)
    scaler.update()
    assert not torch.equal(before, model[0].weight)
    opt.zero_grad()
    scaler.scale(model(x * float("inf")).square().mean()).backward()
    steps = opt.steps_done
    scaler.step(opt)  # skipped
    scaler.update()
    assert opt.steps_done == steps


def test_theorem_1_schedule():
    schedule = PowerDecay(step=0.9, momentum=0.6, offset=10.0)
    factors = [schedule.factors(t) for t in (0, 10, 1000, 100_000)]
    assert all(0 < a <= 1 and 0 < b <= 1 for a, b in factors)
    ratios = [a / b for a, b in factors]
    assert ratios == sorted(ratios, reverse=True)
    for bad in ({"step": 0.5}, {"momentum": 0.5}, {"step": 0.6, "momentum": 0.9}, {"step": 1.1}):
        with pytest.raises(ValueError, match="Theorem 1"):
            PowerDecay(**bad)


def test_warns_where_a_group_is_zeroed_whatever_the_data():
    grouping = layer_groups(perceptron(), ["0"])
    with pytest.warns(UserWarning, match=r"20 of 20 groups are bound .* '0\[0\]', mu = 50 "):
        ProxSGD(grouping, mu=50.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = ProxSGD(grouping, mu=0.9, normalize="init")
    assert torch.allclose(opt.mu_per_group(), 0.9 * opt.group_norms())


def test_bisection_reaches_a_target_with_a_warm_start():
    starts = []

    def run(mu, state):
        starts.append(state is not None)
        model = perceptron()
        if state is not None:
            model.load_state_dict(state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt = ProxSGD(layer_groups(model, ["0"]), mu=mu, lr=0.1, rho=0.5)
        train(model, opt, 200)
        return 1 - len(opt.snap()) / 20, {n: t.clone() for n, t in model.state_dict().items()}

    found = bisect_mu(run, target=0.5, mu=1e-3, tolerance=0.1)
    assert found.met
    assert 0.4 <= found.best.share <= 0.5
    assert any(starts)


def test_bisection_tolerates_what_is_not_monotone():
    def run(mu, state):
        share = max(0.0, 1 - mu / 2) - (0.4 if 0.3 < mu < 0.5 else 0.0)
        return share, None

    found = bisect_mu(run, target=0.55, mu=0.4, tolerance=0.03, max_trials=30)
    assert found.met
    assert 0.52 <= found.best.share <= 0.55
    assert 0.9 <= found.best.mu <= 0.96
    never = bisect_mu(lambda mu, state: (1.0, None), target=0.5, mu=1.0, max_trials=4)
    assert not never.met
    assert len(never.trials) == 4


def test_bisection_meets_a_target_that_warm_starts_jump_over():
    """Each trial trains ten epochs more than the one that it starts from, which prunes as much as a larger μ would."""

    def run(mu, epochs):
        epochs = (epochs or 0) + 10
        return 1 / (1 + mu * epochs), epochs

    found = bisect_mu(run, target=0.5, mu=0.01, tolerance=0.02)
    assert found.met
    assert found.best.state == 10  # a fresh start


def test_bisection_meets_a_target_where_only_fresh_starts_can():
    """A trained network that resists until it collapses; fresh starts cross far below that jump."""

    def run(mu, share):
        found = 1 / (1 + (mu / 0.05) ** 2) if share is None else share if mu < 0.3 else 0.05
        return found, found

    found = bisect_mu(run, target=0.5, mu=1e-3)
    assert found.met
    assert found.best.mu == pytest.approx(0.051, abs=0.002)


def test_search_needs_optuna(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'espalier\[search\]'"):
        search(lambda mu, lr, rho: mu)


def test_search_makes_up_for_trainings_that_diverge():
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    calls = []

    def objective(mu, lr, rho):
        calls.append(mu)
        return float("nan") if len(calls) % 3 == 0 else mu

    study = search(objective, trials=5)
    assert sum(t.state.name == "COMPLETE" for t in study.trials) == 5
    assert len(calls) == 7
    with pytest.warns(UserWarning, match="2 of 2 trials did not finish"):
        study = search(lambda mu, lr, rho: float("nan"), trials=2)
    assert len(study.trials) == 4


def test_search_resumes_from_its_storage(tmp_path):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage, seen = f"sqlite:///{tmp_path}/search.db", []

    def objective(mu, lr, rho):
        seen.append((mu, lr, rho))
        if len(seen) == 3:
            raise KeyboardInterrupt  # stopped in the middle of the third trial
        return mu

    with pytest.raises(KeyboardInterrupt):
        search(objective, trials=5, storage=storage)
    study = search(objective, trials=5, storage=storage)
    assert sum(t.state.name == "COMPLETE" for t in study.trials) == 5
    assert len(set(seen)) == len(seen) == 6  # no draw is made twice
    assert study.best_value == min(mu for i, (mu, _, _) in enumerate(seen) if i != 2)
    search(objective, trials=5, storage=storage)
    assert len(seen) == 6  # nothing left to do
    assert all(1e-5 <= mu <= 1 and 1e-4 <= lr <= 0.1 and 0.05 <= rho <= 1 for mu, lr, rho in seen)


def test_bad_input():
    model = perceptron()
    groups = layer_groups(model, ["0"])
    for wrong, message in (
        ({"mu": -1.0}, "at least 0"),
        ({"mu": 1.0, "lr": 0.0}, r"lr \(ε\) = 0.0"),
        ({"mu": 1.0, "lr": 1.5}, r"lr \(ε\) = 1.5"),
        ({"mu": 1.0, "rho": 0.0}, r"rho \(ρ\) = 0.0"),
        ({"mu": 1.0, "rho": 2.0}, r"rho \(ρ\) = 2.0"),
        ({"mu": 1.0, "tau": 0.0}, "positive number"),
        ({"mu": 1.0, "normalize": "size"}, "there are none, div, mul, init"),
        ({"mu": 1.0, "low": 0.1}, "the box holds 0"),
    ):
        with pytest.raises(TrainingError, match=message):
            ProxSGD(groups, **wrong)
    for kind in (RMDA, RAMDA):
        for wrong, message in (
            ({"mu": -1.0}, "mu=-1.0: at least 0"),
            ({"mu": 1.0, "lr": 0.0}, "lr is positive"),
            ({"mu": 1.0, "momentum": 0.0}, r"momentum \(c\) = 0.0: lies in \(0, 1\]"),
            ({"mu": 1.0, "momentum": 1.5}, r"momentum \(c\) = 1.5"),
        ):
            with pytest.raises(TrainingError, match=message):
                kind(groups, **wrong)
    with pytest.raises(TrainingError, match=r"epsilon=0.0: positive"):
        RAMDA(groups, mu=1.0, epsilon=0.0)
    with pytest.raises(SpaceError, match="group 'none' has no parameters"):
        named_groups(model, {"none": []})
    with pytest.raises(SpaceError, match=r"'0.weight' is in two groups, 'a' and 'b'"):
        named_groups(model, {"a": ["0.weight"], "b": ["0.weight"]})
    with pytest.raises(SpaceError, match="is no parameter of the model"):
        named_groups(model, {"a": ["9.weight"]})
    with pytest.raises(SpaceError, match="unknown level 'row'"):
        layer_groups(model, ["0"], "row")
    opt = ProxSGD(groups, mu=0.01)
    with pytest.raises(TrainingError, match=r"mu=-0.1: at least 0"):
        opt.mu = -0.1
    before = [p.detach().clone() for p in model.parameters()]
    train(model, opt, 1)
    model[0].weight.grad[0, 0] = float("nan")
    kept = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TrainingError, match=r"gradient of '0\.weight' is NaN"):
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))
    assert not torch.equal(before[0], kept[0])
    model[0].weight.requires_grad_(False)
    with pytest.raises(TrainingError, match="is frozen"):
        ProxSGD(groups, mu=0.01)
    with pytest.raises(TrainingError, match="another grouping"):
        opt.load_state_dict({"names": []})


@pytest.mark.parametrize("kind", [RMDA, RAMDA])
def test_dual_averaging_equals_the_formula(kind):
    """Algorithm 1 of either paper, step by step over groups; the subproblem of RAMDA by proximal gradient."""
    model, twin = net(), net()
    opt = kind(layer_groups(model, ["0", "3"]), mu=0.02, lr=0.1, momentum=0.3)
    own = dict(twin.named_parameters())
    start = {n: p.detach().clone() for n, p in own.items()}
    v, u = ({n: torch.zeros_like(p) for n, p in own.items()} for _ in range(2))
    alpha, grouping = 0.0, layer_groups(twin, ["0", "3"])
    for t in range(1, 5):
        backward(model), opt.step()
        backward(twin)
        size = 0.1 * t**0.5
        alpha += size
        with torch.no_grad():
            for n, p in own.items():
                v[n] += size * p.grad
                u[n] += size * p.grad**2
            metric = {n: torch.full_like(p, t**0.5) if kind is RMDA else u[n] ** (1 / 3) + 1e-6 for n, p in own.items()}
            b = {n: start[n] - v[n] / metric[n] for n in own}
            hat = {n: x.clone() for n, x in b.items()}
            for k in range(len(grouping)):
                masks = {n: (o == k).expand(own[n].shape) for n, o in grouping.owner.items()}
                at = {n: m for n, m in masks.items() if m.any()}
                tau = torch.cat([metric[n][m] for n, m in at.items()])
                goal = torch.cat([b[n][m] for n, m in at.items()])
                w = goal.clone()
                for _ in range(3000 if kind is RAMDA else 1):
                    w = w - tau * (w - goal) / tau.max()
                    w = w * max(0.0, 1 - 0.02 * alpha / float(tau.max() * w.norm()))
                for (n, m), part in zip(at.items(), w.split([int(m.sum()) for m in at.values()]), strict=True):
                    hat[n][m] = part
            for n, p in own.items():
                p += 0.3 * (hat[n] - p)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
