"""Gates of each example's own, on layers: exact, or refused where examples mix or the batch is not in front."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy

from espalier.errors import TrainingError
from espalier.sparsify import Gates, input_gates, output_gates


class Normed(nn.Module):
    """A batch norm as a layer or as a function after the gated layer."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 3)
        self.norm = None if functional else nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.a(x)))
        x = self.norm(x) if self.norm is not None else F.batch_norm(x, x.mean(0), x.var(0), training=self.training)
        return self.c(torch.tanh(x))


class Recurrent(nn.Module):
    """[B, T, C], in the middle as [T, B, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.r, self.f, self.o = nn.RNN(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.relu(self.f(self.r(x.transpose(0, 1))[0]))).mean(0)


class Flat(nn.Module):
    """[B, T, C], in the middle as [B T, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.o = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.relu(self.f(x.flatten(0, 1)))).view(len(x), -1, 3).mean(1)


class Tokens(Flat):
    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.dropout(torch.relu(self.f(x)), 0.5, self.training)).mean(1)


def per_example(gates: Gates, x: Tensor, batch_size: int | None = None) -> Tensor:
    y = torch.arange(len(x)) % 3
    return gates.backward(lambda: cross_entropy(gates(x), y, reduction="none"), batch_size or len(x))


@pytest.mark.parametrize(
    ("functional", "words"), [(False, "'norm' averages over the batch"), (True, "Normed the first")]
)
def test_a_batch_norm_over_gated_examples_is_refused(functional, words):
    """In training mode, whenever that begins: each example's loss then hangs on all examples' gates."""
    torch.manual_seed(0)
    model, x = Normed(functional), torch.randn(5, 6)
    gates = Gates(model, [input_gates(model, "b", producer="a")], per_sample=True)
    with pytest.raises(TrainingError, match=words):
        per_example(gates, x)
    if functional:  # whose eval mode here still takes the batch's own mean
        return
    model.eval()
    per_example(gates, x)
    model.norm.train()
    with pytest.raises(TrainingError, match=words):
        per_example(gates, x)
    together = Gates(model, [output_gates(model, "c")])
    together.backward(lambda: together(x).square().mean())


def test_hard_concrete_gates_may_be_mixed():
    """Their gradient goes through the batch norm: it is that of the mean loss of all examples."""
    torch.manual_seed(0)
    model, x, y = Normed(False).double(), torch.randn(5, 6).double(), torch.arange(5) % 3
    bare, options = copy.deepcopy(model), {"estimator": "hc", "per_sample": True, "seed": 1}
    gates = Gates(model, [input_gates(model, "b", producer="a")], **options).double()
    same = Gates(bare, [input_gates(bare, "b", producer="a")], **options).double()
    per_example(gates, x)
    same.remove()
    z = same.concrete.sample(same.phi, same._noise(5).double())
    cross_entropy(bare.c(torch.tanh(bare.norm(bare.b(torch.relu(bare.a(x)) * z)))), y).backward()
    torch.testing.assert_close(gates.phi.grad, same.phi.grad)
    for p, q in zip(model.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize(
    ("make", "shape", "words"),
    [
        (Recurrent, (5, 7, 6), r"the input of 'o' is \[7, 5, 8\], without 5 in front"),
        (Recurrent, (6, 6, 6), "first example's output changes with other examples' gates"),
        (Flat, (4, 5, 6), r"the input of 'o' is \[20, 8\], without 4 in front"),
    ],
)
def test_the_batch_is_in_front(make, shape, words):
    torch.manual_seed(0)
    model = make()
    gates = Gates(model, [input_gates(model, "o", producer="f")], per_sample=True)
    with pytest.raises(TrainingError, match=words):
        per_example(gates, torch.randn(shape))


def test_a_wrong_batch_size():
    model = Tokens()
    gates = Gates(model, [output_gates(model, "f", consumers=["o"])], per_sample=True)
    with pytest.raises(TrainingError, match=r"the output of 'f' is \[4, 5, 8\], without 3 in front: give backward"):
        per_example(gates, torch.randn(4, 5, 6), 3)


def test_an_image_without_batch():
    """[C, H, W] with as many channels as gates are drawn for."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3))
    x = torch.randn(2, 6, 6)
    alone, gates = copy.deepcopy(model), Gates(model, [input_gates(model, "2", producer="0")], per_sample=True, seed=1)
    value = gates.expected().detach().view(4, 1, 1)
    torch.testing.assert_close(gates(x), alone[2](alone[1](alone[0](x)) * value))
    with pytest.raises(TrainingError, match="the batch first"):
        gates.backward(lambda: gates(x).sum((1, 2)), 2)


@pytest.mark.parametrize("training", [False, True])
def test_tokens_of_each_example_have_its_gates(training):
    """[B, T, C] with B = T, and what is tried out leaves random numbers as they are."""
    torch.manual_seed(0)
    model, x = Tokens().train(training), torch.randn(5, 5, 6)
    gates, bare, seen = Gates(model, [input_gates(model, "o", producer="f")], per_sample=True), copy.deepcopy(model), []
    for hooks in (bare.o._forward_pre_hooks, bare.o._forward_pre_hooks_with_kwargs):
        hooks.clear()
    gates(x)

    def loss() -> Tensor:
        z = gates._z
        assert z is not None
        state = torch.random.get_rng_state()
        found = gates(x).sum(1)
        torch.random.set_rng_state(state)
        h = F.dropout(torch.relu(bare.f(x)), 0.5, training)
        seen.append((found.detach(), bare.o(h * z.unsqueeze(1)).mean(1).sum(1).detach()))
        return found

    gates.backward(loss, 5)
    for found, wanted in seen:
        torch.testing.assert_close(found, wanted)
    assert len(seen) == 2
