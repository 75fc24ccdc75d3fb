"""One training step with gates: scaled losses, buffers, values that are not finite, random numbers, saved states."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from espalier import search_space
from espalier.errors import TrainingError
from espalier.sparsify import Gates, HardSigmoid, Sigmoid, SpaceGates, input_gates
from espalier.sparsify.finite import Watch

METHODS = ("hc", "ar", "arm", "disarm")
X, Y = torch.randn(12, 6), torch.randint(3, (12,))
NAN = float("nan")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def layer_gates(model: nn.Module, **options) -> Gates:
    return Gates(model, [input_gates(model, "2", producer="0")], lam=0.3, examples=10, seed=1, **options)


def space_gates(model: nn.Module, **options) -> SpaceGates:
    return SpaceGates(search_space(model, X[:2], levels=("channel",)), lam=0.3, examples=10, seed=1, **options)


# Scaled losses.


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("norms", [{}, {"weight_decay": 0.2}, {"weight_decay": 0.2, "l1": 0.1}])
@pytest.mark.parametrize("estimator", METHODS)
@pytest.mark.parametrize("make", [layer_gates, space_gates])
def test_a_scaler_changes_nothing(make, estimator, norms, enabled):
    """The usual ``unscale_``, ``step``, ``update`` from the first step on, against plain steps."""
    found = []
    for scaled in (True, False):
        model = network()
        gates = make(model, estimator=estimator, conditional=False, **norms)
        opt = torch.optim.SGD([*model.parameters(), *gates.parameters()], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2, enabled=enabled)
        for _ in range(4):
            opt.zero_grad()
            if scaled:
                loss = gates.backward(lambda g=gates: cross_entropy(g(X), Y), scaler=scaler)
                scaler.unscale_(opt)
                scaler.step(opt)
                scaler.update()
            else:
                loss = gates.backward(lambda g=gates: cross_entropy(g(X), Y))
                opt.step()
        assert scaler.get_scale() == (2.0**14 if scaled and enabled else 2.0**12 if enabled else 1.0)
        found.append([loss, gates.phi.detach(), *(p.detach() for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-5)


def test_a_scaler_skips_a_step_whose_gradient_overflows():
    model = network()
    gates = layer_gates(model)
    opt = torch.optim.SGD([*model.parameters(), *gates.parameters()], lr=0.1)
    scaler, before = torch.amp.GradScaler("cpu", init_scale=2.0**127), gates.phi.detach().clone()
    gates.backward(lambda: cross_entropy(gates(X), Y) * 1e3, scaler=scaler)
    scaler.step(opt)
    scaler.update()
    assert torch.equal(gates.phi, before)
    assert scaler.get_scale() == 2.0**126


# Buffers.


class FunctionalNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, training=self.training)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Tensor
        self.last: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.last + x.detach().mean()  # another tensor than before
        return x


NORMS = {
    "batch norm": lambda: nn.BatchNorm2d(6),
    "cumulative": lambda: nn.BatchNorm2d(6, momentum=None),
    "instance norm": lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    "functional": FunctionalNorm,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 6, 1)),
    "own": Counting,
}


@pytest.mark.parametrize("estimator", METHODS)
@pytest.mark.parametrize("norm", NORMS)
def test_buffers_change_once_a_step(norm, estimator):
    """As in one pass of the bare model, whose inputs up to the norm are the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), NORMS[norm](), nn.Flatten(), nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 3))
    gates = Gates(model, [input_gates(model, "5", producer="3")], estimator=estimator)
    x = torch.randn(4, 3, 6, 6)
    gates._check((x,), {})  # in eval mode a counter counts as well
    bare = copy.deepcopy(model)
    bare(x)  # also runs the hooks of `gates`, with gates as after training
    gates.backward(lambda: cross_entropy(gates(x), torch.tensor([0, 1, 2, 0])))
    for (name, a), b in zip(model.named_buffers(), bare.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


# What is not finite.


def spoiled(kind: str, gates: Gates | SpaceGates):
    """A loss with a value that is not finite in one place."""
    calls = []

    def loss() -> Tensor:
        calls.append(None)
        value = cross_entropy(gates(X), Y)
        if kind == "gradient":  # 0 * inf in the chain rule, of a finite value
            return value + (gates.model[0].bias[0] - gates.model[0].bias[0].detach()).abs().sqrt()
        if kind == "infinite":
            return value / 0.0
        return value * (NAN if len(calls) == (1 if kind == "partner" else 2) else 1.0)

    return loss


@pytest.mark.parametrize("make", [layer_gates, space_gates])
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("loss", "the loss is nan"),
        ("partner", "the loss is nan"),
        ("infinite", "the loss is inf"),
        ("gradient", "the gradient of '0.bias' is not finite"),
    ],
)
def test_what_is_not_finite_is_refused(kind, says, make):
    gates = make(network(), estimator="arm")
    with pytest.raises(TrainingError, match=says):
        gates.backward(spoiled(kind, gates))


def test_a_watch_with_lag_says_so_later():
    """What an accelerator does: it is not waited for."""
    watch, fine = Watch(lag=2), {"w": torch.ones(2)}
    watch.see(torch.tensor(1.0), {"w": torch.tensor([1.0, NAN])})
    watch.see(torch.tensor(1.0), fine)
    copy.deepcopy(watch).see(torch.tensor(1.0), fine)
    with pytest.raises(TrainingError, match="was not finite 2 steps ago"):
        watch.see(torch.tensor(1.0), fine)
    for _ in range(4):
        watch.see(torch.tensor(1.0), {})
    Watch().see(torch.tensor(3e38), {"w": torch.full((4,), 3e38), "empty": torch.zeros(0)})  # large is finite


def test_sparse_gradients_are_looked_at():
    bad = torch.sparse_coo_tensor([[0, 0]], [1.0, NAN], (3,), check_invariants=True)
    with pytest.raises(TrainingError, match="the gradient of 'w' is not finite"):
        Watch().see(torch.tensor(1.0), {"w": bad})


# Random numbers and saved states.


@pytest.mark.parametrize("make", [layer_gates, space_gates])
def test_draws_do_not_depend_on_the_batch_before(make):
    """With a draw per example, a shorter batch takes as many random numbers as a whole one: ranks stay in step."""
    draws = []
    for sizes in ((5, 3), (2, 3)):
        gates, seen = make(network(), per_sample=True), []
        for size in sizes:

            def loss(g=gates, n=size, seen=seen) -> Tensor:
                assert g._z is not None
                seen.append(g._z)
                return cross_entropy(g(X[:n]), Y[:n], reduction="none")

            gates.backward(loss, batch_size=size)
        draws.append(seen)
    assert torch.equal(draws[0][-1], draws[1][-1])
    assert torch.equal(draws[0][0][:2], draws[1][0])
    assert not torch.equal(draws[0][1][:3], draws[0][-1])


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("estimator", METHODS)
def test_resume_is_bit_identical(estimator, per_sample):
    how = "none" if per_sample else "mean"

    def train(gates: Gates, sizes: tuple[int, ...]) -> None:
        opt = torch.optim.SGD([*gates.model.parameters(), *gates.parameters()], lr=0.3)
        for n in sizes:
            opt.zero_grad()
            gates.backward(lambda n=n: cross_entropy(gates(X[:n]), Y[:n], reduction=how), batch_size=n)
            opt.step()

    whole = layer_gates(network(), estimator=estimator, per_sample=per_sample)
    train(whole, (12, 7, 12, 5))
    half = layer_gates(network(), estimator=estimator, per_sample=per_sample)
    train(half, (12, 7))
    rest = layer_gates(network(), estimator=estimator, per_sample=per_sample)
    rest.load_state_dict(half.state_dict())
    rest.model.load_state_dict(half.model.state_dict())
    train(rest, (12, 5))
    assert torch.equal(whole.phi, rest.phi)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True))


def test_a_state_of_other_gates_is_refused():
    saved = layer_gates(network(), estimator="arm").state_dict()
    with pytest.raises(TrainingError, match=r"π is Sigmoid\(k=7.0\), and these are hard concrete"):
        layer_gates(network(), estimator="hc").load_state_dict(saved)
    with pytest.raises(TrainingError, match=r"Sigmoid\(k=7.0\), and these are HardSigmoid\(k=7.0\)"):
        layer_gates(network(), g=HardSigmoid()).load_state_dict(saved)
    layer_gates(network(), estimator="disarm").load_state_dict(saved)  # φ means the same
    del saved["_extra_state"]["gate"]  # as saved by older versions
    layer_gates(network(), g=Sigmoid(7.0)).load_state_dict(saved)


# What calls may look like.


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        self.reentrant = reentrant

    def forward(self, x):
        x = self.body(x)
        if self.reentrant is None or not torch.is_grad_enabled():
            return self.head(x)
        return checkpoint(self.head, x, use_reentrant=self.reentrant)


def on_layers(model: nn.Module) -> Gates:
    return Gates(model, [input_gates(model, "head.2", producer="head.0")], lam=0.1)


def on_a_space(model: nn.Module) -> SpaceGates:
    return SpaceGates(search_space(model, (torch.randn(2, 4),), levels=("channel",)), lam=0.1)


@pytest.mark.parametrize("made", [on_layers, on_a_space])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_refused(made, reentrant):
    """Whatever is computed again in the backward pass would be computed without the drawn gates."""
    model = Checkpointed(None)
    gates = made(model)
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    gates.backward(lambda: cross_entropy(gates(x), y))
    model.reentrant = reentrant
    with pytest.raises(TrainingError, match=r"'head.*checkpointing"):
        gates.backward(lambda: cross_entropy(gates(x), y))
    model.reentrant = None
    gates.backward(lambda: cross_entropy(gates(x), y))


@pytest.mark.parametrize("made", [on_layers, on_a_space])
def test_the_penalty_counts_once_in_a_step_of_several_calls(made):
    model = Checkpointed(None)
    gates = made(model)
    gates.phi.grad = None
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    found = []
    for share in (1.0, 0.25, 0.0):
        gates.zero_grad()
        gates._generator.manual_seed(5)
        gates.backward(lambda: cross_entropy(gates(x), y), penalty_share=share)
        found.append(gates.phi.grad.clone())
    gates.zero_grad()
    gates.penalty().backward()
    torch.testing.assert_close(found[0] - found[2], gates.phi.grad)
    torch.testing.assert_close(found[1] - found[2], 0.25 * gates.phi.grad)


@pytest.mark.parametrize("made", [on_layers, on_a_space])
def test_calls_that_cannot_be_right(made):
    gates, x, y = made(Checkpointed(None)), torch.randn(8, 4), torch.arange(8) % 3
    with pytest.raises(TrainingError, match="a function that evaluates the loss"):
        gates.backward(cross_entropy(gates(x), y))
    with pytest.raises(TrainingError, match="the loss is a float"):
        gates.backward(lambda: float(cross_entropy(gates(x), y)))
    with pytest.raises(TrainingError, match="penalty_share"):
        gates.backward(lambda: cross_entropy(gates(x), y), penalty_share=-1.0)
    gates.phi.requires_grad_(False)
    with pytest.raises(TrainingError, match="phi is frozen"):
        gates.backward(lambda: cross_entropy(gates(x), y))


def test_gates_of_a_space_act_in_their_own_call():
    """On layers they act through hooks, wherever the model is called."""
    x, y, model = torch.randn(8, 4), torch.arange(8) % 3, Checkpointed(None)
    gates = on_a_space(model)
    with pytest.raises(TrainingError, match=r"through gates\(x\)"):
        gates.backward(lambda: cross_entropy(model(x), y))
    on_layers(model).backward(lambda: cross_entropy(model(x), y))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"g": "sigmoid"}, "such as Sigmoid"),
        ({"lam": None}, "lam is a number"),
        ({"initial": "half"}, "initial is a number"),
        ({"threshold": None}, "threshold: a number"),
    ],
)
def test_options_that_are_none(options, words):
    model = Checkpointed(None)
    with pytest.raises(TrainingError, match=words):
        Gates(model, [input_gates(model, "head.2", producer="head.0")], **options)
