"""The selectors on real data: the published weakness of i-SpaSP without refit, and what OMP reaches."""

import os

import pytest
import torch

from espalier.curvature.moments import collect
from espalier.experiments.ispasp import accuracy, load_images, narrowed, train
from espalier.experiments.ispasp_resnet import cifar, inner_pairs, load_dense
from espalier.models.two_layer import TwoLayer
from espalier.select.backward import backward
from espalier.select.ispasp import ispasp
from espalier.select.layerwise import narrow, prune_layers
from espalier.select.omp import omp
from espalier.select.refit import from_moments

# Images and dense checkpoints are too large for the repository; CI unpacks them and sets ESPALIER_DATA.
pytestmark = pytest.mark.skipif(
    not os.environ.get("ESPALIER_DATA"),
    reason="not in the repository: ESPALIER_DATA names no folder of MNIST and CIFAR-10",
)


def test_mnist_without_fine_tuning():
    x, y = load_images("mnist", "train")
    test_x, test_y = load_images("mnist", "test")
    torch.manual_seed(0)
    model = TwoLayer(784, 300, 10)
    train(model, x.flatten(1), y, epochs=1, lr=2e-3)
    dense = accuracy(model, test_x, test_y)
    moments = collect(model, ["output"], x[:5000].split(1000))["output"]
    problem = from_moments(moments, model.output.weight)
    raw = from_moments(moments, model.output.weight, centred=False)
    published = accuracy(narrowed(model, ispasp(raw, 50), False), test_x, test_y)
    for method in (omp, backward):
        reached = accuracy(narrowed(model, method(problem, 50), True), test_x, test_y)
        assert reached > dense - 3
        assert reached > published + 10


def test_resnet_20_keeps_its_accuracy_without_fine_tuning_or_labels():
    model = load_dense()
    x, _ = cifar("train", 100)
    test_x, test_y = cifar("test", 1000)
    pairs = inner_pairs()
    dense = accuracy(model, test_x, test_y)
    assert dense > 89
    found = prune_layers(model, pairs, [x], macs=0.8, sequential=False)
    assert accuracy(narrow(model, found), test_x, test_y) > dense - 4
