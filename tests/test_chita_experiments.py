"""The networks of the tables load their checkpoints, and a cell of the table can be computed and resumed."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from espalier.curvature.layout import WeightLayout
from espalier.experiments import chita as experiment
from espalier.experiments.chita_gradual import Short, Stairs, gradual
from espalier.select.multistage import StageOptions

# Images and dense checkpoints are too large for the repository; CI unpacks them and sets ESPALIER_DATA.
needs_data = pytest.mark.skipif(
    "ESPALIER_DATA" not in os.environ,
    reason="not in the repository: ESPALIER_DATA names no folder of MNIST and CIFAR-10",
)


@needs_data
def test_mlpnet_checkpoint_scores_what_its_card_says():
    task = experiment.load_task("mlpnet")
    assert experiment.accuracy(task.model, task.judge) == pytest.approx(93.97, abs=0.02)
    assert WeightLayout.of(task.model, task.prunable).numel == 32_360
    assert len(task.train[0]) == 50_000


@needs_data
def test_resnet20_checkpoint():
    task = experiment.load_task("resnet20", "held-out")
    assert WeightLayout.of(task.model, task.prunable).numel == 268_336
    some = task.judge[0][:500], task.judge[1][:500]
    assert experiment.accuracy(task.model, some) > 90


@needs_data
def test_cells_are_written_once(tmp_path):
    out = tmp_path / "cells.jsonl"
    for _ in range(2):
        experiment.run("mlpnet", out, ("magnitude",), (0,), (0.5, 0.98), "held-out")
    lines = out.read_text().splitlines()
    assert len(lines) == 2
    text = experiment.table(out)
    assert "| magnitude |" in text
    assert "*93.93*" in text


@needs_data
def test_gradual_run_stops_and_goes_on_bit_by_bit(tmp_path):
    recipe = Short((0.8, 0.9), 0.5, (2, 1), (2, 1), images=96, batch=32, n=20, m=2, judged=64)
    models = []
    for folder, stops in (("once", (None,)), ("often", (1, 1, None))):
        for stop in stops:
            task = experiment.load_task("resnet20")
            (tmp_path / folder).mkdir(exist_ok=True)
            model = gradual(task, "exchange", tmp_path / folder / "exchange-0", 0, recipe, stop)
        models.append(model.state_dict())
    assert all(models[0][name].equal(value) for name, value in models[1].items())
    lines = [json.loads(line) for line in (tmp_path / "often" / "exchange-0.jsonl").read_text().splitlines()]
    assert [line["zeros"] for line in lines if "target" in line] == [268_336 - 53_667, 268_336 - 26_833]


def test_stairs_reach_every_target():
    stairs = Stairs(Short())
    aims = [stairs.sparsity(stairs.event(epoch)) for epoch in range(25) if stairs.event(epoch) is not None]
    assert aims == sorted(aims)
    assert len(aims) == 12
    assert {0.5, 0.9, 0.95, 0.98} <= {round(a, 12) for a in aims}


def test_missing_data_is_said(monkeypatch):
    monkeypatch.delenv("ESPALIER_DATA", raising=False)
    with pytest.raises(RuntimeError, match="set ESPALIER_DATA"):
        experiment.load_task("mlpnet")


def test_paths_pass_through_the_table():
    for network, settings in experiment.SETTINGS.items():
        assert {"chita++", "ours"} <= set(settings.path) <= set(settings.staged)
        for path in settings.path.values():
            assert list(path) == sorted(path)
            assert set(experiment.SPARSITIES[network]) <= set(path)


def test_table_shows_mean_and_standard_error(tmp_path):
    out = Path(tmp_path) / "cells.jsonl"
    cell = {"network": "mlpnet", "method": "ours", "sparsity": 0.5, "objective": 1, "cpu_seconds": 2}
    out.write_text("".join(json.dumps({**cell, "accuracy": a}) + "\n" for a in (90.0, 92.0)))
    assert "| ours | 91.00 (1.00) |" in experiment.table(out)


@needs_data
def test_stages_on_photographs_stop_and_go_on(tmp_path, monkeypatch):
    task = experiment.load_task("resnet20", "held-out")
    task = replace(task, judge=(task.judge[0][:250], task.judge[1][:250]))
    options = StageOptions(1, "cubic", 8, 2, 0.1, True, "exchange", drop_dead=False, recalibrate=20)
    path, state = (0.2, 0.3, 0.4), tmp_path / "state.pt"
    whole = list(experiment._stage_by_stage(task, [(s, options) for s in path], list(path), 0, state))
    state.unlink()
    run = experiment._stage_by_stage(task, [(s, options) for s in path], list(path), 0, state)
    first = [next(run), next(run)]
    run.close()  # stopped before the second stage is written down
    rest = list(experiment._stage_by_stage(task, [(s, options) for s in path], list(path), 0, state))
    assert len(rest) == 2
    for a, b in zip(whole, [first[0], *rest], strict=True):
        assert a["objective"] == b["objective"]
        assert a["accuracy"] == b["accuracy"]
