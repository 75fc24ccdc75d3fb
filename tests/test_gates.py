"""Gates on networks: sampling, conditional computation, batch norm, what remains."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from espalier import construct, search_space
from espalier.errors import TrainingError
from espalier.experiments.l0 import Recipe, gated
from espalier.sparsify import Gates, HardSigmoid, Sigmoid, input_gates, output_gates, sliced
from espalier.sparsify.conditional import Part

METHODS = ("hc", "ar", "arm", "disarm")


def batch(network: str, count: int = 12):
    make = torch.Generator().manual_seed(0)
    shape = (784,) if network == "mlp" else (1, 28, 28)
    x = torch.randn(count, *shape, generator=make, dtype=torch.float64)
    return x, torch.randint(10, (count,), generator=make)


@pytest.mark.parametrize("network", ["mlp", "lenet5"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fewer", [0.0, 3.0])
def test_conditional_computation_changes_nothing(network, method, fewer):
    """Loss and all gradients with closed units left out equal those with closed units multiplied by 0; with most of the
    MLP's inputs open, which then stay in place, and with few.
    """
    x, y = batch(network)
    found = []
    for conditional in (True, False):
        gates = gated(Recipe(network, method, seed=3), 60_000).double()
        gates.model.double()
        gates.conditional = conditional
        with torch.no_grad():
            gates.phi -= fewer / (1 if method == "hc" else 7)
        loss = gates.backward(lambda g=gates: cross_entropy(g(x), y))
        found.append([loss, *(p.grad for p in gates.model.parameters()), gates.phi.grad])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("network", ["mlp", "lenet5"])
@pytest.mark.parametrize("method", ["hc", "arm"])
def test_sliced_and_finished_networks_equal_the_gated_one(network, method):
    x, _ = batch(network)
    gates = gated(Recipe(network, method, seed=3), 60_000).double()
    gates.model.double().eval()
    with torch.no_grad():
        gates.phi.copy_(torch.randn(gates.phi.shape) * (3 if method == "hc" else 1))
    expected = gates(x)
    small = sliced(gates)
    assert torch.allclose(small(x), expected, atol=1e-12)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in gates.model.parameters())
    assert torch.allclose(gates.finish()(x), expected, atol=1e-12)
    for name, mask in gates.masks().items():
        assert not dict(gates.model.named_parameters())[name][~mask].any()


def test_prune_rate_of_the_papers_table():
    """A retained a-b-c of the MLP leaves ab + bc + 10c weights: 143-153-78 is 87.00 % pruned (Table 2)."""
    gates = gated(Recipe("mlp", "arm"), 60_000)
    gates(batch("mlp")[0].float())
    with torch.no_grad():
        gates.phi.fill_(-1.0)
        for values, count in zip(gates.by_site(gates.phi).values(), (143, 153, 78), strict=True):
            values[:count] = 1.0
    left = sum(p.numel() for n, p in sliced(gates).named_parameters() if n.endswith("weight"))
    assert round(100 * (1 - left / 266_200), 2) == 87.00


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("g", [Sigmoid(7.0), HardSigmoid(7.0)], ids=["sigmoid", "hard"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("estimator", ["ar", "arm", "disarm"])
def test_gradient_of_a_network_is_unbiased(estimator, per_sample, g):
    """Against exact enumeration over the 2^4 gates, penalty included, for all parameters and φ."""
    torch.manual_seed(0)
    model = Tiny().double()
    bare = copy.deepcopy(model)
    site = input_gates(model, "b", producer="a")
    gates = Gates(
        model,
        [site],
        estimator=estimator,
        g=g,
        lam=0.02,
        weight_decay=0.3,
        l1=0.05 if estimator == "arm" else 0.0,
        initial=0.4,
        per_sample=per_sample,
    ).double()
    x, y = torch.randn(6, 3).double(), torch.randint(2, (6,))

    def loss():
        return cross_entropy(gates(x), y, reduction="none" if per_sample else "mean")

    pi = gates.probabilities()
    exact = gates.penalty()
    for z in itertools.product((0.0, 1.0), repeat=4):
        z = torch.tensor(z, dtype=torch.float64)
        weight = torch.where(z > 0, pi, 1 - pi).prod()
        exact = exact + weight * cross_entropy(bare.b(torch.tanh(bare.a(x)) * z), y)
    true = torch.autograd.grad(exact, [gates.phi, *model.parameters(), *bare.parameters()], materialize_grads=True)
    true = [true[0], *(a + b for a, b in zip(true[1:5], true[5:], strict=True))]
    draws = []
    for _ in range(500):
        gates.zero_grad()
        model.zero_grad()
        gates.backward(loss, batch_size=6)
        draws.append(torch.cat([p.grad.flatten() for p in (gates.phi, *model.parameters())]))
    draws = torch.stack(draws)
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - torch.cat([t.flatten() for t in true])).abs() <= 4.5 * error + 1e-9).all()


def test_batch_norm_statistics_are_updated_once_and_the_mode_is_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    seen = []
    model[1].register_forward_hook(lambda m, args, out: seen.append((m.training, out.mean().abs().item())))
    gates = Gates(model, [output_gates(model, "0")], estimator="arm")
    x, y = torch.randn(8, 2, 5, 5), torch.randint(2, (8,))
    gates(x[:2])
    assert model[1].num_batches_tracked == 1
    model[1].reset_running_stats()
    seen.clear()
    gates.backward(lambda: cross_entropy(gates(x), y))
    assert [mode for mode, _ in seen] == [True, True]
    assert model[1].num_batches_tracked == 1
    assert model[1].track_running_stats


def test_both_passes_see_the_same_dropout():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    seen = []
    model[1].register_forward_hook(lambda m, args, out: seen.append(out / args[0]))
    gates = Gates(model, [input_gates(model, "2", producer="0")], estimator="arm")
    gates(torch.randn(3, 4))
    seen.clear()
    gates.backward(lambda: gates(torch.randn(3, 4).abs()).square().mean())
    kept = [(s != 0) for s in seen]
    assert torch.equal(*kept)


def test_both_passes_see_the_same_functional_dropout():
    class Net(Tiny):
        def forward(self, x):
            y = torch.nn.functional.dropout(torch.tanh(self.a(x)), 0.5)
            seen.append(y.detach() != 0)
            return self.b(y)

    seen, model = [], Net()
    gates = Gates(model, [input_gates(model, "b", producer="a")], estimator="arm")
    x = torch.randn(3, 3)
    gates(x)
    seen.clear()
    gates.backward(lambda: gates(x).square().mean())
    assert torch.equal(*seen)
    gates.backward(lambda: gates(x).square().mean())
    assert not torch.equal(seen[0], seen[2])


def test_solution_of_layer_gates_masks_closed_units():
    torch.manual_seed(0)
    model, x = Tiny(), torch.randn(5, 3)
    gates = Gates(model, [input_gates(model, "b", producer="a")])
    gates(x)
    with torch.no_grad():
        gates.phi.copy_(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    space = search_space(model, (x,))
    solution = gates.solution(space)
    assert solution.masks["a.weight"].any(1).tolist() == [True, False, True, False]
    finished = gates.finish()(x)
    assert torch.allclose(construct(space, solution)(x), finished, atol=1e-6)


def test_resume_is_bit_identical():
    def make():
        torch.manual_seed(0)
        model = Tiny()
        gates = Gates(model, [input_gates(model, "b", producer="a")], lam=0.1)
        return model, gates, torch.optim.Adam([*model.parameters(), *gates.parameters()], lr=0.05)

    x, y = torch.randn(8, 3), torch.randint(2, (8,))

    def train(gates, opt, steps):
        for _ in range(steps):
            opt.zero_grad()
            gates.backward(lambda: cross_entropy(gates(x), y))
            opt.step()

    model, gates, opt = make()
    train(gates, opt, 6)
    half, half_gates, half_opt = make()
    train(half_gates, half_opt, 3)
    rest, rest_gates, rest_opt = make()
    rest.load_state_dict(half.state_dict())
    rest_gates.load_state_dict(half_gates.state_dict())
    rest_opt.load_state_dict(half_opt.state_dict())
    train(rest_gates, rest_opt, 3)
    assert torch.equal(gates.phi, rest_gates.phi)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), rest.parameters(), strict=True))


def test_lambda_is_divided_by_the_number_of_examples():
    model = Tiny()
    site = input_gates(model, "b", producer="a")
    gates = Gates(model, [site], lam={"b": 3.0}, examples=100, initial=0.25)
    expected = 3.0 / 100 * 2 * gates.probabilities().sum()  # |g| = fan-out = 2
    assert gates.penalty().item() == pytest.approx(expected.item(), rel=1e-5)


NAN, INFINITY = float("nan"), float("inf")
BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    *(({"lam": bad}, "lam is at least 0") for bad in (NAN, INFINITY, {"b": NAN})),
    *(({"examples": bad}, "lam is at least 0, and examples") for bad in (0, NAN)),
    *(({"initial": bad}, "initial: probabilities lie strictly") for bad in (NAN, 0.0, 1.0, -0.1, {"b": 1.5})),
    *(({"weight_decay": bad}, "weight_decay and l1 are at least 0") for bad in (-1e-3, NAN, INFINITY)),
    *(({"l1": bad}, "weight_decay and l1 are at least 0") for bad in (-1e-3, NAN, INFINITY)),
    *(({"threshold": bad}, "threshold: a number from 0") for bad in (1.0, 1.5, -1, NAN, "otsu", "0.5")),
]


def test_bad_input():
    model = Tiny()
    site = input_gates(model, "b", producer="a")
    with pytest.raises(TrainingError, match="unknown estimator 'reinforce'"):
        Gates(model, [site], estimator="reinforce")
    with pytest.raises(TrainingError, match="sites is empty"):
        Gates(model, [])
    with pytest.raises(TrainingError, match="no site's name"):
        Gates(model, [site], lam={"c": 1.0})
    with pytest.raises(TrainingError, match="lam is at least 0"):
        Gates(model, [site], lam=-1.0)
    for options, why in BAD_OPTIONS:
        with pytest.raises(TrainingError, match=why):
            Gates(model, [site], **options)
    gates = Gates(model, [site])
    with pytest.raises(TrainingError, match="'histogram', not 'otsu'"):
        gates.threshold = "otsu"
    assert gates.threshold == 0.5
    with pytest.raises(TrainingError, match="no layer is called 'c'"):
        input_gates(model, "c")
    with pytest.raises(TrainingError, match="no multiple"):
        output_gates(nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 2)), "0", consumers=["1"])
    with pytest.raises(TrainingError, match=r"give backward\(\) the batch_size"):
        Gates(Tiny(), [site], per_sample=True).backward(lambda: torch.zeros(()))
    with pytest.raises(TrainingError, match="expected"):
        Gates(Tiny(), [site]).backward(lambda: model(torch.zeros(2, 3)))
    with pytest.raises(TrainingError, match="the loss is nan"):
        Gates(Tiny(), [site]).backward(lambda: torch.tensor(float("nan"), requires_grad=True))
    frozen = Tiny().requires_grad_(False)
    with pytest.raises(TrainingError, match=r"frozen \(requires_grad=False\)"):
        input_gates(frozen, "b")
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match=r"frozen \(requires_grad=False\)"):
        Gates(model, [site])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("rows", "columns"), [([0, 2], [1, 3]), ([0, 2], None), (None, [1, 3])])
def test_a_part_adds_its_gradient_to_the_full_parameters(rows, columns, layout):
    torch.manual_seed(0)
    full = nn.Parameter(torch.randn(3, 4, 2, 2).to(memory_format=layout))
    rows, columns = (None if at is None else torch.tensor(at) for at in (rows, columns))
    part, factor = Part.of("w", full, rows, columns), torch.randn(1)
    for _ in range(2):  # the second time onto the first
        (part.value.square().sum() * factor).backward()
        part.put_back()
    chosen = full.detach().clone().requires_grad_()
    taken = chosen if rows is None else chosen[rows]
    taken = taken if columns is None else taken[:, columns]
    (2 * taken.square().sum() * factor).backward()
    torch.testing.assert_close(full.grad, chosen.grad)


@pytest.mark.parametrize("conditional", [False, True])
def test_a_copy_computes_with_its_own_gates(conditional):
    """Whatever happens to the original, in eval mode, in training and when it is cut; the user's own hooks stay."""
    x, y = batch("lenet5", 4)
    gates = gated(Recipe("lenet5", "arm", seed=1), 60_000).double()
    gates.model.double()
    gates.conditional = conditional
    calls = []
    gates.model.conv1.register_forward_hook(lambda *_: calls.append("conv1"))
    gates.backward(lambda: cross_entropy(gates(x), y))
    gates.model.eval()
    wanted = gates(x)
    copied = copy.deepcopy(gates)
    with torch.no_grad():
        for p in (gates.phi, *gates.model.parameters()):
            p += 0.3 * torch.randn_like(p)
    torch.testing.assert_close(copied(x), wanted, rtol=0, atol=0)
    assert not torch.equal(gates(x), wanted)
    calls.clear()
    torch.testing.assert_close(sliced(copied)(x), wanted)
    assert calls == ["conv1"]
    copied.zero_grad()
    copied.model.zero_grad()
    before = gates.phi.grad.clone()
    copied.backward(lambda: cross_entropy(copied(x), y))
    assert copied.phi.grad.any()
    assert torch.equal(gates.phi.grad, before)
    gates.finish()
    torch.testing.assert_close(copy.deepcopy(gates)(x), gates.model(x))


def test_a_call_that_was_broken_off_leaves_nothing_behind():
    """Narrow parameters' gradients of the first attempt are not added to the second's."""
    x, y = batch("mlp")
    found = []
    for broken in (True, False):
        gates = gated(Recipe("mlp", "ar", seed=2), 60_000).double()
        gates.model.double()

        def fails(gates: Gates = gates) -> torch.Tensor:
            cross_entropy(gates(x), y).backward()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            gates.backward(fails)
        if not broken:
            gates._parts.clear()
        gates.zero_grad()
        gates.model.zero_grad()
        gates.backward(lambda g=gates: cross_entropy(g(x), y))
        found.append([p.grad for p in gates.model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
