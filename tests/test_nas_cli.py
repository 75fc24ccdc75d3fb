"""``espalier nas`` from the shell's side, and the search on two ranks."""

import json
import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from espalier.cli import main
from espalier.data import Batches, load
from espalier.nas.genotype import Genotype
from espalier.nas.group_search import GroupSearch, GroupSettings
from espalier.nas.loop import Folder, advance
from espalier.nas.space import uniform


def test_search_train_and_show(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "found"
    arguments = ["--space", "s2", "--data", "digits", "--scale", "smoke", "--mu", "0.01", "--target-params", "5.2e6"]
    assert main(["nas", "search", *arguments, "--epochs", "0.5", "--out", str(out)]) == 0
    assert "the target was not met" in " ".join(capsys.readouterr().out.split())
    assert main(["nas", "search", "--space", "s4", "--data", "digits", "--scale", "smoke", "--method", "darts"]) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "runs" / "nas-s4-darts-0-smoke"
    assert "space s4" in printed
    found = Genotype.load(folder / "genotype.json")
    assert len(found.operations()) == 16
    assert "accuracy discretised" in json.loads((folder / "result.json").read_text())["scores"].__str__()
    page = (folder / "report.html").read_text()
    assert page.count("sep conv 3x3</text>") + page.count("noise</text>") >= 16
    assert "normal.0_2.sep_conv_3x3, from step" in page  # the heat map
    file = str(folder / "genotype.json")
    train = ["nas", "train", file, "--data", "digits", "--scale", "smoke", "--epochs", "0.5", "--amp"]
    assert main([*train, "--out", str(tmp_path / "t")]) == 0
    assert "test accuracy" in capsys.readouterr().out
    assert (tmp_path / "t" / "network.espalier").exists()
    assert main(["nas", "show", file, "--draw", str(tmp_path / "cell.svg")]) == 0
    assert "parameters with 36 channels" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "cell.svg").read_text().startswith("<svg")


def test_mistakes_are_told_in_one_line(tmp_path, capsys):
    for arguments, words in (
        (["search", "--space", "s9"], "no space is called 's9'"),
        (["show", str(tmp_path / "none.json")], "neither a file nor a genotype's name"),
        (["train", "darts-v3"], "neither a file nor a genotype's name"),
        (["search", "--scale", "smoke", "--data", "digits", "--device", "cuda"], "torch sees no GPU here"),
        (["search", "--scale", "smoke", "--data", "digits", "--target-params", "1e9"], "ask for fewer"),
    ):
        if "cuda" in arguments and torch.cuda.is_available():
            continue
        assert main(["nas", *arguments, *(["--out", str(tmp_path / "x")] if "search" in arguments else [])]) == 2
        assert words in " ".join(capsys.readouterr().err.split())


def test_a_missing_folder_of_data_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("ESPALIER_DATA", raising=False)
    assert main(["nas", "search", "--space", "s2", "--scale", "smoke", "--out", str(tmp_path / "x")]) == 2
    assert "set ESPALIER_DATA to a folder" in " ".join(capsys.readouterr().err.split())


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = uniform("tiny", ("skip", "sep_conv_3x3"), nodes=2).supernet(4, 3, in_channels=1)
    batches = Batches(load("digits", "train"), 64, rank=rank, world=2)
    settings = GroupSettings(mu=0.6, lr=0.2, patience=3, drop_every=3, norms_every=5)
    search = GroupSearch(model, batches, settings, 30)
    advance(search, Folder(Path(folder) / "run"))
    weights = dict(search.model.named_parameters())
    torch.save({"weights": weights, "removed": search.removed, "zero": search.zero()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_hold_the_same_weights_groups_and_cells(tmp_path: Path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.start_processes(worker, args=(str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first["removed"] == second["removed"] != []
    assert first["zero"] == second["zero"]
    assert set(first["weights"]) == set(second["weights"])
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 6
