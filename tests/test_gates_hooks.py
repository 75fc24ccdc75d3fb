"""Whose hooks sit on a model: one gate per feature, taken off without a trace, and with layers called by keyword."""

import copy
import gc
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from espalier import search_space
from espalier.errors import TrainingError
from espalier.sparsify import Gates, SpaceGates, input_gates, output_gates, sliced

X, Y = torch.randn(12, 6), torch.arange(12) % 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).eval()


def on(model: nn.Module, **options) -> Gates:
    return Gates(model, [input_gates(model, "3", producer="0")], initial=0.6, seed=0, **options)


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_gates_take_the_place_of_others():
    """A cell of a notebook run twice."""
    model = network()
    first = on(model)
    wanted = first(X)
    with pytest.warns(UserWarning, match="the input of '3' has gates already"):
        second = on(model)
    assert torch.equal(second(X), wanted)
    off = pytest.raises(
        TrainingError, match=r"the gates on '3' are off \(remove\(\), or other gates took their place\)"
    )
    for use in (
        lambda: first(X),
        first.folded,
        first.finish,
        lambda: sliced(first),
        lambda: first.backward(lambda: model(X).square().mean()),
    ):
        with off:
            use()
    assert torch.allclose(second.finish()(X), wanted, atol=1e-6)
    assert hook_count(model) == 0


def test_gates_that_share_one_layer_go_whole():
    model = network()
    first = Gates(model, [output_gates(model, "0"), input_gates(model, "3")])
    with pytest.warns(UserWarning, match="the input of '3'"):
        on(model)
    assert hook_count(model) == 1
    with pytest.raises(TrainingError, match="'0' are off"):
        first(X)
    Gates(model, [output_gates(model, "3")])  # another side
    assert hook_count(model) == 2


def test_gates_on_a_part_of_a_model():
    model = nn.Sequential(network(), nn.Linear(3, 3))
    inner = Gates(model[0], [input_gates(model[0], "3", producer="0")])
    with pytest.warns(UserWarning, match=r"the input of '0\.3'"):
        outer = Gates(model, [input_gates(model, "0.3", producer="0.0"), input_gates(model, "1")])
    with pytest.raises(TrainingError, match="are off"):
        inner(X)
    with pytest.warns(UserWarning, match="the input of '3'"):
        on(model[0])
    with pytest.raises(TrainingError, match="are off"):
        outer(X)
    assert hook_count(model) == 1


def test_new_gates_on_a_copy_leave_the_original_alone():
    model = network()
    first = on(model)
    wanted, copied = first(X), copy.deepcopy(model)
    assert torch.equal(copied(X), wanted)  # with the first gates
    with pytest.warns(UserWarning, match="has gates already"):
        second = on(copied)
    with torch.no_grad():
        second.phi.fill_(1.0)
    assert torch.equal(first(X), wanted)
    assert not torch.equal(second(X), wanted)
    third = copy.deepcopy(first)
    third.remove()
    assert hook_count(third.model) == 0
    assert torch.equal(first(X), wanted)


def test_gates_that_nothing_refers_to():
    """They go on as long as the model is there, and give way like others."""
    model = network()
    wanted = on(model)(X)
    gc.collect()
    assert torch.equal(model(X), wanted)
    with pytest.warns(UserWarning, match="has gates already"):
        assert torch.equal(on(model)(X), wanted)
    assert hook_count(model) == 1


@pytest.mark.parametrize("conditional", [False, True])
def test_remove_leaves_no_trace(conditional):
    model = network()
    mine = model[3].register_forward_pre_hook(lambda module, args: None)
    before, state = model(X), copy.deepcopy(model.state_dict())
    gates = on(model, conditional=conditional)
    gates(X)
    gates.remove()
    gates.remove()
    assert torch.equal(model(X), before)
    assert all(torch.equal(a, state[name]) for name, a in model.state_dict().items())
    assert hook_count(model) == 1
    mine.remove()
    assert gates.masks()
    with pytest.raises(TrainingError, match=r"are off \(remove\(\)"):
        gates(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = on(model)
        again(X)
        again.finish()
        on(model)


def test_space_gates_need_no_place():
    model = network()
    space = search_space(model, X, levels=("channel",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SpaceGates(space)
        SpaceGates(space)


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.o = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, keyword: bool = True) -> Tensor:
        h = torch.relu(self.f(x))
        return self.o(input=h) if keyword else self.o(h)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("producer", ["f", None])
def test_a_layer_called_by_keyword(producer, conditional):
    torch.manual_seed(0)
    model, found = ByKeyword(), []
    gates = Gates(model, [input_gates(model, "o", producer=producer)], conditional=conditional, initial=0.3)
    state = gates.get_extra_state()
    for keyword in (True, False):
        gates.set_extra_state(state)
        gates.zero_grad()
        model.zero_grad()
        gates.backward(lambda by=keyword: cross_entropy(gates(X, keyword=by), Y))
        found.append([gates(X, keyword=keyword), *(p.grad.clone() for p in (gates.phi, *model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with torch.no_grad():
        gates.phi[::2] = 1.0
    assert torch.allclose(sliced(gates)(X), gates(X), atol=1e-6)
    with pytest.raises(TypeError, match="input"):
        model.o()


def test_modes_go_with_the_gates():
    model = network().train()
    gates = on(model)
    assert gates.eval() is gates
    assert not model.training
    assert not model[2].training
    gates.train()
    assert model[2].training
