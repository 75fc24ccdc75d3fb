"""What sites say of a network is tried out: exact, or refused with what lies between."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from espalier import construct, search_space
from espalier.errors import TrainingError
from espalier.experiments.l0 import Recipe, gated
from espalier.sparsify import Gates, input_gates, output_gates, sliced
from espalier.sparsify.layer_macs import layer_macs


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(x + torch.relu(self.b(torch.relu(self.a(x)))))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.sigmoid(self.a(x)))


class Table(Functional):
    """A table, zero at first, is added to the units."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)) + self.table)


class SecondReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        return self.b(y) + self.c(y)


class RootMeanSquare(Functional):
    """Zeros stay zeros, but without them the mean is another."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        return self.b(y * (y.square().mean(-1, keepdim=True) + 1e-3).rsqrt())


def chain(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), *between, nn.Linear(8, 3))


def normed() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 3)
    )


X, IMAGES = torch.randn(5, 6), torch.randn(5, 3, 6, 6)
WRONG = {
    "batch norm": (normed, lambda m: output_gates(m, "0", consumers=["3"]), IMAGES, r"'1' \(BatchNorm2d\), '2' \(ReLU"),
    "one gate": (
        lambda: nn.Sequential(nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1), nn.Conv2d(1, 2, 3)),
        lambda m: output_gates(m, "0", consumers=["2"]), IMAGES, r"Between them: '1' \(BatchNorm2d\)\.",
    ),
    "sigmoid": (lambda: chain(nn.Sigmoid()), lambda m: output_gates(m, "0", consumers=["2"]), X, r"'1' \(Sigmoid\)"),
    "function": (Functional, lambda m: output_gates(m, "a", consumers=["b"]), X, r"Between them: sigmoid\."),
    "layer norm": (lambda: chain(nn.LayerNorm(8)), lambda m: output_gates(m, "0", consumers=["2"]), X, "LayerNorm"),
    "softmax": (lambda: chain(nn.Softmax(-1)), lambda m: output_gates(m, "0", consumers=["2"]), X, "Softmax"),
    "table": (Table, lambda m: output_gates(m, "a", consumers=["b"]), X, r"relu, Tensor\.add"),
    "residual": (Residual, lambda m: output_gates(m, "b", consumers=["c"]), X, r"relu, Tensor\.add"),
    "second reader": (SecondReader, lambda m: input_gates(m, "b", producer="a"), X, "no other layer may read these"),
}  # fmt: skip


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_site_is_refused(name, conditional):
    """At the first evaluation, in train mode and fresh as it is, and before anything could rely on it."""
    torch.manual_seed(0)
    make, site, x, lies = WRONG[name]
    model = make()
    before = copy.deepcopy(model.state_dict())
    gates = Gates(model, [site(model)], conditional=conditional)
    for use in (gates.finish, gates.masks, lambda: sliced(gates)):
        with pytest.raises(TrainingError, match=r"call gates\(x\) once"):
            use()
    with pytest.raises(TrainingError, match=lies) as error:
        gates.backward(lambda: gates(x).square().mean())
    assert "SpaceGates" in str(error.value)
    assert f"'{gates.sites[0].layer}'" in str(error.value)
    assert all(torch.equal(a, before[n]) for n, a in model.state_dict().items())
    with pytest.raises(TrainingError, match=lies):
        gates(x)
    with pytest.raises(TrainingError, match=r"call gates\(x\) once"):
        gates.finish()


NARROW = {
    "second reader": (SecondReader, lambda m: output_gates(m, "a", consumers=["b"]), "does not run without"),
    "residual, by inputs": (Residual, lambda m: input_gates(m, "c", producer="b"), r"relu, Tensor\.add"),
    "norm, by inputs": (lambda: chain(nn.BatchNorm1d(8)), lambda m: input_gates(m, "2", "0"), "BatchNorm1d"),
    "no consumer": (lambda: chain(nn.ReLU()), lambda m: output_gates(m, "0"), "does not run without"),
    "root mean square": (RootMeanSquare, lambda m: output_gates(m, "a", consumers=["b"]), "computes something else"),
}


@pytest.mark.parametrize("name", NARROW)
def test_units_that_can_be_zero_but_not_left_out(name):
    """``finish`` is exact; ``sliced`` and conditional computation are refused."""
    torch.manual_seed(0)
    make, site, why = NARROW[name]
    model = make().eval()
    gates = Gates(model, [site(model)], seed=1)
    before = gates(X)
    assert 0 < sum(gates.open_counts().values()) < gates.sites[0].count
    with pytest.raises(TrainingError, match=why):
        sliced(gates)
    gates.conditional = True
    with pytest.raises(TrainingError, match=why):
        gates(X)
    assert torch.allclose(gates.finish()(X), before, atol=1e-6)


RIGHT = {
    "relu": (lambda: chain(nn.ReLU(), nn.Dropout(0.5)), lambda m: [output_gates(m, "0", consumers=["3"])]),
    "gelu": (lambda: chain(nn.GELU()), lambda m: [input_gates(m, "2", producer="0")]),
    "sigmoid, by inputs": (Functional, lambda m: [input_gates(m, "b", producer="a")]),
    "both readers": (SecondReader, lambda m: [output_gates(m, "a", consumers=["b", "c"])]),
    "both sides": (
        lambda: chain(nn.Tanh()),
        lambda m: [output_gates(m, "0", ["2"]), input_gates(m, "2", producer="0"), input_gates(m, "0", name="x")],
    ),
    "inputs alone": (Residual, lambda m: [input_gates(m, "c"), input_gates(m, "a")]),
}  # fmt: skip


@pytest.mark.parametrize("estimator", ["hc", "arm"])
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_site_is_exact(name, estimator):
    torch.manual_seed(0)
    make, sites = RIGHT[name]
    model, x = make().double().eval(), X.double()
    gates = Gates(model, sites(model), estimator=estimator, conditional=True, seed=1).double()
    with torch.no_grad():
        gates.phi.copy_(torch.randn(gates.phi.shape, generator=torch.Generator().manual_seed(2)) * 3)
    before, space = gates(x).detach(), search_space(model, (x,))
    small, solution = sliced(gates), gates.solution(space)
    assert torch.allclose(small(x), before, atol=1e-12)
    assert torch.allclose(gates.finish()(x), before, atol=1e-12)
    assert torch.allclose(construct(space, solution)(x), before, atol=1e-12)


def test_the_sites_are_tried_out_once():
    model, calls = chain(nn.ReLU()), []
    model[1].register_forward_hook(lambda *_: calls.append(model.training))
    gates = Gates(model, [input_gates(model, "2", producer="0")])
    state = torch.random.get_rng_state()
    gates(X * float("nan"))  # tells nothing: tried again
    assert len(calls) == 2
    gates(X)
    assert len(calls) == 2 + 4 + 1
    gates(X)
    assert len(calls) == 8
    assert calls[-1]
    assert torch.equal(torch.random.get_rng_state(), state)


class Masked(nn.Module):
    """The last class is never taken: its logit is ``fill``."""

    def __init__(self, fill: float, added: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.fill, self.added = nn.Linear(6, 8), nn.Linear(8, 4), fill, added

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        y = y + x.sum(-1, keepdim=True) if self.added else y
        return self.b(y).masked_fill(torch.arange(4) == 3, self.fill)


FILLS = [float("-inf"), float("inf"), float("nan"), -1e9, torch.finfo(torch.float32).min]


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("fill", FILLS)
def test_masked_logits(fill, conditional):
    """What is infinite or NaN anyway, or huge, does not keep the sites from being tried out, once."""
    torch.manual_seed(0)
    model, calls = Masked(fill), []
    gates = Gates(model, [input_gates(model, "b", producer="a")], conditional=conditional, seed=1)
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    gates.backward(lambda: gates(X)[:, :3].square().mean())
    gates(X)
    assert len(calls) == 4 + 2 + 1
    handle.remove()
    before = gates(X).detach()
    torch.testing.assert_close(sliced(gates)(X), before, equal_nan=True)
    torch.testing.assert_close(gates.finish()(X), before, equal_nan=True)


@pytest.mark.parametrize("fill", FILLS)
def test_masked_logits_cover_nothing_up(fill):
    torch.manual_seed(0)
    model = Masked(fill, added=True)
    with pytest.raises(TrainingError, match=r"'a', said to be read by 'b' alone: closing them"):
        Gates(model, [output_gates(model, "a", consumers=["b"])])(X)


@pytest.mark.parametrize("x", [X * float("nan"), X * float("inf")])
def test_an_output_that_tells_nothing(x):
    """Said so, and units are then multiplied, not left out, until one tells."""
    model = chain(nn.ReLU())
    gates = Gates(model, [input_gates(model, "2", producer="0")], conditional=True, initial=0.3, seed=1)
    with pytest.warns(UserWarning, match="held no finite number.* all units are computed"):
        gates(x)
    with pytest.raises(TrainingError, match="'2' first, is not known: the network's output held no finite number"):
        gates.finish()
    seen = []
    handle = model[1].register_forward_hook(lambda m, args, out: seen.append(out.shape[-1]))
    with pytest.raises(TrainingError, match="nan"):
        gates.backward(lambda: gates(x).mean())
    assert set(seen) == {8}
    handle.remove()
    gates(X)
    assert gates.masks()


class TokenMixer(nn.Module):
    """[B, ..., C] with gates on the inputs of the first layer, which nothing makes narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.f1, self.f2, self.h = nn.Linear(6, 5), nn.Linear(5, 9), nn.Linear(9, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.p(x)
        return self.h(y + self.f2(nn.functional.gelu(self.f1(y)))).reshape(len(x), -1, 3).mean(1)


@pytest.mark.parametrize("estimator", ["hc", "arm"])
@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (4, 7, 2, 6)])
def test_features_of_a_linear_layer_are_last(shape, estimator):
    """With any number of dimensions before; conditional computation against multiplication, then all that remains."""
    x, y, found = torch.randn(shape, dtype=torch.float64), torch.arange(4) % 3, []
    for conditional in (False, True):
        torch.manual_seed(0)
        model = TokenMixer().double()
        sites = [input_gates(model, "f2", producer="f1"), input_gates(model, "p"), input_gates(model, "h")]
        options = {"initial": 0.4 if estimator == "arm" else 0.08, "seed": 3, "estimator": estimator}
        gates = Gates(model, sites, conditional=conditional, **options).double()
        seen = []
        model.f1.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out.shape[-1]))
        gates(x)
        seen.clear()
        loss = gates.backward(lambda g=gates: cross_entropy(g(x), y))
        assert (min(seen) < 9) == conditional
        found.append([loss, *(p.grad for p in (gates.phi, *model.parameters()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        gates.phi.copy_(torch.randn(gates.phi.shape, generator=torch.Generator().manual_seed(2)) * 3)
    before = gates(x).detach()
    small = sliced(gates)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert torch.allclose(small(x), before, atol=1e-12)
    assert torch.allclose(gates.finish()(x), before, atol=1e-12)


def test_the_site_to_blame_is_named():
    """Of a right and a wrong one, whatever their order."""
    for turn in (1, -1):
        model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
        sites = [input_gates(model, "2", producer="0"), input_gates(model, "4", producer="2")]
        gates = Gates(model, sites[::turn])
        gates(X)
        with pytest.raises(TrainingError, match=r"gates '4' on the input of '4'.*'3' \(BatchNorm1d\)"):
            gates.need_narrow()


def test_sites_that_do_not_fit():
    model = chain(nn.ReLU())
    site = input_gates(model, "2", producer="0")
    for sites, words in (
        (site, r"sites is one site, '2', and no list: give \[input_gates"),
        (["2"], "'2' is no site: make sites with input_gates"),
        ("2", "'2' is no site"),
        ([site, input_gates(model, "2", name="again")], "two sites gate the input of '2'"),
        ([input_gates(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), "2")], "another model"),
        (
            [input_gates(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.ReLU(), nn.Linear(8, 3)), "3")],
            "'3.weight' is mis",
        ),
    ):
        with pytest.raises(TrainingError, match=words):
            Gates(model, sites)
    assert not model[2]._forward_pre_hooks
    with pytest.raises(TrainingError, match=r"consumers is a list of layers: consumers=\['2'\]"):
        output_gates(model, "0", consumers="2")


def test_under_autocast():
    model = chain(nn.ReLU())
    gates = Gates(model, [input_gates(model, "2", producer="0")], conditional=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert gates(X.bfloat16()).dtype == torch.bfloat16


def test_other_outputs_than_tensors():
    class Wrapped(Functional):
        def forward(self, x: Tensor) -> object:
            return {"loss": self.b(torch.relu(self.a(x))), "more": (1, None)} if len(x) > 1 else "nothing"

    model = Wrapped()
    gates = Gates(model, [input_gates(model, "b", producer="a")])
    with pytest.raises(TrainingError, match="no tensor is found"):
        gates(X[:1])
    gates(X)
    assert gates.masks()


def test_layers_that_cannot_be_gated():
    tied = chain(nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))
    tied[3].weight = tied[2].weight
    for model, layer, why in (
        (nn.Sequential(nn.ConvTranspose2d(3, 3, 3)), "0", "transposed"),
        (nn.Sequential(nn.Embedding(4, 4)), "0", "is a Embedding"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), "0", "no weight of its own"),
        (tied, "3", "shared with a layer"),
    ):
        with pytest.raises(TrainingError, match=why):
            output_gates(model, layer)
    grouped = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=2))
    with pytest.raises(TrainingError, match="'1' is a grouped convolution"):
        output_gates(grouped, "0", consumers=["1"])


def test_two_sites_of_one_name():
    model = chain(nn.ReLU())
    with pytest.raises(TrainingError, match="two sites are called '0': give one of them another name"):
        Gates(model, [input_gates(model, "0"), output_gates(model, "0", consumers=["2"])])


def test_finish_happens_once():
    torch.manual_seed(0)
    model = chain(nn.ReLU())
    gates = Gates(model, [input_gates(model, "2", producer="0")])
    before = gates(X).detach()
    gates.finish()
    assert gates.finish() is model
    for again in (gates.folded, lambda: sliced(gates), lambda: gates.backward(lambda: gates(X).mean())):
        with pytest.raises(TrainingError, match="folded into the model"):
            again()
    assert torch.allclose(model(X), before, atol=1e-6)
    assert torch.allclose(gates(X), before, atol=1e-6)


# What it costs.


@pytest.mark.parametrize("method", ["hc", "arm"])
@pytest.mark.parametrize("network", ["mlp", "lenet5"])
def test_expected_macs_of_the_papers_networks(network, method):
    """Against the layers' MACs written out, and the mean probabilities of their two sides."""
    gates = gated(Recipe(network, method, lam="separate", seed=1), 60_000)
    x = torch.randn(2, 784) if network == "mlp" else torch.randn(2, 1, 28, 28)
    pi = {name: p.detach() for name, p in gates.by_site(gates.probabilities()).items()}
    if network == "mlp":
        a, b, c = (p.mean() for p in pi.values())
        wanted = (235_200 * a * b + 30_000 * b * c + 1000 * c) / 266_200
    else:
        one, two, own, last = pi.values()
        both = (two.repeat_interleave(16) * own).mean()
        full = {"conv1": 500 * 576, "conv2": 25_000 * 64, "fc1": 400_000, "fc2": 5000}
        macs = full["conv1"] * one.mean() + full["conv2"] * one.mean() * two.mean()
        wanted = (macs + full["fc1"] * both * last.mean() + full["fc2"] * last.mean()) / sum(full.values())
    assert gates.expected_macs((x,)) == pytest.approx(float(wanted), rel=1e-5)
    passes = 2 if method == "arm" else 1
    assert gates.expected_macs((x,), training=True) == pytest.approx(passes * float(wanted), rel=1e-5)


def test_expected_macs_count_what_is_not_gated_in_full():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.Linear(3, 50))
    gates = Gates(model, [input_gates(model, "2")], initial=0.25)
    share = float(gates.probabilities().detach().mean())
    assert gates.expected_macs((X,)) == pytest.approx((48 + 24 * share + 150) / 222)


def test_macs_of_a_layer_called_twice():
    class Twice(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)) + torch.relu(self.a(-x)))

    assert layer_macs(Twice(), ["a", "b"], (X[:1],)) == {"a": 96, "b": 24, "": 120}


def test_a_loss_without_gradient():
    model = chain(nn.ReLU())
    gates = Gates(model, [input_gates(model, "2", producer="0")])
    y = torch.zeros(5, dtype=torch.long)
    with pytest.raises(TrainingError, match="not detached"):
        gates.backward(lambda: cross_entropy(gates(X), y).detach())
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match=r"'0.weight' is frozen \(requires_grad=False\)"):
        gates.backward(lambda: cross_entropy(gates(X), y))
