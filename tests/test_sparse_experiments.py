"""The recipes of sparse training on random images: every method trains, is cut to the budget, and constructs."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from espalier import Budget, construct, search_space
from espalier.data import Dataset
from espalier.experiments import (
    gsparsity,
    gsparsity_mlp,
    l0,
    l0_plots,
    l0_table,
    l0_wrn,
    sparse_methods,
    sparse_methods_report,
)
from espalier.experiments.logs import forget_after
from espalier.models.lenet5 import LeNet5
from espalier.models.wide_resnet import WideResNet
from espalier.space.chains import meet


def images(count: int, channels: int, size: int) -> Dataset:
    make = np.random.default_rng(0)
    pixels = make.integers(0, 255, (count, size, size, channels), dtype=np.uint8)
    return Dataset(
        "noise",
        "train",
        pixels,
        make.integers(0, 10, count),
        np.arange(count),
        10,
        (0.5,) * channels,
        (0.5,) * channels,
    )


@pytest.mark.parametrize("method", sparse_methods.METHODS)
def test_every_method_meets_the_budget(method):
    torch.manual_seed(0)
    space = search_space(LeNet5(), (torch.zeros(2, 1, 28, 28),), levels=("channel",))
    recipe = sparse_methods.Recipe(method, sparse_methods.STRENGTH.get(method, 0.0), macs=(0.3,), images=200)
    trainer = sparse_methods.Trainer(recipe, space, steps=6)
    for i in range(6):
        make = torch.Generator().manual_seed(i)
        trainer.step(torch.randn(8, 1, 28, 28, generator=make), torch.randint(10, (8,), generator=make))
    closed, order = trainer.outcome()
    assert sorted(order) == sorted(space.structures.names)
    assert order[: len(closed)] == [n for n in order if n in set(closed)]
    removed = meet(space, order, Budget(macs=0.3))
    small = construct(space, space.solution(removed))
    assert space.cost(removed).macs <= 0.3 * space.cost().macs
    assert small(torch.randn(3, 1, 28, 28)).shape == (3, 10)


def test_group_sparsity_stops_and_goes_on(tmp_path, monkeypatch):
    """A run in two parts ends as one in one part, and the line says what goes by each reading of zero."""
    torch.set_num_threads(1)
    data = images(64, 3, 32)
    recipe = gsparsity.Recipe("darts-v2", mu=0.5, steps=4, batch_size=8, channels=2, cells=2)
    ends = []
    for parts in ((4,), (2, 4)):
        for steps in parts:
            space = gsparsity.build(recipe)
            opt = gsparsity.optimizer(recipe, space)
            now = gsparsity.Recipe(**{**vars(recipe), "steps": steps})
            gsparsity.train(now, space, opt, data, tmp_path / f"{len(parts)}.pt")
        ends.append([p.detach().clone() for p in space.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    monkeypatch.setattr(gsparsity, "images", lambda recipe, held_out: (data, data))
    line = gsparsity.run(recipe, tmp_path, 0)
    assert {"before", "support", "norm <= 1e-06", "norm <= 0.001"} <= set(line)
    none = line["norm <= 1e-06"]
    assert (none["removed"], none["after"]) == (0, line["before"])
    saved = torch.load(tmp_path / f"{recipe.name}.pt", weights_only=True)
    again = gsparsity.run(recipe, tmp_path, 0)  # nothing is left to do: what it cost is read from the checkpoint
    assert again["loss"] == line["loss"] == round(saved["loss"], 4)
    assert saved["cpu_s"] > 0
    assert again["cpu_s"] == pytest.approx(saved["cpu_s"], abs=0.2)


def test_wide_resnet_with_gates():
    torch.manual_seed(0)
    data = images(40, 3, 32)
    recipe = l0_wrn.Recipe(depth=10, width=1)
    gates = l0_wrn.gated(recipe, 40)
    opt = torch.optim.SGD(l0_wrn.parameters(gates, 5e-4), lr=0.1)
    x, y = torch.randn(6, 3, 32, 32), torch.randint(10, (6,))
    assert torch.isfinite(l0_wrn.one_step(gates, opt, x, y))
    with torch.no_grad():
        gates.phi[::2] = -1.0
    before = {name: t.clone() for name, t in gates.model.state_dict().items()}
    line = l0_wrn.report(gates, data, 0)
    assert line["closed"] == 56
    assert 0 < line["macs"] < 1
    assert 0 < line["expected_macs"] < 1
    assert all(torch.equal(t, before[name]) for name, t in gates.model.state_dict().items())


def test_wide_resnet_sizes():
    """Counts of WRN-16-4 and WRN-28-10 by hand: convolutions, two norms a block, one at the end, and the classifier."""
    for depth, width in ((16, 4), (28, 10)):
        widths, total = [16, 16 * width, 32 * width, 64 * width], 3 * 16 * 9
        for a, b in itertools.pairwise(widths):
            for i in range((depth - 4) // 6):
                inputs = a if i == 0 else b
                total += 9 * inputs * b + 9 * b * b + 2 * inputs + 2 * b + (inputs * b if i == 0 else 0)
        total += 2 * widths[-1] + 10 * widths[-1] + 10
        with torch.device("meta"):
            assert sum(p.numel() for p in WideResNet(depth, width).parameters()) == total
    with pytest.raises(ValueError, match="6 n"):
        WideResNet(15)
    assert isinstance(WideResNet(10, 1).stages, nn.Sequential)


def test_the_guide_runs_as_printed():
    guide = Path(__file__).parents[1] / "docs" / "sparse_training.md"
    names: dict[str, object] = {}
    torch.manual_seed(0)
    for code in re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL):
        exec(compile(code, guide.name, "exec"), names)


def test_the_table_of_gates_has_a_row_for_each_recipe_and_means_over_seeds():
    def log(prune, opened):
        last = {"epoch": 2, "open": opened, "prune": prune, "accuracy": 98.0, "macs_share": 0.1, "undecided": 0.25}
        return [{"cpu_s": 1.0}, last | {"cpu_s": 3.0}]

    logs = {
        "mlp-arm-one-0": log(86.0, "9-8-7"),
        "mlp-arm-one-1": log(88.0, "6-5-4"),
        "lenet5-hc-separate-0": log(1.0, "1"),
    }
    tables = l0_table.table(logs).split("\n\n")
    assert [t.splitlines()[0].split(" |")[0] for t in tables] == ["| mlp", "| lenet5"]
    assert tables[0].splitlines()[2:] == [
        "| L0-ARM, one λ | 0, 1 | 2 | 9-8-7, 6-5-4 | 87.00 ± 1.41 | 98.00 ± 0.00 | 10.00 ± 0.00 | 25.0 ± 0.0 | 2.0 "
        "| 143-153-78, 87.00, 98.3 |"
    ]
    assert tables[1].splitlines()[2].startswith("| L0-HC, a λ per layer | 0 | 2 | 1 | 1.00 | 98.00 |")


def test_the_table_over_all_methods_shows_means_and_deviations(tmp_path):
    own = {"method": "rmda", "strength": 0.03, "own_macs": 0.6, "own_accuracy": 80.0, "cut_accuracy": 70.0}
    lines = [
        own | {"seed": seed, "budget": budget, "macs": budget - 0.01, "accuracy": accuracy, "cpu_s": 9.6}
        for seed, budget, accuracy in ((1, 0.5, 82.0), (1, 0.1, 72.0), (0, 0.5, 80.0), (0, 0.1, 71.0))
    ]
    for seed in (0, 1):
        text = "".join(json.dumps(line) + "\n" for line in lines if line["seed"] == seed)
        (tmp_path / f"{seed}.jsonl").write_text(text)
    read = sparse_methods_report.read(sorted(tmp_path.glob("*.jsonl")))
    assert [(line["budget"], line["seed"]) for line in read] == [(0.5, 0), (0.5, 1), (0.1, 0), (0.1, 1)]
    assert sparse_methods_report.table(read).splitlines()[2:] == [
        "| rmda | 0.03 | 2 | 0.600 ± 0.000, 80.00 ± 0.00 | 70.00 ± 0.00 → 81.00 ± 1.41 | 70.00 ± 0.00 → 71.50 ± 0.71 "
        "| 10 |"
    ]
    sparse_methods_report.draw(read, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5_000


@pytest.mark.parametrize("method", ["h2spg", "ramda"])
def test_a_training_is_cut_to_every_budget(monkeypatch, method):
    """H2SPG trains once per budget; each network is within its own, and what a method closed stays away."""
    shown = images(200, 1, 28)
    monkeypatch.setattr(sparse_methods, "load", lambda name, split, validation=0: shown)
    recipe = sparse_methods.Recipe(method, 0.05, (0.5, 0.2), epochs=3, images=200, batch_size=20)
    lines = sparse_methods.run(recipe)
    assert [line["budget"] for line in lines] == [0.5, 0.2]
    assert all(line["macs"] <= line["budget"] for line in lines)
    assert recipe.name != sparse_methods.Recipe(method, 0.05, (0.5,), epochs=3, images=200, batch_size=20).name
    if method == "ramda":
        assert all(line["macs"] <= line["own_macs"] for line in lines)
        assert lines[0]["own_accuracy"] == lines[1]["own_accuracy"]


def test_neurons_at_a_mu_and_at_a_target():
    """Before and after removal are the same; with a target the best trial is the one that is built."""
    make = torch.Generator().manual_seed(0)
    data = torch.randn(400, 784, generator=make), torch.randint(10, (400,), generator=make)
    line = gsparsity_mlp.run("proxsgd", 0.05, 1, 0.1, 0, data, data)
    assert line["before"] == line["after"]
    found = gsparsity_mlp.to_target("proxsgd", 0.5, 1, 0.1, 0, data, data)
    assert found["before"] == found["after"]
    assert found["met"]
    assert 0.48 <= found["macs"] <= 0.5
    assert found["trials"][-1] == [found["mu"], found["macs"]]


def test_figures_2_and_3_are_drawn_from_the_committed_logs(tmp_path):
    logs = Path(__file__).parents[1] / "docs" / "results" / "l0"
    names = [str(logs / f"{name}.jsonl") for name in ("lenet5-arm-one-0", "mlp-arm-one-1", "mlp-arm-one-0")]
    out, histograms = tmp_path / "curves.png", tmp_path / "histograms.png"
    l0_plots.main([*names, "--out", str(out), "--histograms", str(histograms)])
    assert out.read_bytes()[:4] == histograms.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="mlp-arm-one-0"):  # whose lines were written before the histogram was
        l0_plots.draw_histograms({"mlp-arm-one-0": l0_plots.read(logs / "mlp-arm-one-0.jsonl")}, histograms)


def test_thresholds_of_a_run_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="without --thresholds"):
        l0.thresholds(l0.Recipe(), tmp_path)


def test_a_resumed_log_forgets_what_its_checkpoint_does_not_know(tmp_path):
    log = tmp_path / "run.jsonl"
    log.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epoch": 3}\n{"epo')
    forget_after(log, "epoch", 2)
    assert log.read_text() == '{"epoch": 1}\n{"epoch": 2}\n'
    forget_after(log, "epoch", 0)
    assert log.read_text() == ""
