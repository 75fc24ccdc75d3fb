"""Recipes and their trainer: all smoke runs, resuming, sharing, logs, refusals; on made-up images."""

import json
import math
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from rich.console import Console

from espalier.cli import main
from espalier.experiments import logs, training
from espalier.experiments.config import METHODS, Run
from espalier.experiments.methods import nearest
from espalier.experiments.modules import EXPERIMENTS, Experiment
from espalier.experiments.networks import NETWORKS
from espalier.experiments.ranks import join
from espalier.experiments.recipe import all_recipes, cuts, smoke
from espalier.experiments.reproduce import rows
from espalier.experiments.splits import shrink, splits
from espalier.experiments.training import Training, train
from espalier.space.search_space import search_space

RECIPES = all_recipes()
TINY = smoke(Run("demonet", "fashion-mnist", method="h2spg", params=0.6))


@pytest.mark.parametrize("name", [f"asgssd-table{i}" for i in range(1, 9)] + ["asgssd-figures", "parameterless"])
def test_recipe_has_three_scales_of_known_runs(name: str) -> None:
    recipe = RECIPES[name]
    assert set(recipe.runs) == {"smoke", "short", "paper"}
    for scale, runs in recipe.runs.items():
        assert runs
        for run in runs:
            assert run.network in NETWORKS
            assert run.method in METHODS
            assert recipe.label(run)
            assert run.stand_in == (scale == "smoke")
            assert run.validation > 0, "a validation split is held out in every run"
    assert set(recipe.published) <= {recipe.label(run) for run in recipe.runs["paper"]}
    assert {"epochs", "width"} & set(cuts(recipe, "short")), "short is cut, and says how"


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"asgssd-figures", "asgssd-table1", "asgssd-table8"}))
def test_smoke_runs(name: str, tmp_path: Path) -> None:
    assert main(["reproduce", name, "--scale", "smoke", "--out", str(tmp_path), "--no-draw", "--threads", "1"]) == 0
    lines = [json.loads(line) for line in (tmp_path / f"{name}-smoke" / "results.jsonl").read_text().splitlines()]
    assert len(lines) == len(RECIPES[name].runs["smoke"])
    for line in lines:
        if line["run"]["method"] == "full":
            assert line["params"] == line["full_params"]
        elif "refused" not in line:
            assert line["removed"]
            assert line["params"] < line["full_params"]
    assert json.loads((tmp_path / f"{name}-smoke" / "table.json").read_text())["rows"]


def test_prints_our_number_beside_the_papers_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = ["--out", str(tmp_path), "--only", "demonet", "--threads", "1"]
    assert main(["reproduce", "asgssd-table1", "--scale", "smoke", *out]) == 0
    shown = capsys.readouterr().out
    folder = tmp_path / "asgssd-table1-smoke"
    row = next(line for line in shown.splitlines() if "DemoNet, H2SPG" in line)
    test = json.loads((folder / "results.jsonl").read_text().splitlines()[1])["test"]
    assert f"{test:.2f}" in row
    assert "84.7" in row
    assert "0.45" in row
    assert "cut width" in shown
    assert (folder / "demonet-h2spg-0.6.svg").read_text().startswith("<svg")
    assert (folder / "plot.png").exists() or "No plot" in shown
    (folder / "table.json").unlink()
    assert main(["reproduce", "asgssd-table1", "--no-train", "--no-draw", "--out", str(tmp_path)]) == 0
    assert len(json.loads((folder / "table.json").read_text())["rows"]) == 2


def test_missing_data_names_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("ESPALIER_DATA", str(tmp_path))
    assert main(["reproduce", "asgssd-table1", "--scale", "short", "--out", str(tmp_path / "runs")]) == 2
    assert "espalier data prepare svhn" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("arguments", [["no-such"], ["asgssd-table1", "--only", "no-such"]])
def test_unknown_names_are_errors(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", *arguments, "--out", str(tmp_path)]) == 2
    assert "no-such" in capsys.readouterr().err


def _weights(t: Training) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in t.network.state_dict().items()}


@pytest.mark.parametrize("stop", [2, 5, 7])
def test_resumes_bit_for_bit(stop: int, tmp_path: Path) -> None:
    """Stopped in the search phase, on the way to zero, and with the sub-network."""
    run = replace(TINY, construct_early=True, mixup=0.2, pad=2)
    whole = Training(run, tmp_path / "whole", join())
    whole.go()
    first = Training(run, tmp_path / "parts", join())
    first.go(stop_at=stop)
    assert first.step == stop
    second = Training(run, tmp_path / "parts", join())
    second.go()
    assert second.step == whole.step == 8
    assert second.removed == whole.removed
    assert second.removed
    for name, value in _weights(whole).items():
        assert torch.equal(value, _weights(second)[name]), name
    left, right = (
        [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (tmp_path / part / "log.jsonl").read_text().splitlines()
            if "loss" in line
        ]
        for part in ("whole", "parts")
    )
    assert left == right


def test_finished_run_is_read_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = train(TINY, tmp_path, join())
    monkeypatch.setattr(training, "Training", None)
    assert train(TINY, tmp_path, join()) == json.loads(json.dumps(line))


def test_shared_search_takes_the_same_steps(tmp_path: Path) -> None:
    """Warm-up steps are the base optimizer's own: sharing them changes nothing but the averaged saliency."""
    alone = Training(replace(TINY, watched=1), tmp_path / "alone", join())
    alone.go(stop_at=3)
    shared = Training(replace(TINY, shared=True, watched=1), tmp_path / "shared" / "run", join())
    shared.go(stop_at=3)
    for name, value in _weights(alone).items():
        assert torch.equal(value, _weights(shared)[name]), name


def test_dhspg_is_refused_with_the_reason(tmp_path: Path) -> None:
    run = smoke(Run("regnet-800m", "cifar10", method="dhspg", sparsity=0.95))
    t = Training(run, tmp_path, join())
    t.go()
    line = t.result()
    assert "keeps no input" in line["refused"]
    assert "params" not in line
    (row,) = rows(RECIPES["asgssd-table4"], [(run, line)])
    assert row.text.startswith("✗")


def test_nearest_budget() -> None:
    run = smoke(Run("regnet-800m", "cifar10", method="h2spg", sparsity=0.9))
    model = NETWORKS[run.network](width=run.width)
    space = search_space(model, (torch.zeros(2, 3, 8, 8),))
    budget, words = nearest(run, space)
    assert budget.structures_to_remove(len(space)) == len(space.most_removable())
    assert "were asked for" in words
    assert nearest(replace(run, sparsity=0.5), space) == (replace(run, sparsity=0.5).budget, "")


def test_rate_follows_its_cosines() -> None:
    run = Run("demonet", "mnist", lr=0.2, lr_end=0.02, cycles=(0.25, 0.75), search_lr=0.1)
    for step in range(40):
        at, peak = (step / 10, 0.1) if step < 10 else ((step - 10) / 30, 0.2)
        wanted = 0.02 + (peak - 0.02) * (1 + math.cos(math.pi * at)) / 2
        assert run.rate(step, 10, 40) == pytest.approx(wanted)
    stepped = replace(run, decay=2.0, lr=0.1)
    assert [round(stepped.rate(s, 5, 40), 6) for s in (10, 19, 20, 30)] == [0.1, 0.1, 0.01, 0.001]


@pytest.mark.parametrize("wrong", [{"method": "magic"}, {"sparsity": None}, {"cycles": (0.5,)}])
def test_wrong_configuration_is_an_error(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"method|sparsity|cycles"):
        replace(Run("demonet", "mnist", method="h2spg", sparsity=0.5), **wrong)  # type: ignore[arg-type]


def test_splits_are_disjoint_and_averaged() -> None:
    data = splits(TINY)
    assert len(data.train) == 96
    assert data.size == 14
    images = torch.rand(2, 3, 8, 8)
    assert torch.allclose(shrink(images, 4)[1, 2, 3, 1], images[1, 2, 6:, 2:4].mean())


def test_log_drops_what_the_checkpoint_does_not_know(tmp_path: Path) -> None:
    log = logs.Log(tmp_path)
    for step in (1, 2, 3):
        log.write(step, loss=float(step))
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    logs.Log(tmp_path, step=2).close()
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2]


def test_tensorboard_is_written_or_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not logs.tensorboard_missing():
        log = logs.Log(tmp_path)
        log.write(1, loss=0.5)
        log.close()
        assert list((tmp_path / "tensorboard").iterdir())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    console = Console(width=120)
    with console.capture() as shown:
        logs.explain_logs(console)
    assert "pip install 'espalier[experiments]'" in shown.get()
    log = logs.Log(tmp_path / "plain")
    log.write(1, loss=0.5)
    assert log.writer is None
    assert (tmp_path / "plain" / "log.jsonl").read_text()


def test_a_device_that_is_not_there_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["reproduce", "asgssd-table1", "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_other_papers_experiments_are_listed_and_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce"]) == 0
    listed = capsys.readouterr().out
    for name, experiment in EXPERIMENTS.items():
        assert name in listed
        assert set(experiment.scales) == {"smoke", "short", "paper"}
        assert find_spec(experiment.module) is not None
        assert all("{" not in part for scale in experiment.scales for part in experiment.command(scale, tmp_path))


def test_an_experiment_runs_in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trivial = Experiment("one line", "timeit", {"smoke": "-n 1 -r 1 pass"})
    monkeypatch.setitem(EXPERIMENTS, "trivial", trivial)  # type: ignore[arg-type]
    assert main(["reproduce", "trivial", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "trivial-smoke").is_dir()
    assert main(["reproduce", "trivial", "--scale", "paper", "--out", str(tmp_path)]) != 0
