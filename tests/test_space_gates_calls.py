"""How a gated network is called: arguments by name, examples one by one, what is left out, and what comes after."""

import copy
import warnings

import pytest
import torch
from networks import TwoBranches
from torch import Tensor, nn
from torch.nn import functional as F

from espalier import construct, search_space
from espalier.errors import InvalidSolution, TrainingError
from espalier.sparsify import SpaceGates
from espalier.sparsify.over_open import over_what_stays


class Tokens(nn.Module):
    """Two branches over embedded tokens, a layer norm, and arguments with and without defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(9, 8), nn.LayerNorm(8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor, parts: dict | None = None, scale: float = 2.0) -> Tensor:
        x = self.embed(ids)
        x = (self.a(x) + self.b(x)) * mask.unsqueeze(-1)
        if parts is not None:
            x = x + parts["one"].unsqueeze(-1) - parts["two"].unsqueeze(-1)
        x = self.drop(self.norm(x)).view(ids.shape[0], -1, 8).sum(1)
        return scale * self.head(x)


class Decides(nn.Module):
    """Code that looks at the values of its input, which vmap refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() and bool(x.isnan().any()):
            raise ValueError("not a number")
        return self.down(self.drop(torch.tanh(self.up(x))))


def tokens(levels: tuple[str, ...], parts: bool = False, **options):
    torch.manual_seed(0)
    model = Tokens().double().eval()
    ids, mask = torch.randint(9, (5, 4)), torch.rand(5, 4, dtype=torch.float64)
    kwargs: dict = {"ids": ids, "mask": mask}
    if parts:
        kwargs["parts"] = {"one": torch.rand(5, 4).double(), "two": torch.rand(5, 4).double()}
    space = search_space(model, (), {k: kwargs[k] for k in kwargs}, levels=levels)
    return model, space, SpaceGates(space, initial=0.9, **options).double(), kwargs


ON_A_TRACE = pytest.mark.parametrize(
    ("levels", "conditional"), [(("segment",), True), (("channel",), False)], ids=["skipping", "norm"]
)


@ON_A_TRACE
def test_arguments_go_by_name(levels, conditional):
    model, _, gates, kwargs = tokens(levels, conditional=conditional)
    ids, mask = kwargs["ids"], kwargs["mask"]
    wanted = gates(ids=ids, mask=mask)
    assert torch.equal(gates(mask=mask, ids=ids), wanted)
    assert torch.equal(gates(ids, mask), wanted)
    assert torch.equal(gates(ids, mask=mask, scale=2.0, parts=None), wanted)
    torch.testing.assert_close(gates(ids[:1], mask[:1]), wanted[:1])
    gates._z = torch.ones(len(gates.phi), dtype=torch.float64)
    torch.testing.assert_close(gates(mask=mask, ids=ids), model(ids, mask))


@ON_A_TRACE
def test_nested_arguments_go_by_name(levels, conditional):
    model, _, gates, kwargs = tokens(levels, parts=True, conditional=conditional)
    gates._z = torch.ones(len(gates.phi), dtype=torch.float64)
    turned = dict(reversed(kwargs["parts"].items()))
    torch.testing.assert_close(gates(parts=turned, mask=kwargs["mask"], ids=kwargs["ids"]), model(**kwargs))


@ON_A_TRACE
def test_other_arguments_are_refused(levels, conditional):
    _, _, gates, kwargs = tokens(levels, conditional=conditional)
    ids, mask = kwargs["ids"], kwargs["mask"]
    with pytest.raises(
        TrainingError, match=r"arguments do not fit Tokens\.forward.*unexpected keyword argument 'labels'"
    ):
        gates(ids, mask, labels=ids)
    with pytest.raises(TrainingError, match="missing a required argument: 'mask'"):
        gates(ids)
    with pytest.raises(TrainingError, match="argument 'scale' is none that the search space was made with"):
        gates(ids, mask, scale=3.0)
    with pytest.raises(TrainingError, match="argument 'parts' is none that"):
        gates(ids, mask, {"one": mask, "two": mask})
    with pytest.raises(TrainingError, match=r"argument 'mask' has shape \(5, 3\), and the trace takes \(any, 4\)"):
        gates(ids, mask[:, :3])
    with pytest.raises(TrainingError, match="argument 'mask' is of type float, and a tensor in the search space"):
        gates(ids, 1.0)
    reason = "conditional=True runs the network as traced" if conditional else "'norm' averages over channels"
    with pytest.raises(TrainingError, match=f"{reason}.*make the search space with the arguments of this call"):
        gates(ids[:, :2], mask)


@ON_A_TRACE
def test_arguments_made_up_otherwise_are_refused(levels, conditional):
    _, _, gates, kwargs = tokens(levels, parts=True, conditional=conditional)
    ids, mask, parts = kwargs.values()
    with pytest.raises(TrainingError, match="argument 'parts' is made up otherwise"):
        gates(ids, mask, {"one": mask})
    with pytest.raises(TrainingError, match="argument 'parts' is missing, which the search space was made with"):
        gates(ids, mask)
    with pytest.raises(TrainingError, match="argument 'parts' is made up otherwise"):
        gates(ids, mask, list(parts.values()))


def test_what_is_no_tensor_is_fixed():
    torch.manual_seed(0)
    model, x = Tokens().eval(), torch.randint(9, (5, 4))
    space = search_space(model, (x, torch.ones(5, 4)), {"scale": 3.0}, levels=("channel",))
    gates = SpaceGates(space)
    gates(scale=3.0, mask=torch.ones(5, 4), ids=x)
    with pytest.raises(TrainingError, match=r"argument 'scale' is 2\.0, and the trace has fixed it at 3\.0"):
        gates(x, torch.ones(5, 4), scale=2.0)
    with pytest.raises(TrainingError, match="argument 'scale' is missing"):
        gates(x, torch.ones(5, 4))


class Counts(nn.Module):
    """Code that depends on the batch's size: the trace has fixed it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, *xs: Tensor) -> Tensor:
        x = xs[0] * 2 if xs[0].shape[0] == 3 else xs[0]
        return self.head(self.norm(self.a(x - xs[1])))


def test_a_batch_that_the_trace_has_fixed_is_the_only_one():
    torch.manual_seed(0)
    model, x = Counts(), torch.randn(3, 4)
    gates = SpaceGates(search_space(model, (x, x), levels=("channel",)))
    gates._z = torch.ones(6)
    torch.testing.assert_close(gates(x, x), model(x, x))
    with pytest.raises(TrainingError, match=r"argument '\*xs\[0\]' has shape \(2, 4\).*all their sizes are those"):
        gates(x[:2], x[:2])
    with pytest.raises(TrainingError, match=r"argument '\*xs\[1\]' is missing"):
        gates(x)


def test_a_model_that_runs_itself_takes_all_its_arguments():
    """No trace is needed for segments that are not skipped: other lengths and options go through."""
    model, _, gates, kwargs = tokens(("segment",))
    gates._z = torch.ones(len(gates.phi), dtype=torch.float64)
    ids, mask = kwargs["ids"][:, :2], kwargs["mask"][:, :2]
    torch.testing.assert_close(gates(ids, mask, scale=3.0), model(ids, mask, scale=3.0))


# Values after training.


@pytest.mark.parametrize("write", ["data", "fused"])
def test_gates_written_past_their_version_are_read_again(write):
    """The gates that must stay open follow φ, also where a write leaves no trace in its version counter."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(8, 6)
    gates = SpaceGates(search_space(model, x, levels=("channel",)), initial=0.9)
    gates(x)
    closed = -torch.tensor([0.4, 0.1, 0.3, 0.2])
    before = gates.phi._version
    if write == "data":
        gates.phi.data.copy_(closed)
    else:
        optimizer = torch.optim.SGD([gates.phi], lr=1.0, fused=True)
        gates.phi.grad = gates.phi.detach() - closed
        optimizer.step()
    assert gates.phi._version == before
    assert (gates.expected() > 0).tolist() == [False, True, False, False]
    gates.phi.data.copy_(closed.flip(0))
    assert (gates.expected() > 0).tolist() == [False, False, True, False]
    assert len(gates.solution().removed) == 3


# Every example with gates of its own.


def test_per_sample_where_the_batch_is_read_from_a_shape():
    """A traced network with norms over gated channels asks for the batch's size; vmap runs it all the same."""
    model, _, gates, kwargs = tokens(("segment", "channel"), per_sample=True)
    z = (torch.rand(5, len(gates.phi)) > 0.3).double()
    gates._z = z
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        together = gates(**kwargs)
    for i in range(5):
        gates._z = z[i]
        torch.testing.assert_close(gates(**{k: v[i : i + 1] for k, v in kwargs.items()})[0], together[i])
    gates._z = None
    model.train()
    loss = gates.backward(lambda: F.cross_entropy(gates(**kwargs), kwargs["ids"][:, 0] % 3, reduction="none"), 5)
    assert torch.isfinite(loss)
    assert gates.phi.grad is not None


def decides(**options):
    torch.manual_seed(0)
    model, x = Decides().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    return model, x, SpaceGates(search_space(model, x, levels=("channel",)), per_sample=True, **options).double()


def test_examples_in_turn_where_vmap_cannot():
    model, x, gates = decides()
    gates._z = z = (torch.rand(3, 6) > 0.4).double()
    with pytest.warns(UserWarning, match="vmap cannot run Decides .* a step costs about as many passes as the batch"):
        found = gates(x)
    weights = model.down.weight
    torch.testing.assert_close(found, (torch.tanh(model.up(x)) * z) @ weights.T + model.down.bias)
    found.square().sum().backward()
    hidden = torch.tanh(model.up(x)) * z
    by_hand = torch.autograd.grad((hidden @ weights.T + model.down.bias).square().sum(), [model.up.weight, weights])
    torch.testing.assert_close(model.up.weight.grad, by_hand[0])
    torch.testing.assert_close(weights.grad, by_hand[1])


def test_the_trial_of_vmap_leaves_both_passes_their_noise():
    """With all gates open, two passes differ by dropout alone: where the noise is shared, ARM's estimate is 0."""
    model, x, gates = decides(initial=0.5)
    with torch.no_grad():
        gates.phi.fill_(60.0)
    model.train()
    with pytest.warns(UserWarning, match="vmap cannot run"):
        gates.backward(lambda: gates(x).square().sum(1), 3)
    assert gates.phi.grad is not None
    assert not gates.phi.grad.any()


def test_errors_of_per_sample():
    _, x, gates = decides()
    with pytest.raises(TrainingError, match=r"draws gates for 4 examples, but an input has shape \(3, 4\)"):
        gates.backward(lambda: gates(x).sum(1), 4)
    with pytest.raises(ValueError, match="not a number"):
        gates.backward(lambda: gates(x * torch.nan).sum(1), 3)


# Conditional computation.


def test_conditional_says_what_it_does_not_leave_out():
    perceptron = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    space = search_space(perceptron, torch.randn(3, 4), levels=("channel",))
    with pytest.warns(UserWarning, match=r"multiplies by 0 and saves nothing: '0' \(channel\)"):
        SpaceGates(space, conditional=True)
    with pytest.warns(UserWarning, match=r"'0\.weight', '2\.weight' \(weight\)"):
        SpaceGates(space, levels=("weight",), conditional=True)
    with pytest.warns(UserWarning, match=r"'a', 'b' \(segment: 'norm' averages over gated channels"):
        tokens(("segment", "channel"), conditional=True)
    with pytest.warns(UserWarning, match=r"'a', 'b' \(segment: with per_sample=True"):
        SpaceGates(search_space(TwoBranches(), torch.randn(3, 4)), conditional=True, per_sample=True)


def test_segments_are_left_out_beside_channels_without_gates():
    """A norm over channels that the space knows, but that have no gates, is no reason to compute everything."""
    found = []
    for conditional in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, space, _, kwargs = tokens(("segment", "channel"))
            gates = SpaceGates(space, levels=("segment",), conditional=conditional, lam=0.1).double()
        assert (gates._skipping is not None) == conditional
        calls = []
        hooks = [layer.register_forward_hook(lambda *_, c=calls: c.append(1)) for layer in (model.a, model.b)]
        with torch.no_grad():
            gates.phi.copy_(torch.tensor([1.0, -9.0]))
        loss = gates.backward(lambda g=gates, k=kwargs: g(**k).square().mean())
        assert len(calls) == (2 if conditional else 4)
        for hook in hooks:
            hook.remove()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in (gates.phi, *model.parameters())]
        found.append([loss, *grads, gates(**kwargs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# After training.


def test_finish_again_and_calls_after_it():
    model, space, gates, kwargs = tokens(("channel",))
    with torch.no_grad():
        gates.phi.copy_(torch.linspace(-1.0, 1.0, len(gates.phi)).view(2, 8).T.flatten())
    gated, solution = gates(**kwargs), gates.solution()
    finished = gates.finish()
    assert finished is not model  # its norm counts the zeros
    assert (model(**kwargs) - gated).abs().max() > 1e-3
    state = {k: v.clone() for k, v in model.state_dict().items()}
    torch.testing.assert_close(finished(**kwargs), gated)
    torch.testing.assert_close(gates(**kwargs), gated)
    assert gates.finish() is finished
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    torch.testing.assert_close(construct(space, solution)(**kwargs), gated)
    torch.testing.assert_close(copy.deepcopy(finished)(**kwargs), gated)
    assert {id(p) for p in finished.parameters()} == {id(p) for p in model.parameters()}
    with pytest.raises(TrainingError, match="argument 'scale' is none that"):
        finished(**kwargs, scale=3.0)
    with pytest.raises(TrainingError, match="these gates are folded into the model"):
        gates.backward(lambda: gates(**kwargs).sum())


@pytest.mark.parametrize("training", [False, True])
def test_over_what_stays(training):
    """Of a model with zeros, whatever put them there."""
    model, space, _, kwargs = tokens(("channel", "segment"))
    nn.init.zeros_(model.norm.bias)
    model.drop.p = 0.0
    names = list(space.structures.names)
    for seed in range(6):
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
        solution = space.solution(space.removable_in_order([names[i] for i in order], stop_at=4))
        full = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(space.zero_parameters(solution).state_dict())
        network = over_what_stays(space, solution).train(training)
        torch.testing.assert_close(network(**kwargs), space.masked(solution).train(training)(**kwargs))
        torch.testing.assert_close(network(**kwargs), construct(space, solution).train(training)(**kwargs))
        model.load_state_dict(full)
    assert over_what_stays(space, space.solution(())) is model
    assert over_what_stays(space, space.solution(["a"])) is model
    other = search_space(TwoBranches(), torch.randn(3, 4))
    with pytest.raises(InvalidSolution, match="belongs to another model"):
        over_what_stays(space, other.solution(["a"]))


def test_gates_cannot_be_copied_deeply_but_made_again():
    model, space, gates, kwargs = tokens(("channel",))
    with torch.no_grad():
        gates.phi.copy_(torch.linspace(-1.0, 1.0, len(gates.phi)))
    with pytest.raises(TrainingError, match=r"SpaceGates\(space\.of\(the copy\), \.\.\.\)"):
        copy.deepcopy(gates)
    twin = SpaceGates(space.of(copy.deepcopy(model)), initial=0.9).double()
    twin.load_state_dict(gates.state_dict())
    assert torch.equal(twin(**kwargs), gates(**kwargs))


def test_frozen_weights_are_named():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).requires_grad_(False), torch.randn(3, 4)
    space = search_space(model, x, levels=("channel",))
    with pytest.raises(TrainingError, match=r"all 2 linear and convolutional weights \('0\.weight' first\) are frozen"):
        SpaceGates(space, levels=("weight",))
