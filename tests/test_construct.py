"""Construct: what stands in the sub-network, in which class, and what can be done with it."""

import copy
import pickle

import pytest
import torch
from networks import Nested, OnePlus, Residual, SharedTwice, SqueezeExcite, TwoBranches, equal_in_both_modes
from torch import Tensor, fx, nn

import espalier
from espalier.models.demonet import DemoNet


def shaken(model: nn.Module) -> nn.Module:
    """Random biases, scales and running statistics, in float64."""
    torch.manual_seed(1)
    for name, p in model.double().named_parameters():
        if p.ndim == 1:
            nn.init.normal_(p, 1.0 if name.endswith("weight") else 0.0, 0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0.0, 0.3)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model


def small_of(model: nn.Module, x: Tensor, removed: list[str]) -> tuple[nn.Module, nn.Module]:
    space = espalier.search_space(model, (x,))
    solution = space.solution(removed)
    return espalier.construct(space, solution), space.masked(solution)


def test_demonet_of_figure_4() -> None:
    """Without conv2, conv3 and conv8: the concatenation, its columns and the sum are gone; the paper's sizes."""
    model = shaken(DemoNet())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    small, masked = small_of(model, x, ["conv2-bn2", "maxpool-conv3-bn3", "conv8-bn8"])
    assert equal_in_both_modes(small, masked, x)
    assert isinstance(small, fx.GraphModule)
    left = {name.partition(".")[0] for name, _ in small.named_parameters()}
    assert left == {"conv1", "bn1", "conv4", "bn4", "conv5", "bn5", "conv6", "bn6", "conv7", "bn7", "linear"}
    assert small.get_submodule("conv6").weight.shape[1] == 256
    assert sum(p.numel() for p in small.parameters()) == 449_034
    assert "cat" not in small.code
    assert "add" not in small.code
    assert round(2 * espalier.search_space(small, (x.float().double(),)).cost().macs / 1e6, 2) == 106.17


def test_nothing_removed_is_the_model_itself() -> None:
    model = shaken(DemoNet(width=0.25))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    small, _ = small_of(model, x, [])
    assert type(small) is DemoNet
    assert equal_in_both_modes(small, model, x)
    model.load_state_dict(small.state_dict())
    small.load_state_dict(model.state_dict())
    assert not {id(p) for p in small.parameters()} & {id(p) for p in model.parameters()}


def test_the_model_keeps_its_class_where_only_blocks_change() -> None:
    model = shaken(Residual())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    small, masked = small_of(model, x, ["blocks.1.conv-bn"])
    assert type(small) is Residual
    assert equal_in_both_modes(small, masked, x)
    assert set(small.state_dict()) == {k for k in model.state_dict() if not k.startswith("blocks.1.")}
    assert type(small.get_submodule("blocks.0")).__name__ == "Block"
    assert isinstance(small.get_submodule("blocks.1"), fx.GraphModule)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    ("model", "shape", "removed", "gone"),
    [
        (SqueezeExcite(), (3, 8, 8), ["fc1-fc2"], {"fc1", "fc2"}),
        (OnePlus(), (4,), ["b"], {"b"}),
        (Nested(), (4,), ["c"], {"a", "b", "c"}),
        (SharedTwice(), (4,), ["shared"], {"shared"}),
        (TwoBranches(), (4,), ["b"], {"b"}),
    ],
)
def test_constants_are_folded(model: nn.Module, shape: tuple[int, ...], removed: list[str], gone: set[str]) -> None:
    x = torch.randn(3, *shape, dtype=torch.float64)
    model = shaken(model)
    space = espalier.search_space(model, (x,))
    names = [next(s.name for s in space.structures if s.name.startswith(r.split("-")[0])) for r in removed]
    small, masked = small_of(model, x, names)
    assert equal_in_both_modes(small, masked, x)
    assert not {name.partition(".")[0] for name, _ in small.named_parameters()} & gone


def test_a_norm_after_a_concatenation_keeps_its_constants_in_both_modes() -> None:
    class Dense(nn.Module):
        def __init__(self, padding: int) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
            self.bn, self.out = nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1 + 2 * padding, padding=padding)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.bn(torch.cat([self.a(x), self.b(x)], 1)).relu())

    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    for padding, width in ((0, 4), (1, 8)):  # zero padding and a constant do not commute: the column stays
        small, masked = small_of(shaken(Dense(padding)), x, ["a"])
        assert equal_in_both_modes(small, masked, x)
        assert small.get_submodule("out").weight.shape[1] == width
        assert equal_in_both_modes(pickle.loads(pickle.dumps(small)), masked, x)


def test_in_place_activations_do_not_write_into_what_others_read() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.relu(y + self.b(y)) * 2 + y

    x = torch.randn(3, 4, dtype=torch.float64)
    small, masked = small_of(shaken(Chain()), x, ["b"])
    assert equal_in_both_modes(small, masked, x)


def test_what_can_be_done_with_it() -> None:
    model = shaken(DemoNet(width=0.25)).float()
    x = torch.randn(4, 3, 32, 32)
    small, masked = small_of(model, x, ["conv2-bn2", "conv8-bn8"])
    small.eval()
    expected = small(x)
    torch.testing.assert_close(masked.eval()(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(copy.deepcopy(small)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(small))(x), expected)
    assert small.double()(x.double()).dtype == torch.float64
    small.float()
    exported = torch.export.export(small, (x,))
    torch.testing.assert_close(exported.module()(x), expected)
    small.train()
    before = [p.detach().clone() for p in small.parameters()]
    small(x).square().sum().backward()
    torch.optim.SGD(small.parameters(), lr=0.1).step()
    assert all(p.grad is not None and not torch.equal(p, q) for p, q in zip(small.parameters(), before, strict=True))
    again = espalier.search_space(small, (x,))  # and it can be searched again
    assert len(again) == 2


def test_moves_between_devices() -> None:
    small, _ = small_of(DemoNet(width=0.25), torch.randn(2, 3, 32, 32), ["conv2-bn2"])
    assert {t.device.type for t in (*small.to("meta").parameters(), *small.buffers())} == {"meta"}


def test_the_generated_code_is_readable() -> None:
    small, _ = small_of(DemoNet(width=0.25), torch.randn(2, 3, 32, 32), ["conv2-bn2"])
    assert isinstance(small, fx.GraphModule)
    assert "conv6 = self.conv6(" in small.code
    assert "espalier" not in small.code
    assert all("espalier" not in type(m).__module__ for m in small.modules())
