"""Every architecture: exact sizes, shapes, and a training step."""

import doctest
import importlib
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import espalier
from espalier.models import (
    DARTS,
    DemoNet,
    MobileNet,
    StackedUnets,
    SuperResNet,
    regnet_x_200m,
    regnet_x_400m,
    regnet_x_600m,
    regnet_x_800m,
)
from espalier.models.darts import OPERATIONS, Cell, operation
from espalier.models.regnet import RegNetX, regnet_widths
from espalier.models.super_resnet import ZEN_STAGES, SuperStage

FILES = ("darts", "demonet", "mobile", "regnet", "stacked_unets", "super_resnet")
IMAGENET = {"stem_stride": 2, "strides": (2, 2, 2, 2), "num_classes": 1000}


@pytest.mark.parametrize("name", FILES)
def test_examples_of_the_docstrings(name):
    assert doctest.testmod(importlib.import_module(f"espalier.models.{name}")).failed == 0


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


SIZES = {
    "StackedUnets": (StackedUnets, (3, 32, 32), 800_074, 184.15e6),
    "SuperResNet": (SuperResNet, (3, 32, 32), 8_903_194, 2 * 2080.69e6),
    "DARTS, 8 cells": (DARTS, (3, 32, 32), 1_930_618, 2 * 300.26e6),
    "DARTS, 14 cells": (lambda: DARTS(cells=14), (3, 32, 32), 3_239_674, 2 * 526.85e6),
    "DARTS, 24 channels": (lambda: DARTS(24, affine=True), (3, 32, 32), 4_083_058, 2 * 600.00e6),
    "MobileNet": (MobileNet, (3, 224, 224), 9_099_880, 2 * 510.77e6),
    "RegNetX-200MF": (regnet_x_200m, (3, 32, 32), 2_319_482, 2 * 59.86e6),
    "RegNetX-400MF": (regnet_x_400m, (3, 32, 32), 4_775_274, 2 * 122.88e6),
    "RegNetX-600MF": (regnet_x_600m, (3, 32, 32), 5_672_330, 2 * 188.67e6),
    "RegNetX-800MF": (regnet_x_800m, (3, 32, 32), 6_593_386, 2 * 251.97e6),
    "RegNetX-200MF, ImageNet": (lambda: regnet_x_200m(**IMAGENET), (3, 224, 224), 2_684_792, 2 * 199.04e6),
    "RegNetX-400MF, ImageNet": (lambda: regnet_x_400m(**IMAGENET), (3, 224, 224), 5_157_512, 2 * 397.68e6),
    "RegNetX-600MF, ImageNet": (lambda: regnet_x_600m(**IMAGENET), (3, 224, 224), 6_196_040, 2 * 600.89e6),
    "RegNetX-800MF, ImageNet": (lambda: regnet_x_800m(**IMAGENET), (3, 224, 224), 7_259_656, 2 * 799.70e6),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    make, shape, parameters, operations = SIZES[name]
    with torch.device("meta"):
        model = make()
    assert params(model) == parameters
    assert flops(model, *shape) == pytest.approx(operations, rel=1e-4)


SMALL = {
    "StackedUnets": (lambda c: StackedUnets(width=0.125, num_classes=c), (3, 16, 16)),
    "StackedUnets, grey": (lambda c: StackedUnets(0.125, in_channels=1, num_classes=c), (1, 24, 16)),
    "SuperResNet": (lambda c: SuperResNet(width=0.1, num_classes=c), (3, 16, 16)),
    "DARTS": (lambda c: DARTS(channels=4, cells=4, num_classes=c, affine=True), (3, 16, 16)),
    "DARTS, ImageNet": (lambda c: DARTS(4, cells=3, stem="imagenet", num_classes=c), (3, 64, 64)),
    "MobileNet": (lambda c: MobileNet(width=0.1, num_classes=c), (3, 64, 64)),
    "RegNetX": (lambda c: regnet_x_200m(width=0.125, num_classes=c), (3, 16, 16)),
    "RegNetX, grey": (lambda c: regnet_x_800m(0.125, in_channels=1, num_classes=c), (1, 28, 28)),
}


@pytest.mark.parametrize("name", SMALL)
def test_trains(name):
    make, shape = SMALL[name]
    assert trains(make(7), *shape).shape == (2, 7)


EXPORTED = {name: SMALL[name] for name in ("StackedUnets", "MobileNet", "RegNetX")} | {
    "DemoNet": (lambda c: DemoNet(0.125, num_classes=c), (3, 16, 16)),
    "SuperResNet": (lambda c: SuperResNet(ZEN_STAGES[:2], width=0.1, num_classes=c), (3, 16, 16)),
    "DARTS": (lambda c: DARTS(4, cells=3, nodes=2, num_classes=c), (3, 16, 16)),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_exports_with_any_batch_size(name):
    make, shape = EXPORTED[name]
    model = make(7).eval()
    sizes = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(model, (torch.randn(2, *shape),), dynamic_shapes=sizes, strict=False)
    x = torch.randn(5, *shape)
    assert torch.equal(program.module(check_guards=False)(x), model(x))


SPACES = {  # networks, inputs, and how many structures the paper's rule removes from each
    "DemoNet: the paper's five": (lambda: DemoNet(0.125), 5),
    "StackedUnets: three of each U-Net": (lambda: StackedUnets(0.125), 6),
    "SuperResNet: 8 blocks of three, 2 shortcuts": (lambda: SuperResNet(ZEN_STAGES[:2], width=0.1), 26),
    "RegNetX-800MF: 16 blocks, 4 shortcuts": (lambda: regnet_x_800m(0.125), 20),
}


@pytest.mark.parametrize("name", SPACES)
def test_search_space_is_found_without_a_hint(name):
    make, structures = SPACES[name]
    assert len(espalier.search_space(make().eval(), (torch.randn(2, 3, 16, 16),))) == structures


def test_stacked_unets_without_the_papers_redundant_structures():
    model = StackedUnets()
    assert params(model) - params(model.right) - params(model.left.level4) == 365_434


def test_super_resnet_contains_the_published_zen_network():
    stages = [replace(s, kernels=(k,)) for s, k in zip(ZEN_STAGES, (5, 5, 7, 3, 3, 5, 3), strict=True)]
    assert params(SuperResNet(stages)) == 1_949_274


def test_super_resnet_without_candidates_in_a_block_is_its_identity():
    model = SuperResNet([SuperStage(4, 2, 1, 2)], width=1.0)
    second = model.blocks[1]
    second.candidates.clear()
    x = torch.randn(2, 4, 8, 8).relu()
    assert torch.equal(second(x), x)


def test_darts_cells_reduce_at_a_third_and_two_thirds():
    cells = DARTS(channels=4, cells=8).cells
    strides = [cell.edges["0_2"]["sep_conv_3x3"][1].stride[0] for cell in cells]
    assert strides == [1, 1, 2, 1, 1, 2, 1, 1]
    assert [len(cell.edges) for cell in cells] == [14] * 8
    assert all(len(edge) == 7 for cell in cells for edge in cell.edges.values())


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("stride", [1, 2])
def test_darts_operations_keep_channels_and_divide_the_size(name, stride):
    x = torch.randn(2, 6, 8, 8)
    assert operation(name, 6, stride)(x).shape == (2, 6, 8 // stride, 8 // stride)


def test_darts_node_is_the_plain_sum_of_all_operations():
    torch.manual_seed(0)
    cell = Cell((4, 4), 4, reduction=False, reduction_before=False, nodes=1).double().eval()
    before, last = torch.randn(2, 2, 4, 6, 6, dtype=torch.float64)
    inputs = [cell.preprocess0(before), cell.preprocess1(last)]
    expected = sum(op(x) for i, x in enumerate(inputs) for op in cell.edges[f"{i}_2"].values())
    torch.testing.assert_close(cell(before, last), expected)


def test_darts_pools_and_skips_have_no_parameters_even_when_affine():
    for name in ("max_pool_3x3", "avg_pool_3x3", "skip"):
        assert params(operation(name, 8, affine=True)) == 0


def test_regnet_widths_are_the_published_ones():
    published = {
        (13, 24, 36.44, 2.49, 8): ([24, 56, 152, 368], [1, 1, 4, 7]),
        (22, 24, 24.48, 2.54, 16): ([32, 64, 160, 384], [1, 2, 7, 12]),
        (16, 48, 36.97, 2.24, 24): ([48, 96, 240, 528], [1, 3, 5, 7]),
        (16, 56, 35.73, 2.28, 16): ([64, 128, 288, 672], [1, 3, 7, 5]),
    }
    for rule, widths in published.items():
        assert regnet_widths(*rule) == widths


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="no operation of DARTS"):
        operation("conv_9x9", 4)
    with pytest.raises(ValueError, match="stem"):
        DARTS(stem="mnist")
    with pytest.raises(ValueError, match="one width, depth and stride per stage"):
        RegNetX((8, 16), (1, 1), 8, strides=(1,))
