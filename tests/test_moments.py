"""Streamed second moments against the same sums computed in memory."""

import doctest
import importlib
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

import espalier
from espalier.curvature.moments import Moments, collect, collect_paired, input_rows, moment_cost
from espalier.curvature.symmetric import add_symmetric
from espalier.select.refit import from_moments

SELECT = ["allocate", "auxiliary", "backward", "gfs", "ispasp", "layerwise", "omp", "refit", "sweep"]
MODULES = ["curvature.moments", "curvature.symmetric", "models.two_layer", *(f"select.{name}" for name in SELECT)]


class Net(nn.Module):
    def __init__(self, stride: int = 1, padding: int | str = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 5, 3, stride=stride, padding=padding)
        self.third = nn.Conv2d(5, 4, 1, stride=stride)
        self.fourth = nn.Linear(4, 7)
        self.fifth = nn.Linear(7, 2)

    def forward(self, x):
        x = self.second(self.norm(self.first(x)).relu()).relu()
        x = self.third(x).relu().mean((2, 3))
        return self.fifth(functional.gelu(self.fourth(x)))


NAMES = ["second", "third", "fourth", "fifth"]


def inputs(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, input_rows(module, args[0]).double())
        )
        for name in NAMES
    ]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (1, 0), (1, "same"), (1, "valid")])
def test_all_layers_equal_the_in_memory_sums(stride, padding):
    torch.manual_seed(0)
    model = Net(stride, padding).double()
    model(torch.randn(8, 3, 9, 9, dtype=torch.float64))  # moves the running statistics
    x = torch.randn(23, 3, 9, 9, dtype=torch.float64)
    model.train()
    found = collect(model, NAMES, [(batch, "label") for batch in x.split(5)])
    assert model.training
    assert model.norm.training
    for name, rows in inputs(model, x).items():
        scale = float((rows.T @ rows).abs().max())
        torch.testing.assert_close(found[name].gram, rows.T @ rows, rtol=0, atol=1e-10 * scale)
        torch.testing.assert_close(found[name].sums, rows.sum(0), rtol=1e-10, atol=1e-10)
        assert found[name].count == len(rows)
        module = model.get_submodule(name)
        assert rows.shape[1] == module.weight[0].numel()


@pytest.mark.parametrize("kind", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_rows_times_weight_are_the_layer(kind, dilation):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=dilation, padding_mode=kind, bias=False).double()
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    out = (input_rows(conv, x) @ conv.weight.flatten(1).T).view(3, -1, 6).movedim(1, 2)
    torch.testing.assert_close(out.flatten(2), conv(x).flatten(2))


@pytest.mark.parametrize("columns", [3, 512, 513, 700])
@pytest.mark.parametrize("rows", [1, 40])
def test_symmetric_products_equal_whole_ones(columns, rows):
    g = torch.Generator().manual_seed(0)
    left, right = (torch.randn(rows, columns, generator=g, dtype=torch.float64) for _ in range(2))
    start = left.T @ left
    torch.testing.assert_close(add_symmetric(start.clone(), right, right, alpha=-2), start - 2 * right.T @ right)
    added = left.T @ right + right.T @ left
    torch.testing.assert_close(add_symmetric(start.clone(), left, right, both=True), start + added)


def test_paired_moments_equal_the_in_memory_sums():
    torch.manual_seed(0)
    dense, pruned = Net().double(), Net().double()
    pruned.load_state_dict(dense.state_dict())
    with torch.no_grad():
        pruned.second.weight[:, 2:4] = 0
    x = torch.randn(12, 3, 6, 6, dtype=torch.float64)
    for names in (["third"], ["third", "fifth"]):
        found = collect_paired(dense, pruned, names, list(x.split(5)))
        for name in names:
            a, b = inputs(dense, x)[name], inputs(pruned, x)[name]
            torch.testing.assert_close(found[name].gram, b.T @ b, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(found[name].cross, a.T @ b, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(found[name].dense_gram, a.T @ a, rtol=1e-10, atol=1e-10)
            known = collect(dense, names, list(x.split(4)))
            again = collect_paired(dense, pruned, [name], list(x.split(5)), known=known)[name]
            torch.testing.assert_close(again.cross, found[name].cross, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(again.dense_gram, found[name].dense_gram, rtol=1e-10, atol=1e-10)
            weight = dense.get_submodule(name).weight.detach().flatten(1)
            trial = torch.randn_like(weight)
            problem = from_moments(found[name], weight, centred=False)
            assert problem.error(trial) == pytest.approx(float((b @ trial.T - a @ weight.T).square().sum()))
            centred = from_moments(found[name], weight)
            gap = b @ trial.T - a @ weight.T
            assert centred.error(trial) == pytest.approx(float((gap - gap.mean(0)).square().sum()))


def test_cost_is_said_before_it_starts():
    model = Net()
    cost = moment_cost(model, NAMES, torch.zeros(2, 3, 8, 8))
    assert cost.bytes["second"] == 8 * (54**2 + 2 * 54)
    assert cost.flops["second"] == 2 * 54**2 * 64
    assert cost.flops["fifth"] == 2 * 7**2
    assert "4 layers" in str(cost)
    assert moment_cost(model, ["fifth"], torch.zeros(2, 3, 8, 8), paired=True).bytes["fifth"] == 8 * (147 + 14)


def test_memory_does_not_grow_with_the_samples():
    moments = Moments.zeros(4)
    sizes = []
    for _ in range(3):
        moments.add(torch.rand(50, 4))
        sizes.append(sum(v.numel() for v in vars(moments).values() if isinstance(v, torch.Tensor)))
    assert sizes == [20, 20, 20]
    assert moments.count == 150


def test_nan_activations_name_the_layer():
    model = Net()
    x = torch.randn(4, 3, 6, 6)
    x[3, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="input of second holds NaN"):
        collect(model, ["second"], list(x.split(2)))


def test_an_empty_loader_is_refused():
    with pytest.raises(ValueError, match="loader is empty"):
        collect(Net(), ["second"], [])
    with pytest.raises(ValueError, match="loader is empty"):
        from_moments(Moments.zeros(3), torch.ones(2, 3))


def test_layers_that_cannot_be_refitted_are_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4))
    for name, error, words in (("0", ValueError, "grouped"), ("1", TypeError, "Linear or Conv2d")):
        with pytest.raises(error, match=words):
            collect(model, [name], [torch.rand(2, 4, 5, 5)])


def test_fewer_samples_than_columns_warn():
    moments = Moments.zeros(9, name="head")
    moments.add(torch.rand(5, 9))
    with pytest.warns(RuntimeWarning, match="head: 5 samples for 9 columns"):
        from_moments(moments, torch.rand(2, 9))


def test_processes_add_up(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys, torch\n"
        "from espalier.curvature.moments import collect\n"
        "rank, store = int(sys.argv[1]), sys.argv[2]\n"
        "torch.distributed.init_process_group('gloo', init_method=f'file://{store}',\n"
        "                                     rank=rank, world_size=2)\n"
        "x = torch.arange(12.0).view(6, 2)[rank * 3 : rank * 3 + 3 - rank]\n"
        "m = collect(torch.nn.Sequential(torch.nn.Linear(2, 1)), ['0'], [x])['0']\n"
        "y = torch.arange(10.0, dtype=torch.float64).view(5, 2)\n"
        "assert torch.equal(m.gram, y.T @ y), m.gram\n"
        "assert torch.equal(m.sums, y.sum(0))\n"
        "assert m.count == 5\n"
        "torch.distributed.barrier()\n"
        "torch.distributed.destroy_process_group()\n"
    )
    source = str(pathlib.Path(espalier.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=60)
        assert worker.returncode == 0, errors


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"espalier.{name}")
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0
