"""What gates keep between calls, and what of the model they rest on: parameters, buffers, inference mode."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from espalier import search_space
from espalier.errors import TrainingError
from espalier.sparsify import SpaceGates
from espalier.sparsify.passes import frozen_statistics

x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
y = torch.arange(12) % 3


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def gates_of(model: nn.Module, **options) -> SpaceGates:
    return SpaceGates(search_space(model, x, levels=("channel",)), seed=1, **options)


@pytest.mark.parametrize("estimator", ["arm", "hc"])
def test_validation_in_inference_mode_changes_nothing(estimator):
    found = []
    for inference in (True, False):
        model = perceptron()
        gates = gates_of(model, estimator=estimator)
        with torch.inference_mode(inference):
            first = gates(x).clone()
        gates(x).sum().backward()
        with torch.inference_mode(inference):
            gates(x)
        gates.backward(lambda g=gates: F.cross_entropy(g(x), y))
        grads = [p.grad.clone() for p in (*model.parameters(), gates.phi)]
        with torch.no_grad():
            gates.phi[::3] = -2.0
        with torch.inference_mode(inference):
            gates(x)
        solution = gates.solution()
        network = gates.finish()
        network(x).sum().backward()
        found.append([first, network(x), *grads, solution.removed])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize(
    "compute",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "prune"],
)
def test_single_weights_of_a_layer_that_computes_its_weight(compute):
    model = perceptron()
    compute(model[2])
    space = search_space(model, x)
    with pytest.raises(TrainingError, match=r"'2' computes its weight .* weights=\[\.\.\.\]"):
        SpaceGates(space, levels=("weight",))
    gates = SpaceGates(space, weights=["0.weight"])
    assert gates.counts == (96,)
    assert gates(x).shape == (12, 3)


class OwnForward(nn.BatchNorm1d):
    """Updates its statistics as it likes."""

    def forward(self, input: Tensor) -> Tensor:
        mean, var = (input.mean(0), input.var(0)) if self.training else (self.running_mean, self.running_var)
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.1)
                self.running_var = self.running_var.lerp(var, 0.1)
                self.num_batches_tracked.add_(1)
        return (input - mean) / (var + self.eps).sqrt() * self.weight + self.bias


def count(module: nn.Module, _: object) -> None:
    module.get_buffer("calls").add_(1)


class Counting(nn.BatchNorm1d):
    """torch's forward, and a buffer more."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("calls", torch.zeros(()))
        self.register_forward_pre_hook(count)


NORMS = [nn.BatchNorm1d, nn.SyncBatchNorm, OwnForward, Counting]


@pytest.mark.parametrize("norm", NORMS)
def test_frozen_statistics_leave_every_buffer_as_it_was(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8) if norm is nn.SyncBatchNorm else norm(8)).train()
    before, buffers = copy.deepcopy(model.state_dict()), dict(model.named_buffers())
    with frozen_statistics(model):
        inside = model(x)
    assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())
    assert all(buffers[name] is b for name, b in model.named_buffers())
    assert torch.equal(model(x), inside)
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])


@pytest.mark.parametrize("estimator", ["hc", "ar", "arm", "disarm"])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, OwnForward, Counting])
def test_running_statistics_are_updated_once(norm, estimator):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), norm(8), nn.Linear(8, 3))
    gates = SpaceGates(search_space(model, x, levels=("channel",)), families=["0"], estimator=estimator, seed=1)
    before = copy.deepcopy(dict(model.named_buffers()))
    gates.backward(lambda: F.cross_entropy(gates(x), y))
    for name in {"3.num_batches_tracked", "3.calls"} & set(before):
        assert model.get_buffer(name).item() == before[name].item() + 1


def test_parameters_that_are_replaced_are_refused():
    """Gates would go on training tensors that the model no longer reads."""
    for replace in (
        lambda model: model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True),
        lambda model: setattr(model[2], "weight", nn.Parameter(torch.randn(8, 16))),
        lambda model: model.__setitem__(2, nn.Linear(16, 8)),
        lambda model: prune.l1_unstructured(model[2], "weight", 0.5),
    ):
        model = perceptron()
        gates = gates_of(model)
        gates(x)
        replace(model)
        for call in (
            lambda g=gates: g(x),
            lambda g=gates: g.backward(lambda: F.cross_entropy(g(x), y)),
            gates.finish,
        ):
            with pytest.raises(TrainingError, match=r"'[02].*' of the model is not the .* assign=True"):
                call()


def test_parameters_that_are_written_are_still_the_models():
    """Loading, moving and casting write into the same parameters."""
    model = perceptron()
    gates = gates_of(model)
    before = gates(x)
    model.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()})
    assert not gates(x).any()
    assert before.any()
    model.double()
    gates.double()
    assert gates(x.double()).dtype == torch.float64
    gates.finish()
