"""The trace equals the model bit for bit, in eval and in train mode, whatever the model is made of."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from espalier.graph.trace import Trace, trace


def outputs_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Outputs, and the buffers after the call; the buffers are then put back."""
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    module.train(training)
    torch.manual_seed(0)
    with torch.no_grad():
        leaves = pytree.tree_leaves(module(*args, **kwargs))
    after = {name: b.clone() for name, b in module.named_buffers()}
    for name, b in module.named_buffers():
        b.copy_(buffers[name])
    return leaves, after


def check(traced: Trace, *args: Any, **kwargs: Any) -> None:
    """Outputs and buffers are the same in both modes, on the example inputs or on others."""
    if not args and not kwargs:
        args, kwargs = traced.args, traced.kwargs
    assert not traced.notes
    for training in (False, True):
        expected, buffers = outputs_of(traced.model, args, kwargs, training)
        got, left = outputs_of(traced.graph_module, args, kwargs, training)
        for a, b in zip(expected, got, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        assert all(torch.equal(buffers[name], left[name]) for name in buffers.keys() & left.keys())


def called(traced: Trace) -> list[str]:
    return [str(n.target) for n in traced.graph.nodes if n.op == "call_module"]


class Net(nn.Module):
    """A few layers, and a forward given by the test."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module):
        super().__init__()
        self.body = forward
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


class Named(Net):
    def forward(self, x: Any, y: Any = None, scale: float = 1.0) -> Any:
        return self.body(self, x, y, scale)


# Inputs and outputs


def test_several_inputs_positional_and_keyword():
    net = Named(lambda m, x, y, s: m.a(x) * s + m.b(y))
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    check(trace(net, (x, y)))
    check(trace(net, (x,), {"y": y}))
    check(trace(net, (), {"x": x, "y": y, "scale": 2.0}))


def test_tensors_inside_tuples_lists_and_dicts():
    net = Named(lambda m, x, y, s: m.a(x["one"][0]) + m.b(y[1]) + y[0])
    x = {"one": (torch.randn(3, 4), torch.randn(3, 4)), "two": torch.randn(3)}
    check(trace(net, (x, [torch.randn(3, 4), torch.randn(3, 4)])))


def test_several_outputs_keep_their_structure():
    net = Net(lambda m, x: {"sum": m.a(x) + x, "pair": (m.b(x), [x.mean()]), "flag": None})
    traced = trace(net, torch.randn(3, 4))
    check(traced)
    out = traced.graph_module(torch.randn(3, 4))
    assert set(out) == {"sum", "pair", "flag"}
    assert isinstance(out["pair"], tuple)


def test_an_input_that_is_returned_or_not_used():
    check(trace(Named(lambda m, x, y, s: (x, m.a(x))), (torch.randn(3, 4), torch.randn(3, 4))))


@pytest.mark.parametrize("example", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_batches_other_than_the_example(example: int, batch: int):
    net = Net(lambda m, x: m.a(x).reshape(x.shape[0], 2, 2).flatten(1) + m.b(x), bn=nn.BatchNorm1d(4))
    traced = trace(net, torch.randn(example, 4))
    check(traced, torch.randn(batch, 4))


def test_a_batch_that_the_model_fixes_is_noted():
    net = Net(lambda m, x: m.a(x.reshape(3, 4)))
    traced = trace(net, torch.randn(3, 4))
    assert traced.graph_module(torch.randn(3, 4)).shape == (3, 4)
    assert any("(batch) is fixed" in note for note in traced.notes)


# Modules


def test_a_module_called_more_than_once():
    net = Net(lambda m, x: m.a(F.relu(m.a(x))) + m.b(m.a(x)))
    traced = trace(net, torch.randn(3, 4))
    check(traced)
    assert called(traced).count("a") == 3


def test_shared_modules_and_parameters():
    shared = nn.Linear(4, 4)
    net = Net(lambda m, x: m.c(x) + m.d(x) + m.a(x) + F.linear(x, m.b.weight), c=shared, d=shared)
    net.b.weight = net.a.weight
    traced = trace(net, torch.randn(3, 4))
    check(traced)
    own = {id(p) for p in net.parameters()}
    assert {id(p) for p in traced.graph_module.parameters()} <= own


def test_an_embedding_tied_to_the_output():
    net = Net(lambda m, x: m.out(F.linear(m.emb(x), m.emb.weight.t() @ m.emb.weight)))
    net.emb, net.out = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    net.out.weight = net.emb.weight
    traced = trace(net, torch.randint(0, 9, (3, 5)))
    check(traced)
    assert called(traced) == ["emb", "out"]


def test_multihead_attention_is_one_call():
    def forward(m: Any, x: torch.Tensor) -> Any:
        y, weights = m.attn(x, x, x, need_weights=True)
        z, _ = m.attn(y, x, x, need_weights=False)
        return z, weights

    net = Net(forward, attn=nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True))
    traced = trace(net, torch.randn(3, 5, 4))
    check(traced)
    assert called(traced) == ["attn", "attn"]
    check(traced, torch.randn(2, 5, 4))


def test_the_first_of_several_attentions_is_one_call_too():
    """Later layers reuse sizes that the first has computed; they are no outputs of it."""
    layers = [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True) for _ in range(3)]
    traced = trace(nn.Sequential(*layers), torch.randn(3, 5, 8))
    torch.backends.mha.set_fastpath_enabled(False)  # whole layers in one kernel, with other rounding
    try:
        check(traced)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert [name for name in called(traced) if name.endswith("self_attn")] == [f"{i}.self_attn" for i in range(3)]


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(cls: type[nn.RNNBase]):
    net = Net(lambda m, x: m.rnn(m.a(x))[0], rnn=cls(4, 3, num_layers=2, batch_first=True))
    traced = trace(net, torch.randn(3, 5, 4))
    check(traced)
    assert called(traced) == ["a", "rnn"]


def test_recurrent_layer_whose_state_is_read():
    def forward(m: Any, x: torch.Tensor) -> Any:
        y, (h, c) = m.rnn(x)
        return m.b(y), h, c * 2

    traced = trace(Net(forward, rnn=nn.LSTM(4, 4, batch_first=True)), torch.randn(3, 5, 4))
    check(traced)
    assert "rnn" in called(traced)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Linear(4, 4), torch.randn(3, 4)),
        (nn.LSTM(4, 4, batch_first=True), torch.randn(3, 5, 4)),
        (nn.ConvTranspose2d(3, 2, 3, stride=2), torch.randn(2, 3, 5, 5)),
        (nn.LayerNorm(4), torch.randn(3, 4)),
    ],
    ids=["linear", "lstm", "conv_transpose", "layer_norm"],
)
def test_a_model_that_is_itself_a_layer(model: nn.Module, x: torch.Tensor):
    check(trace(model, x))


def test_transposed_convolution_with_an_output_size():
    net = nn.ConvTranspose2d(3, 2, 3, stride=2)
    traced = trace(Net(lambda m, x: m.up(x, output_size=(12, 12)), up=net), torch.randn(2, 3, 5, 5))
    check(traced)


# Train and eval mode


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: F.dropout(m.a(x), 0.3, m.training) + m.b(x),
        lambda m, x: F.dropout(m.a(x), 0.3 if m.training else 0.0) + m.b(x),
        lambda m, x: F.alpha_dropout(m.a(x), 0.3, m.training),
        lambda m, x: F.scaled_dot_product_attention(
            m.a(x)[:, None], m.b(x)[:, None], x[:, None], dropout_p=0.2 * m.training
        ),
        lambda m, x: F.batch_norm(m.a(x), m.bn.running_mean, m.bn.running_var, training=m.training),
    ],
    ids=["dropout", "probability", "alpha", "attention", "batch_norm"],
)
def test_functional_operators_follow_the_mode(body: Callable[..., Any]):
    traced = trace(Net(body, bn=nn.BatchNorm1d(4)), torch.randn(3, 4))
    check(traced)


class DropPath(nn.Module):
    """Drops whole examples in train mode; vanishes in eval mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        return x * torch.empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(0.5) / 0.5


def test_stochastic_depth_is_lifted_whole():
    traced = trace(Net(lambda m, x: x + m.path(m.a(x)) + m.path(m.b(x)), path=DropPath()), torch.randn(4, 4))
    check(traced)
    assert called(traced).count("path") == 2


def test_a_network_with_other_outputs_in_train_mode_is_noted():
    traced = trace(Net(lambda m, x: (m.a(x), m.b(x)) if m.training else m.a(x)), torch.randn(3, 4))
    assert any("2 tensors in train mode" in note for note in traced.notes)


def test_attention_of_another_memory_layout_in_train_mode():
    """The attention kernel with dropout returns another layout, so one mode alone needs ``contiguous``."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.view(*x.shape[:2], 2, 2).transpose(1, 2) for t in (m.a(x), m.b(x), x))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if m.training else 0.0)
        return m.a(y.transpose(1, 2).contiguous().view(*x.shape[:2], 4))

    check(trace(Net(forward), torch.randn(3, 5, 4)))


def test_a_layer_whose_weight_is_computed_in_train_mode():
    """Spectral norm iterates on its buffers in train mode only: the layer is lifted whole."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    traced = trace(Net(lambda m, x: m.c(x) + m.a(x), c=layer), torch.randn(3, 4))
    check(traced)
    assert called(traced) == ["c", "a"]


def test_regions_without_gradients_or_in_lower_precision():
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = m.a(x).sigmoid()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = m.b(x)
        return y * x + z.float()

    check(trace(Net(forward), torch.randn(3, 4)))


def test_the_model_is_left_as_it_was():
    net = Net(lambda m, x: m.drop(m.bn(m.a(x))), bn=nn.BatchNorm1d(4), drop=nn.Dropout())
    net.train()
    net.bn.eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    modes = {name: m.training for name, m in net.named_modules()}
    traced = trace(net, torch.randn(3, 4))
    assert {name: m.training for name, m in net.named_modules()} == modes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert traced.graph_module.training
    assert not trace(net.eval(), torch.randn(3, 4)).graph_module.training


# Parameters, buffers, constants


def test_parameters_keep_their_names_and_are_the_models_own():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    traced = trace(net, torch.randn(2, 3, 4, 4))
    assert dict(traced.graph_module.named_parameters()).keys() == dict(net.named_parameters()).keys()
    assert all(p is dict(net.named_parameters())[n] for n, p in traced.graph_module.named_parameters())
    assert traced.graph_module.state_dict().keys() == net.state_dict().keys()


def test_the_trace_trains_the_model():
    net = Net(lambda m, x: m.a(x) * m.b(x))
    traced = trace(net, torch.randn(3, 4))
    x = torch.randn(3, 4)
    net(x).sum().backward()
    expected = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    traced.graph_module(x).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), expected, strict=True))


def test_buffers_constants_and_own_parameters():
    table = torch.arange(4.0)

    class WithBuffers(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.register_buffer("kept", torch.randn(4))
            self.register_buffer("not_kept", torch.randn(4), persistent=False)
            self.plain = torch.randn(4)
            self.a = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x) * self.scale + self.kept + self.not_kept + self.plain + table
            return y + torch.tensor([1.0, 2.0, 3.0, 4.0])

    net = WithBuffers()
    traced = trace(net, torch.randn(3, 4))
    check(traced)
    assert set(net.state_dict()) == {"scale", "kept", "a.weight", "a.bias"}, "the model got no buffers"


def test_a_counter_that_the_model_updates_itself():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
            return self.a(x) - self.mean

    check(trace(Counting(), torch.randn(3, 4)))


# Operators in place


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.relu(y := m.a(x)) + y,
        lambda m, x: (y := m.a(x)).add_(m.b(x)) * y,
        lambda m, x: [y := m.a(x), y[:, :2].mul_(2.0), y + 1][2],
        lambda m, x: [y := m.a(x), y.view(-1, 2, 2)[:, 0].zero_(), y][2],
        lambda m, x: [y := m.a(x), v := y.t(), v.add_(1.0), y * v.t()][3],
        lambda m, x: [y := m.a(x), v := y[:, 1:3], y.mul_(3.0), v + 1][3],
        lambda m, x: [y := m.a(x).clone(), y.__setitem__((slice(None), 0), m.b(x)[:, 0]), y][2],
        lambda m, x: F.relu_(m.a(x)).sigmoid_(),
        lambda m, x: m.a(x).masked_fill_(x > 0, 0.0),
    ],
    ids=[
        "relu_read_later",
        "add",
        "slice",
        "view_select",
        "transpose",
        "old_view",
        "setitem",
        "functional",
        "masked",
    ],
)
def test_in_place_operators(body: Callable[..., Any]):
    check(trace(Net(body, relu=nn.ReLU(inplace=True)), torch.randn(3, 4)))


def test_what_nothing_reads_is_dropped_in_both_modes():
    traced = trace(Net(lambda m, x: [x.mean(1), F.dropout(m.a(x), 0.5, m.training)][1]), torch.randn(3, 4))
    check(traced)
    assert not any(n.target is torch.ops.aten.mean.dim for n in traced.graph.nodes)
