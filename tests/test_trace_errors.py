"""What bad input gets: an error that names the place and says what to do."""

import re

import pytest
import torch
from torch import nn

from espalier.errors import TraceError
from espalier.graph.trace import trace

HERE = re.escape("test_trace_errors.py:")


class Block(nn.Module):
    """A layer inside of a model, so that errors have a path to name."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Net(nn.Module):
    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.out = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.block(x).mean((2, 3)))


IMAGE = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((torch.randn(2, 5, 8, 8),), {}),
        ((torch.randint(0, 9, (2, 3, 8, 8)),), {}),
        ((torch.randn(2, 3, 8, 8, dtype=torch.float64),), {}),
    ],
    ids=["shape", "integers", "double"],
)
def test_example_inputs_that_a_layer_refuses(args: tuple, kwargs: dict):
    with pytest.raises(TraceError, match=r"module 'block\.conv' \(.*test_trace_errors\.py:\d+\)") as error:
        trace(Net(Block()), args, kwargs)
    assert "mend the inputs (number, shapes, dtypes)" in str(error.value)


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((IMAGE, IMAGE), {}), ((IMAGE,), {"mask": IMAGE})])
def test_another_number_of_inputs(args: tuple, kwargs: dict):
    with pytest.raises(TraceError, match=r"Net\.forward\(x") as error:
        trace(Net(Block()), args, kwargs)
    assert "number" in str(error.value)
    assert "test_trace_errors.py:" in str(error.value)


class Deciding(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return self.conv(x)
        return self.conv(-x)


class Counting(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)[:, : int(x.sum().abs())]


@pytest.mark.parametrize("block", [Deciding, Counting])
def test_control_flow_that_depends_on_data(block: type[Block], capfd: pytest.CaptureFixture[str]):
    with pytest.raises(TraceError, match=rf"module 'block' \(.*{HERE}\d+\)") as error:
        trace(Net(block()), IMAGE)
    assert "torch.where / torch.cond" in str(error.value)
    assert len(str(error.value).splitlines()) <= 3
    assert "def forward" not in capfd.readouterr().err, "the export's own dump of the graph is noise"


class Leaving(Block):
    """Leaves torch, which the export cannot follow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) * float(x.detach().numpy().mean())


def test_a_module_that_fails_in_export():
    with pytest.raises(TraceError, match=rf"module 'block' \(.*{HERE}\d+\)") as error:
        trace(Net(Leaving()), IMAGE)
    assert "torch.export cannot follow" in str(error.value)


def test_a_model_on_two_devices():
    net = Net(Block())
    net.out.to("meta")
    with pytest.raises(TraceError, match=r"'block\.conv\.weight' on cpu, 'out\.weight' on meta") as error:
        trace(net, IMAGE)
    assert "model.to(device)" in str(error.value)


def test_inputs_on_another_device_than_the_model():
    with pytest.raises(TraceError, match="example inputs lie on meta, the model on cpu"):
        trace(Net(Block()), IMAGE.to("meta"))


def test_a_model_without_parameters():
    with pytest.raises(TraceError, match="Sequential has no parameters: there is nothing to make smaller"):
        trace(nn.Sequential(nn.ReLU()), IMAGE)


def test_what_is_no_model():
    with pytest.raises(TraceError, match=r"expected a torch\.nn\.Module, got builtin_function"):
        trace(torch.relu, IMAGE)  # type: ignore[arg-type]


def test_a_wrapped_model():
    with pytest.raises(TraceError, match=r"pass its \.module"):
        trace(nn.DataParallel(Net(Block())), IMAGE)


def test_a_lazy_model():
    with pytest.raises(TraceError, match=r"'0\.weight' is not initialised yet"):
        trace(nn.Sequential(nn.LazyLinear(3)), torch.randn(2, 4))


class WritingThroughAView(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        y.unfold(2, 2, 2).mul_(2.0)
        return y


def test_a_write_through_a_view_that_cannot_be_carried_back():
    with pytest.raises(TraceError, match=rf"module 'block' \(.*{HERE}\d+\).*aten\.unfold.*out-of-place"):
        trace(Net(WritingThroughAView()), IMAGE)


def test_a_failed_trace_leaves_the_model_as_it_was():
    net = Net(Deciding()).train()
    net.out.eval()
    with pytest.raises(TraceError):
        trace(net, IMAGE)
    assert net.training
    assert net.block.training
    assert not net.out.training
    assert "training" not in vars(nn.Module)


class Cache:
    """An object that torch.export does not know."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


class ReturnsCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Cache]:
        y = self.a(x)
        return y, Cache(y)


def test_an_unknown_output_names_the_cache() -> None:
    with pytest.raises(TraceError, match="use_cache"):
        trace(ReturnsCache(), torch.randn(2, 3))
