"""Single weights in one call: options, budgets, fine-tuning with zeros held, and what is refused."""

import functools
import itertools
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import espalier
from espalier import search_space
from espalier.curvature.layout import WeightLayout
from espalier.errors import BudgetError
from espalier.select import (
    GradualOptions,
    GradualPruner,
    StageOptions,
    hold_masks,
    prune_weights,
    weight_selector,
)
from espalier.select.patterns import count_of
from espalier.select.weights import WEIGHT_METHODS, WEIGHT_OPTIONS

FEW = StageOptions(stages=3, n=40, batch=4)
ONE = {"n": 40, "batch": 4}  # the rest as the method has it


@pytest.fixture
def task():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3))
    x, y = torch.randn(400, 10), torch.randint(3, (400,))
    return search_space(model, x[:3]), (x, y)


@pytest.mark.parametrize("method", [m for m in WEIGHT_METHODS if not m.endswith("++")])
def test_a_mapping_changes_single_options_and_several_stages_are_refused(task, method):
    space, data = task
    with pytest.raises(ValueError, match=f"'{method}' is one stage"):
        prune_weights(space, data, keep=0.3, method=method, options=FEW)
    with pytest.raises(ValueError, match="'samples' is none of"):
        prune_weights(space, data, keep=0.3, method=method, options={"samples": 3})
    solution = prune_weights(space, data, keep=0.3, method=method, options=ONE)[1]
    assert (solution.provenance["n"], solution.provenance["batch"]) == (40, 4)
    assert solution.provenance["ridge"] == WEIGHT_OPTIONS[method].ridge


def test_one_stage_is_chita_as_published(task):
    """No first-order term, and dead weights are kept: the options that a mapping does not name are the method's."""
    space, (x, y) = task
    _, solution = prune_weights(space, (x, y), keep=0.3, method="chita", options=ONE)
    whole = replace(WEIGHT_OPTIONS["chita"], **ONE)
    assert (whole.stages, whole.first_order, whole.drop_dead) == (1, False, False)
    other = prune_weights(space, (x, y), keep=0.3, method="chita", options=whole)[1]
    assert all(torch.equal(m, other.masks[name]) for name, m in solution.masks.items())


@pytest.mark.parametrize("fraction", [1 / 49, 3 / 98, 0.29, 0.58, 0.07])
def test_an_amount_survives_being_a_fraction(fraction):
    for total in (98, 100, 32_360, 268_336, 25_502_912):
        k = round(fraction * total)
        assert count_of(k / total, total) == k
        assert count_of(fraction, total) <= fraction * total + 1e-4


def test_the_budget_of_weights_is_exact_in_one_call():
    net, x = nn.Sequential(nn.Linear(4, 14), nn.ReLU(), nn.Linear(14, 3)), torch.rand(3, 4)
    for k in (2, 4, 8, 29, 97):
        small = espalier.prune(net, x, budget=espalier.Budget(weights=k))
        assert sum(int((p != 0).sum()) for p in small.parameters() if p.ndim == 2) == k


def test_a_loader_that_does_not_shuffle_is_named(task):
    space, (x, y) = task
    in_order = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 20)
    with pytest.warns(UserWarning, match="every stage sees the same"):
        prune_weights(space, in_order, keep=0.5, options=FEW)
    shuffled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 20, shuffle=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_weights(space, shuffled, keep=0.5, options=FEW)


@pytest.mark.parametrize(
    "bad", [{"stages": 0}, {"n": 0}, {"batch": 0}, {"recalibrate": -5}, {"ridge": -1.0}, {"ridge": float("nan")}]
)
def test_stage_options_are_checked(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        StageOptions(**bad)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_masks_are_held_for_an_optimizer_that_does_not_exist_yet(kind):
    layer = nn.Linear(3, 2)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    hold = hold_masks(layer, {"weight": mask})
    optimizer = kind(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.rand(5, 3)).square().sum().backward()
        optimizer.step()
        assert not layer.weight[~mask].any()
    assert layer.weight[mask].all()
    hold.remove()
    layer(torch.rand(5, 3)).square().sum().backward()
    optimizer.step()
    assert layer.weight[~mask].any()


def test_a_gradient_that_is_not_finite_does_not_reach_a_masked_weight():
    layer, mask = nn.Linear(2, 1, bias=False), torch.tensor([[True, False]])
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    hold_masks(layer, {"weight": mask}, optimizer)
    layer.weight.grad = torch.tensor([[0.5, float("nan")]])
    optimizer.step()
    assert float(layer.weight[0, 1].detach()) == 0.0
    other = torch.optim.SGD([nn.Parameter(torch.zeros(2))], 0.1)
    with pytest.raises(ValueError, match="none of the masked parameters"):
        hold_masks(layer, {"weight": mask}, other)


@pytest.mark.parametrize("steps", [1, 3])
def test_fine_tuning_in_one_call_keeps_the_zeros(task, steps):
    space, (x, y) = task
    shares = []

    def finetune(model):
        layout = WeightLayout.of(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        shares.append(float((layout.flatten(model) != 0).float().mean()))

    budget = espalier.Budget(weights=0.1)
    small = espalier.prune(
        space.model, x[:3], budget=budget, method="chita++", data=(x, y), options=FEW, steps=steps, finetune=finetune
    )
    assert len(shares) == steps
    assert all(a > b for a, b in itertools.pairwise(shares))
    p = WeightLayout.of(small).numel
    assert int((WeightLayout.of(small).flatten(small) != 0).sum()) <= count_of(0.1, p)

    def by_hand(model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)

    small = espalier.prune(space.model, x[:3], budget=budget, finetune=by_hand)
    assert int((WeightLayout.of(small).flatten(small) != 0).sum()) <= count_of(0.1, p)


def test_what_a_weight_method_cannot_hold_is_refused(task):
    space, (x, y) = task
    call = functools.partial(espalier.prune, space.model, x[:3], data=(x, y), method="exchange")
    with pytest.raises(BudgetError, match=r"keeps 0\.[45]\d* of the weights"):
        call(budget=espalier.Budget(weights=0.1), options=ONE, pattern=(2, 4))
    call(budget=espalier.Budget(weights=0.7), options=ONE, pattern=(2, 4))
    with pytest.raises(TypeError, match="ranking"):
        call(budget=espalier.Budget(weights=0.5), ranking="local")
    with pytest.raises(TypeError, match="single weights"):
        call(budget=espalier.Budget(weights=0.5), keep=["0"])
    with pytest.raises(TypeError, match="single weights"):
        call(budget=espalier.Budget(weights=0.5, round_to=8))
    with pytest.raises(ValueError, match="write loss=lambda"):
        call(budget=espalier.Budget(weights=0.5), loss=nn.functional.cross_entropy, options=ONE)


def test_a_predicate_leaves_out_what_is_tied_or_frozen():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.body(self.embed(ids)).mean(1))

    ids, y = torch.randint(7, (60, 4)), torch.randint(7, (60,))
    call = functools.partial(espalier.prune, Tied(), ids[:2], budget=espalier.Budget(weights=9), data=(ids, y))
    with pytest.raises(ValueError, match="prunable"):
        call(method="exchange++", options={"n": 20, "batch": 2, "stages": 2})
    small = call(
        method="exchange++",
        options={"n": 20, "batch": 2, "stages": 2},
        prunable=lambda name, module, parameter: name == "body.weight",
        steps=2,
    )
    assert int((small.body.weight != 0).sum()) == 9


@pytest.mark.parametrize("method", ["weight-magnitude", "chita", "exchange", "woodfisher", "chita++"])
def test_gradual_pruning_by_every_kind_of_method(task, method):
    space, (x, y) = task
    model = space.model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    select = weight_selector((x, y), method=method, options={"n": 30, "batch": 2})
    pruner = GradualPruner(model, optimizer, select, GradualOptions(first=0.3, last=0.8, events=3, every=1))
    layout = WeightLayout.of(model)
    for epoch, sparsity in enumerate((0.3, 0.7375, 0.8, None)):
        aimed = pruner.before_epoch(epoch)
        assert (aimed is None) == (sparsity is None)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        kept = torch.cat([pruner.masks[name].flatten() for name in layout.names])
        assert int(kept.sum()) == count_of(1 - (sparsity or 0.8), layout.numel)
        assert not layout.flatten(model)[~kept].any()
    assert model.training


def test_a_gradual_pruning_that_goes_wrong_changes_nothing(task):
    model = task[0].model
    before = [p.clone() for p in model.parameters()]

    def select(model, keep, event):
        ones = {n: torch.ones_like(p) for n, p in model.named_parameters()}
        return {"0.weight": torch.ones(3, 3, dtype=torch.bool)}, ones

    pruner = GradualPruner(model, torch.optim.SGD(model.parameters(), 0.1), select, GradualOptions(events=1))
    with pytest.raises(ValueError, match=r"0.weight of shape \(3, 3\)"):
        pruner.before_epoch(0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="free"):
        weight_selector(task[1], method="exchange++", options={"free": True})


@pytest.mark.parametrize("bad", [{"last": 1.5}, {"events": 0}, {"every": 0}, {"begin": -1}, {"first": 0.95}])
def test_gradual_options_are_checked(bad):
    with pytest.raises(ValueError, match=r"at least 1|sparsities"):
        GradualOptions(**bad)


@pytest.mark.parametrize("method", ["exchange++", "chita"])
@pytest.mark.parametrize("form", [tuple, dict])
def test_several_inputs(method, form):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm, self.out = nn.Linear(6, 8), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

        def forward(self, left, right):
            return self.out(torch.relu(self.norm(self.a(left) + self.b(right))))

    torch.manual_seed(0)
    net, left, right, y = Two(), torch.randn(90, 6), torch.randn(90, 4), torch.randint(3, (90,))
    inputs = (left, right) if form is tuple else {"left": left, "right": right}
    options = {"n": 20, "batch": 2, "recalibrate": 30} | ({"stages": 2} if method == "exchange++" else {})
    args = (left[:2], right[:2])
    call = functools.partial(espalier.prune, net, args, budget=espalier.Budget(weights=20), method=method)
    small = call(data=(inputs, y), options=options)
    assert int((WeightLayout.of(small).flatten(small) != 0).sum()) <= 20
    assert not torch.equal(small.norm.running_mean, net.norm.running_mean)
    batches = [
        (tuple(t[i::3] for t in (left, right)) if form is tuple else {k: t[i::3] for k, t in inputs.items()}, y[i::3])
        for i in range(3)
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the data gives the same samples")
        small = call(data=batches, options=options)
    assert int((WeightLayout.of(small).flatten(small) != 0).sum()) <= 20
