"""Baselines, CHITA++, groups, masks and gradual pruning."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from espalier.curvature.layout import WeightLayout
from espalier.select import (
    StageOptions,
    cbs,
    chita,
    chita_plus_plus,
    magnitude,
    mfac,
    n_of_m,
    objective,
    per_layer,
    woodfisher,
)
from espalier.select.dual import DualState
from espalier.select.gradual import GradualOptions, GradualPruner
from espalier.select.magnitude import erdos_renyi_kernel
from espalier.select.masking import apply_masks, hold_masks
from espalier.select.multistage import densities, prune_once
from espalier.select.patterns import cardinality
from espalier.select.problem import Problem
from espalier.select.structured import StructuredOptions, block_groups, structured_chita

CE = nn.functional.cross_entropy


@pytest.fixture
def data():
    torch.manual_seed(0)
    return torch.randn(8, 20).double(), torch.randn(20).double()


def fisher(A, damping):
    return A.t() @ A / len(A) + damping * torch.eye(A.shape[1]).double()


def test_brain_surgeons_equal_the_dense_formula(data):
    A, w = data
    inverse = torch.linalg.inv(fisher(A, 0.1))
    removed = (w**2 / (2 * inverse.diagonal())).argsort()[:12]
    s = torch.zeros(20).double()
    s[removed] = (w / inverse.diagonal())[removed]
    expected = w - inverse @ s
    expected[removed] = 0
    for result in (
        woodfisher(A, w, 8, 0.1),
        mfac(A, w, 8, 0.1),
        mfac(A, w, 8, 0.1, recursion=True),
        woodfisher(A, w, cardinality(8, 20), 0.1, block=20),
    ):
        torch.testing.assert_close(result.weights, expected)
        assert result.objective == pytest.approx(objective(A, None, w, expected, 0.1))
    blocks = woodfisher(A, w, 8, 0.1, block=5)
    assert blocks.kept == 8
    assert not torch.allclose(blocks.weights, expected)


def test_cbs_swaps_and_updates_as_published(data):
    A, w = data
    F = fisher(A, 0.1)

    def cost(support):
        gone = torch.where(support, 0.0, w)
        return float(0.5 * gone @ F @ gone)

    result = cbs(A, w, 8, 0.1)
    assert list(result.history) == sorted(result.history, reverse=True)
    assert result.history[-1] == pytest.approx(8 * cost(result.support), rel=1e-6)
    assert cost(result.support) <= cost(magnitude(w, 8).support)
    for i, j in itertools.product(result.support.nonzero().flatten(), (~result.support).nonzero().flatten()):
        other = result.support.clone()
        other[i], other[j] = False, True
        assert cost(other) >= cost(result.support) * (1 - 1e-5)
    removed = (~result.support).nonzero().flatten()
    inverse = torch.linalg.inv(F)
    joint = w - inverse[:, removed] @ torch.linalg.solve(inverse[removed][:, removed], w[removed])
    torch.testing.assert_close(result.weights[result.support], joint[result.support])


def test_chita_is_never_above_the_baselines_on_its_own_objective(data):
    A, w = data
    ours = chita(A, None, w, 8, 0.1).objective
    for result in (cbs(A, w, 8, 0.1), mfac(A, w, 8, 0.1), woodfisher(A, w, 8, 0.1)):
        assert ours <= result.objective * (1 + 1e-9)


def test_magnitude_budgets():
    layout = WeightLayout(("a", "b"), ((10, 10), (100, 100)))
    w = torch.randn(layout.numel)
    assert magnitude(w, 100).weights.abs().sort().values[-100:].equal(w.abs().sort().values[-100:])
    assert magnitude(w, per_layer(layout, 0.1)).support[:100].sum() == 10
    erk = erdos_renyi_kernel(layout, 0.1)
    assert abs(erk.kept - 1010) <= 2
    assert erk.quota[0] / 100 > erk.quota[1] / 10000
    assert erdos_renyi_kernel(layout, 0.9).quota.tolist()[0] == 100
    assert erdos_renyi_kernel(layout, 1.0).kept == layout.numel
    with pytest.raises(ValueError, match="NaN"):
        magnitude(w * float("nan"), 3)


@pytest.mark.parametrize("schedule", ["exponential", "linear", "cubic", "constant"])
def test_densities(schedule):
    steps = densities(schedule, 7, 0.1)
    assert len(steps) == 7
    assert steps[-1] == 0.1
    assert steps == sorted(steps, reverse=True)
    assert all(0.1 <= s < 1 for s in steps)
    many = densities(schedule, 1000, 0.02)  # the published exponential schedule overflows here
    assert all(math.isfinite(s) for s in many)


def test_densities_bad_input():
    for bad in ({"stages": 0, "keep": 0.5}, {"stages": 3, "keep": 0.0}, {"stages": 3, "keep": 1.1}):
        with pytest.raises(ValueError, match=r"stages|keep"):
            densities("linear", **bad)
    with pytest.raises(ValueError, match="unknown schedule"):
        densities("square", 2, 0.5)


@pytest.fixture
def task():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    x = torch.randn(600, 8)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()
    return model, (x, y)


def test_stages_help_and_leave_the_model_alone(task):
    model, data = task
    before = copy.deepcopy(model.state_dict())
    layout = WeightLayout.of(model)

    def loss_of(weights):
        other = copy.deepcopy(model)
        layout.write(other, weights)
        return float(CE(other(data[0]), data[1]).detach())

    seen = []
    options = StageOptions(stages=8, n=60, batch=8, ridge=1e-2)
    result = chita_plus_plus(model, CE, data, 0.2, options, on_stage=lambda t, m, r: seen.append((t, r.kept)))
    assert [t for t, _ in seen] == list(range(1, 9))
    assert seen[-1][1] == result.kept == int(0.2 * layout.numel)
    assert len(result.history) == 8
    plain = magnitude(layout.flatten(model), result.kept)
    assert loss_of(result.weights) < loss_of(plain.weights)
    for name, value in model.state_dict().items():
        assert value.equal(before[name])
    again = chita_plus_plus(model, CE, data, 0.2, options)
    assert again.weights.equal(result.weights)


def test_stages_with_patterns_loaders_and_paths(task):
    model, (x, y) = task
    loader = [(a, b) for a, b in zip(x.split(100), y.split(100), strict=True)]
    options = StageOptions(n=30, batch=4)
    result = chita_plus_plus(model, CE, loader, lambda layout, keep: n_of_m(layout, 2, 4), options, path=(0.5, 0.5))
    mask = result.masks(WeightLayout.of(model))["0.weight"]
    assert mask.view(12, 2, 4).sum(-1).eq(2).all()
    with pytest.raises(ValueError, match="as `path`"):
        chita_plus_plus(model, CE, loader, lambda layout, keep: n_of_m(layout, 2, 4), options)
    with pytest.raises(ValueError, match="needs n · batch = 4000"):
        chita_plus_plus(model, CE, (x, y), 0.5, StageOptions(n=1000, batch=4))


def test_a_failing_stage_says_which(task):
    model, (x, y) = task
    done = []

    def loss(output, target):
        return CE(output, target) * (torch.nan if done else 1.0)

    options = StageOptions(stages=3, n=10, batch=2)
    with pytest.raises(ValueError, match=r"stage 2 of 3: .*not finite"):
        chita_plus_plus(model, loss, (x, y), 0.5, options, on_stage=lambda stage, *_: done.append(stage))


def test_dead_weights_go_first():
    A, w = torch.randn(5, 6), torch.tensor([0.1, 0.1, 0.1, 9.0, 0.1, 0.1])
    A[:, 3] = 0
    options = StageOptions(ridge=1.0, first_order=False)
    assert not prune_once(A, w, cardinality(3, 6), options).support[3]
    assert prune_once(A, w, cardinality(3, 6), StageOptions(ridge=1.0, first_order=False, drop_dead=False)).support[3]


@pytest.mark.parametrize("shape", [(6, 4), (3, 40)], ids=["small groups", "groups larger than n"])
def test_structured_against_all_subsets(shape):
    n, p = shape[0], 24 if shape[1] == 4 else 120
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        A = torch.randn(n, p, generator=generator).double()
        problem = Problem.of(A, None, torch.randn(p, generator=generator).double(), 0.05)
        group = torch.randint(6, (p,), generator=generator)
        group[:6] = torch.arange(6)
        group[-1] = -1

        def value(kept, problem=problem, group=group):
            support = (group < 0) | torch.tensor(kept)[group.clamp_min(0)]
            S = support.nonzero().flatten()
            H = problem.A[:, S].t() @ problem.A[:, S] + problem.rho * torch.eye(len(S)).double()
            out = torch.where(support, 0.0, problem.w_bar)
            d = -out
            d[S] = torch.linalg.solve(H, problem.A[:, S].t() @ (problem.A @ out))
            return float(0.5 * (problem.A @ d).square().sum() + 0.5 * problem.rho * d.square().sum())

        found = structured_chita(problem, group, 3, options=StructuredOptions(memory=1 << 12))
        assert int(found.kept.sum()) == found.cost == 3
        assert found.result.support.equal((group < 0) | found.kept[group.clamp_min(0)])
        assert found.result.objective == pytest.approx(value(found.kept.tolist()), rel=1e-6)
        best = min(value([i in s for i in range(6)]) for s in itertools.combinations(range(6), 3))
        assert best * (1 - 1e-9) <= found.result.objective <= 1.3 * best


def test_structured_budget_of_costs():
    A, w = torch.randn(5, 12).double(), torch.randn(12).double()
    problem, group = Problem.of(A, None, w, 0.1), torch.arange(12) // 3
    costs = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for budget in (1.0, 3.5, 6.0, 10.0):
        found = structured_chita(problem, group, budget, costs)
        assert 0 < found.cost <= budget
    with pytest.raises(ValueError, match="cheapest group"):
        structured_chita(problem, group, 0.5, costs)
    with pytest.raises(ValueError, match="without gaps"):
        structured_chita(problem, group * 2, 3)
    with pytest.raises(ValueError, match="12 columns"):
        structured_chita(problem, group[1:], 3)
    with pytest.raises(ValueError, match="positive numbers"):
        structured_chita(problem, group, 3, costs[:2])
    with pytest.raises(ValueError, match="nothing can be pruned"):
        structured_chita(problem, group * 0 - 1, 3)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_masks_hold_with_any_optimizer(task, kind):
    model, (x, y) = task
    optimizer = kind(model.parameters(), 0.01)
    CE(model(x), y).backward()
    optimizer.step()
    masks = magnitude(WeightLayout.of(model).flatten(model), 40).masks(WeightLayout.of(model))
    handle = hold_masks(model, masks, optimizer)
    for name, parameter in model.named_parameters():
        for state in optimizer.state.get(parameter, {}).values():
            if name in masks and state.shape == parameter.shape:
                assert not state[~masks[name]].any()
    for _ in range(3):
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()
        assert all(not dict(model.named_parameters())[n][~m].any() for n, m in masks.items())
    handle.remove()
    optimizer.step()
    with pytest.raises(ValueError, match="does not have"):
        apply_masks(model, {"nope": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match="its mask"):
        apply_masks(model, {"0.weight": torch.ones(1, dtype=torch.bool)})


def gradual_run(task, epochs, resume_at=None):
    model, (x, y) = copy.deepcopy(task[0]), task[1]
    layout = WeightLayout.of(model)

    def select(model, keep, event):
        result = chita_plus_plus(
            model, CE, (x, y), keep, StageOptions(stages=1, n=40, batch=2, seed=event, first_order=False)
        )
        return result.masks(layout), result.refitted(layout)

    def fresh():
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        return optimizer, GradualPruner(model, optimizer, select, GradualOptions(0.5, 0.8, events=3, every=2))

    optimizer, pruner = fresh()
    for epoch in range(epochs):
        if epoch == resume_at:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pruner.state_dict()))
            model = copy.deepcopy(task[0])
            optimizer, pruner = fresh()
            for part, state in zip((model, optimizer, pruner), saved, strict=True):
                part.load_state_dict(state)
        pruner.before_epoch(epoch)
        model.train()
        for a, b in zip(x.split(100), y.split(100), strict=True):
            optimizer.zero_grad()
            CE(model(a), b).backward()
            optimizer.step()
    return model, pruner


def test_gradual_pruning_reaches_its_sparsity_and_resumes_bit_by_bit(task):
    model, pruner = gradual_run(task, 6)
    layout = WeightLayout.of(model)
    weights = layout.flatten(model)
    assert int((weights != 0).sum()) == int((1 - 0.8) * layout.numel)
    assert set(pruner.masks) == set(layout.names)
    for at in (1, 2, 5):
        other, _ = gradual_run(task, 6, resume_at=at)
        assert layout.flatten(other).equal(weights)


def test_blocks_of_a_matrix_are_groups():
    """Blocks are kept or zero as a whole, the budget in weights holds, and no dropped block would be a better one."""
    torch.manual_seed(0)
    layout = WeightLayout(("a", "b"), ((6, 8), (5, 3, 2)))
    group = block_groups(layout, (2, 4))
    assert torch.bincount(group).tolist() == [8] * 6 + [8, 4] * 2 + [4, 2]
    problem = Problem.of(torch.randn(15, 78).double(), None, torch.randn(78).double(), 0.05)
    costs = torch.bincount(group).double()
    found = structured_chita(problem, group, 40, costs)
    assert found.cost <= 40
    assert found.result.support.equal(found.kept[group])
    matrix = found.result.weights[:48].view(3, 2, 2, 4)
    assert {int((matrix[i, :, j] != 0).sum()) for i in range(3) for j in range(2)} <= {0, 8}
    size = found.kept.nonzero().flatten()
    for out in size.tolist():
        for into in (~found.kept & (costs == costs[out])).nonzero().flatten().tolist():
            trial = found.kept.clone()
            trial[out], trial[into] = False, True
            state = DualState.of(problem, trial[group])
            state.solve()
            assert state.objective >= found.result.objective * (1 - 1e-9)
    with pytest.raises(ValueError, match="at least 1"):
        block_groups(layout, (0, 4))
