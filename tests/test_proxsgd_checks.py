"""The proximal optimizers where something is odd: groups that start at zero, values set later, gradients, states."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from test_proxsgd import backward, net, perceptron, train
from torch import nn

from espalier import search_space
from espalier.errors import SpaceError, TrainingError
from espalier.sparsify import RAMDA, RMDA, ProxSGD, fit_to_target, layer_groups, named_groups, space_groups

KINDS = [ProxSGD, RMDA, RAMDA]
quiet = pytest.mark.filterwarnings("ignore:.*bound to be zeroed")


def half_zero():
    model = perceptron()
    with torch.no_grad():
        model[0].weight[:5] = 0
        model[0].bias[:5] = 0
    return model


# Groups that start at zero.


@quiet
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", ["none", "div", "mul", "init"])
def test_a_group_that_starts_at_zero_and_stays_there_counts_as_zero(kind, normalize):
    model = half_zero()
    opt = kind(layer_groups(model, ["0"]), mu=1e-3, lr=0.1, normalize=normalize)
    train(model, opt, 3)
    assert set(opt.zero_groups()) == {f"0[{i}]" for i in range(5)}
    assert not opt.group_norms()[:5].any()


@pytest.mark.parametrize("kind", KINDS)
def test_it_counts_also_without_a_penalty(kind):
    model = half_zero()
    with torch.no_grad():
        model[2].weight[:, :5] = 0  # and no gradient ever reaches them
    opt = kind(layer_groups(model, ["0"]), mu=0.0, lr=0.1)
    train(model, opt, 3)
    assert opt.zero_groups() == [f"0[{i}]" for i in range(5)]


def test_the_initial_norm_of_a_group_at_zero_is_taken_from_the_others():
    model = half_zero()
    opt = ProxSGD(layer_groups(model, ["0"]), mu=0.5, normalize="init")
    norms = opt.group_norms()
    typical = 7**0.5 * (norms.square().sum() / (15 * 7)).sqrt()  # 15 groups of 7 elements
    torch.testing.assert_close(opt.mu_per_group(), 0.5 * torch.where(norms > 0, norms, typical))
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    with pytest.raises(TrainingError, match="all groups start at zero"):
        ProxSGD(layer_groups(model, ["0"]), mu=0.5, normalize="init")


@quiet
@pytest.mark.parametrize("warm", [True, False])
def test_all_trials_go_by_the_norms_of_the_model_as_given(warm):
    model, x = perceptron(), torch.randn(64, 6).double()
    space = search_space(model, x, levels=("channel",))
    groups = space_groups(space)
    first = ProxSGD(groups, mu=1.0, normalize="init").mu_per_group()
    seen = []

    def fit(mu):
        opt = ProxSGD(groups, mu, lr=0.1, rho=0.5, normalize="init")
        seen.append(opt.mu_per_group() / mu)
        train(model, opt, 30)
        return opt

    found = fit_to_target(space, fit, 0.5, of="params", mu=0.3, tolerance=0.01, max_trials=4, warm_start=warm)
    assert any(t.state.solution.removed for t in found.trials[:-1])
    assert len(seen) == 4
    for scale in seen:
        torch.testing.assert_close(scale, first)
    after = ProxSGD(groups, mu=1.0, normalize="init").mu_per_group()  # outside it is the present norms again
    assert not torch.allclose(after, first)


# Values set later.


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        (ProxSGD, "lr", 1.7, r"lr \(ε\) = 1.7"),
        (ProxSGD, "lr", -0.7, r"lr \(ε\) = -0.7"),
        (ProxSGD, "lr", float("nan"), r"lr \(ε\) = nan"),
        (ProxSGD, "rho", 1.1, r"rho \(ρ\) = 1.1"),
        (ProxSGD, "rho", 0.0, r"rho \(ρ\) = 0.0"),
        (ProxSGD, "weight_decay", float("nan"), "weight_decay=nan"),
        (ProxSGD, "sparsity", -1.0, "sparsity=-1.0"),
        (ProxSGD, "low", 0.5, "the box holds 0"),
        (ProxSGD, "high", float("nan"), "the box holds 0"),
        (RMDA, "lr", -0.1, "lr is positive"),
        (RMDA, "c", 1.5, r"momentum \(c\) = 1.5"),
        (RAMDA, "weight_decay", -1.0, "weight_decay=-1.0"),
    ],
)
def test_a_value_out_of_its_range_stops_the_next_step(kind, key, value, message):
    model = perceptron()
    opt = kind(layer_groups(model, ["0"]), mu=1e-3, lr=0.1)
    train(model, opt, 1)
    before = [p.detach().clone() for p in model.parameters()]
    opt.param_groups[0][key] = value
    with pytest.raises(TrainingError, match=message):
        train(model, opt, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_scheduler_may_come_to_zero_but_not_above_one():
    model = perceptron()
    opt = ProxSGD(layer_groups(model, ["0"]), mu=1e-3, lr=0.5)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.0)
    before = model[0].weight.detach().clone()
    train(model, opt, 1)
    assert torch.equal(before, model[0].weight)
    opt = ProxSGD(layer_groups(model, ["0"]), mu=1e-3, lr=0.5)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, 3.0, 30, cycle_momentum=False)
    while opt.param_groups[0]["lr"] <= 1.0:
        train(model, opt, 1)
        scheduler.step()
    with pytest.raises(TrainingError, match=r"lr \(ε\) = 1\.\d+: lies in \[0, 1\]"):
        train(model, opt, 1)


@quiet
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [-5.0, float("nan"), float("inf")])
def test_mu_is_refused_whenever_it_is_set(kind, value):
    grouping = layer_groups(perceptron(), ["0"])
    with pytest.raises(TrainingError, match=r"mu=.*: at least 0, and finite"):
        kind(grouping, mu=value)
    opt = kind(grouping, mu=0.1)
    with pytest.raises(TrainingError, match=r"mu=.*: at least 0, and finite"):
        opt.mu = value
    assert opt.mu == 0.1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tau": float("nan")}, "positive number"),
        ({"tau": -1.0}, "positive number"),
        ({"beta": 2.0}, r"beta=2.0: lies in \[0, 1\)"),
        ({"delta": -1.0}, "delta=-1.0: positive"),
        ({"weight_decay": float("nan")}, "weight_decay=nan"),
        ({"exponent": float("nan")}, "exponent=nan"),
        ({"lr": float("nan")}, r"lr \(ε\) = nan: lies in \(0, 1\]"),
        ({"low": 0.2}, "the box holds 0"),
        ({"low": 1.0, "high": -1.0}, "the box holds 0"),
        ({"params": []}, "no parameter to train"),
    ],
)
def test_constants_of_proxsgd(wrong, message):
    model = perceptron()
    with pytest.raises(TrainingError, match=message):
        ProxSGD(layer_groups(model, ["0"]), mu=1e-3, **wrong)
    key, value = next(iter(wrong.items()))
    if key in ("tau", "beta", "delta"):
        opt = ProxSGD(layer_groups(model, ["0"]), mu=1e-3)
        setattr(opt, key, value)
        with pytest.raises(TrainingError, match=message):
            train(model, opt, 1)


# What no data can save.


@pytest.mark.parametrize("kind", [ProxSGD, RMDA])
def test_warns_for_every_method(kind):
    model = perceptron()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = kind(layer_groups(model, ["0"]), mu=1e-6, lr=0.1)
        train(model, opt, 1)
    with pytest.warns(UserWarning, match="20 of 20 groups are bound to be zeroed"):
        opt.mu = 1e3
    assert len(opt.bound_to_vanish()) == 20
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        opt = kind(layer_groups(model, ["0"]), mu=1e3, lr=0.1)
        train(model, opt, 3)
    assert ["20 of 20 groups are bound to be zeroed" in str(w.message) for w in told] == [True]
    assert len(opt.zero_groups()) == 20


def test_warns_where_tau_is_adaptive_after_the_first_step():
    model = perceptron()
    opt = ProxSGD(layer_groups(model, ["0"]), mu=1e3, tau="adaptive", lr=0.1)
    with pytest.warns(UserWarning, match=r"20 of 20 groups are bound .* tau \|w\|"):
        train(model, opt, 1)
    other = ProxSGD(layer_groups(model, ["0"]), mu=1e-6, tau="adaptive", lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, other, 1)


@pytest.mark.parametrize("kind", [ProxSGD, RMDA])
def test_the_bound_is_the_one_of_the_first_step_without_a_gradient(kind):
    """A little below it a group lives, a little above it dies, where the gradients are next to nothing."""

    def stepped(mu):
        model = perceptron()
        opt = kind(layer_groups(model, ["0"]), mu=mu, lr=0.1)
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e-9)
        opt.step()
        return opt

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bounds = dict(zip(stepped(1e-9).grouping.names, stepped(1e-9)._bounds, strict=True))
        name, bound = min(bounds.items(), key=lambda item: item[1])
        assert stepped(0.999 * bound).zero_groups() == stepped(0.999 * bound).bound_to_vanish() == []
        assert stepped(1.001 * bound).zero_groups() == stepped(1.001 * bound).bound_to_vanish() == [name]


@quiet
@pytest.mark.parametrize("kind", [RMDA, RAMDA])
@pytest.mark.parametrize("normalize", ["div", "mul", "init"])
def test_dual_averaging_normalises_as_proxsgd(kind, normalize):
    model = net()
    grouping = layer_groups(model, ["0", "3"])
    mine, theirs = kind(grouping, 0.3, normalize=normalize), ProxSGD(grouping, 0.3, normalize=normalize)
    assert torch.equal(mine.mu_per_group(), theirs.mu_per_group())
    with pytest.raises(TrainingError, match="there are none, div, mul, init"):
        kind(grouping, 0.3, normalize="size")


# Gradients.


@pytest.mark.parametrize("kind", KINDS)
def test_where_nobody_waits_a_bad_gradient_updates_nothing_either(kind):
    """The path of accelerators, on the CPU: the weights stay, the next step says so, and training goes on as if
    the step had never been."""
    model, twin = net(), net()
    opt, plain = (kind(layer_groups(m), mu=0.01, lr=0.05) for m in (model, twin))
    opt._waits = False
    for i in range(6):
        backward(model)
        if i == 3:
            model[5].weight.grad[0, 0] = float("nan")
            before = [p.detach().clone() for p in model.parameters()]
            opt.step()
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            with pytest.raises(TrainingError, match=r"at step 3, the last one; it updated nothing"):
                opt.zero_groups()
            backward(model)
        opt.step()
        backward(twin), plain.step()
    assert opt.steps_done == plain.steps_done == 6
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert torch.equal(opt.dormant, plain.dormant)
    model[5].weight.grad[0, 0] = float("inf")
    opt.step()
    with pytest.raises(TrainingError, match="updated nothing"):
        opt.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_any_gradient_does_nothing(kind):
    model = perceptron()
    opt = kind(layer_groups(model, ["0"]), mu=0.01, lr=0.1, weight_decay=0.1)
    train(model, opt, 2)
    before = [p.detach().clone() for p in model.parameters()]
    opt.zero_grad()
    opt.step()
    assert opt.steps_done == 2
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_sparse_gradients_and_frozen_models_and_names_given_twice():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    opt = ProxSGD(layer_groups(model, ["1"]), mu=0.0)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TrainingError, match=r"gradient of '0.weight' is sparse.* sparse=False"):
        opt.step()
    with pytest.raises(SpaceError, match="layer '1' is named twice"):
        layer_groups(model, ["1", "1"])
    with pytest.raises(SpaceError, match=r"'1.weight' is named twice in group 'a'"):
        named_groups(model, {"a": ["1.weight", "1.weight"]})
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match="no parameter to train: all are frozen"):
        ProxSGD(layer_groups(model, ["1"]), mu=0.0)


# States and copies.


@quiet
@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        ({"tau": "adaptive"}, {}, r"tau='adaptive', here 1.0"),
        ({}, {"tau": "adaptive"}, r"tau=1.0, here 'adaptive'"),
        ({}, {"normalize": "div"}, r"normalize='none', here 'div'"),
        ({"schedule": True}, {}, r"schedule=\{.*\}, here None"),
    ],
)
def test_a_state_of_other_settings_is_refused(saved, loaded, message):
    from espalier.sparsify import PowerDecay

    model = perceptron()
    saved = {**saved, "schedule": PowerDecay()} if "schedule" in saved else saved
    first = ProxSGD(layer_groups(model, ["0"]), mu=0.01, **saved)
    train(model, first, 2)
    other = ProxSGD(layer_groups(model, ["0"]), mu=0.01, **loaded)
    with pytest.raises(TrainingError, match=message):
        other.load_state_dict(first.state_dict())
    with pytest.raises(TrainingError, match="method='ProxSGD', here 'RMDA': make"):
        RMDA(layer_groups(model, ["0"]), mu=0.01).load_state_dict(first.state_dict())
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    again = ProxSGD(layer_groups(model, ["0"]), mu=1.0, **saved)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert again.mu == 0.01


@quiet
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_trains_the_copy_of_its_model(kind, way):
    model = net()
    opt = kind(layer_groups(model), mu=0.01, lr=0.05)
    torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)  # wraps step()
    for _ in range(2):
        backward(model), opt.step()
    twin, other = way((model, opt))
    assert other.grouping.model is twin
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        backward(twin), other.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for _ in range(3):
        backward(model), opt.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert other.zero_groups() == opt.zero_groups()


@quiet
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_steps_add_up_in_low_precision(kind, dtype):
    """The same as single precision, rounded; also over a pause; and a weight set by hand is taken as it is."""

    def run(model, opt, steps):
        for i in range(steps):
            for k, p in enumerate(model.parameters()):
                p.grad = torch.full_like(p, 2.0**-7 * (1 + (i + k) % 3))  # the same in all precisions
            opt.step()

    low, high = perceptron().to(dtype), perceptron().to(dtype).float()
    opts = [kind(layer_groups(m, ["0"]), mu=1e-4, lr=1e-3) for m in (low, high)]
    start = low[0].weight.detach().clone()
    run(low, opts[0], 40), run(high, opts[1], 40)
    assert not torch.equal(start, low[0].weight)
    state = opts[0].state_dict()
    opts[0] = kind(layer_groups(low, ["0"]), mu=1e-4, lr=1e-3)
    opts[0].load_state_dict(state)
    run(low, opts[0], 40), run(high, opts[1], 40)
    for a, b in zip(low.parameters(), high.parameters(), strict=True):
        assert torch.equal(a, b.to(dtype))
    with torch.no_grad():
        low[0].weight[0] = 3.0
        low[0].bias[0] = 0.0
    assert float(opts[0].group_norms()[0]) == pytest.approx(3 * 6**0.5)
