"""Every architecture: exact sizes, shapes, and a training step."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from espalier.models import DemoNet


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def flops(model: nn.Module, *shape: int) -> int:
    """2 × MACs of one image of this shape, on meta tensors."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.to("meta").eval()(torch.empty(1, *shape, device="meta"))
    return counter.get_total_flops()


def trains(model: nn.Module, *shape: int, batch: int = 2) -> torch.Tensor:
    """One forward and backward pass in train mode; every parameter gets a finite gradient."""
    torch.manual_seed(0)
    out = model.train()(torch.randn(batch, *shape))
    out.square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    return out


def test_demonet_sizes():
    model = DemoNet()
    assert params(model) == 818_442
    assert flops(model, 3, 32, 32) == pytest.approx(209.98e6, rel=1e-4)


def test_demonet_without_three_branches_has_the_papers_sub_network_size():
    model = DemoNet()
    gone = [model.conv2, model.bn2, model.conv3, model.bn3, model.conv8, model.bn8]
    columns = model.conv6.weight[:, : model.conv2.out_channels + model.conv3.out_channels].numel()
    assert params(model) - sum(map(params, gone)) - columns == 449_034


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 8, 8)])
def test_demonet_trains(shape):
    assert trains(DemoNet(width=0.125, in_channels=shape[0], num_classes=7), *shape).shape == (2, 7)


def test_demonet_width_must_be_positive():
    with pytest.raises(ValueError, match="width"):
        DemoNet(width=0)
