"""A recipe's run under several ranks: all hold one solution and one network, and one of them writes the files."""

import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from espalier.experiments.config import Run
from espalier.experiments.ranks import Team
from espalier.experiments.recipe import smoke
from espalier.experiments.training import Training, train

RUN = replace(smoke(Run("regnet-800m", "cifar10", method="h2spg", sparsity=0.3)), shared=True, construct_early=True)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    team = Team(torch.device("cpu"), rank, 2)
    first = Training(RUN, Path(folder) / "stopped" / "run", team)
    first.go(stop_at=5)
    second = Training(RUN, Path(folder) / "stopped" / "run", team)
    second.go()
    whole = train(RUN, Path(folder) / "whole", team)
    state = {"weights": second.network.state_dict(), "removed": second.removed, "whole": json.dumps(whole)}
    torch.save(state, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_agree_and_resume(tmp_path: Path) -> None:
    mp.start_processes(worker, (str(tmp_path),), nprocs=2, start_method="fork")
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one["removed"] == other["removed"]
    assert one["removed"]
    for name, value in one["weights"].items():
        if "running" not in name and "tracked" not in name:  # statistics are each rank's own until the next step
            assert torch.equal(value, other["weights"][name]), name
    whole = [json.loads(rank["whole"]) for rank in (one, other)]
    assert whole[0]["test"] == whole[1]["test"]
    assert whole[0]["removed"] == whole[1]["removed"] == list(one["removed"])
    assert whole[0]["machine"]["ranks"] == 2
    (result,) = (tmp_path / "whole").glob("regnet*/result.json")
    assert json.loads(result.read_text())["test"] == whole[0]["test"]
