"""The one trainer of all recipes: seeded, resumable, on any device, alone or under torchrun."""

import json
import os
import platform
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from espalier.construct import construct
from espalier.data import Batches, Dataset
from espalier.errors import EspalierError
from espalier.experiments.config import Run
from espalier.experiments.logs import Log
from espalier.experiments.methods import make_optimizer, nearest
from espalier.experiments.networks import build
from espalier.experiments.ranks import Team
from espalier.experiments.splits import Splits, shrink, splits
from espalier.export import save
from espalier.space.cost import count_macs, count_params
from espalier.space.search_space import search_space
from espalier.sparsify.loop import HalfSpace

__all__ = ["Training", "is_done", "machine", "train"]

_LAYOUT = torch.channels_last


class Training:
    """One run, from its configuration to its result. ``folder`` holds its log, checkpoint, sub-network and result."""

    def __init__(self, run: Run, folder: Path, team: Team, console: Console | None = None) -> None:
        self.run, self.folder, self.team = run, folder, team
        self.console = console or Console(quiet=True)
        self.splits: Splits = splits(run)
        shape, classes = self.splits.train.shape, self.splits.train.classes
        torch.manual_seed(run.seed)
        model = build(run.network, run.width, shape[0], classes, self.splits.size)
        model = model.to(team.device).to(memory_format=_LAYOUT)  # type: ignore[call-overload]
        self.example = torch.zeros(2, shape[0], self.splits.size, self.splits.size, device=team.device)
        self.space = search_space(model, (self.example,), parameterless=run.parameterless)
        self.network: nn.Module = self.space.model
        self.batches: Batches = self.splits.batches(run, team.device, team.rank, team.world)
        self.per_epoch = len(self.batches)
        self.steps = max(3, round(run.epochs * self.per_epoch))
        self.search_steps = run.phases(self.steps)[0]
        self.optimizer = make_optimizer(run, self.space, self.network, self.steps)
        self.step, self.seconds = 0, 0.0
        self.removed: tuple[str, ...] | None = None  # set once the sub-network is trained on
        self.refused = ""

    # The loop.

    def go(self, stop_at: int | None = None, checkpoint_s: float = 30.0) -> None:
        """Train to the end, or to ``stop_at`` (as a kill would)."""
        resumed = self._resume()
        if not resumed and self.run.shared:
            self._start_shared(checkpoint_s)
        log = Log(self.folder, self.step) if self.team.leads else None
        called, began, saved = self.team.wrap(self.network), time.perf_counter(), time.perf_counter()
        before, last = self.seconds, min(self.steps, self.steps if stop_at is None else stop_at)
        loss, every = torch.zeros(()), max(1, self.steps // 40)
        self.network.train()
        with Progress(console=self.console, transient=True) as display:
            task = display.add_task(self.run.name, total=last, completed=self.step)
            while self.step < last and not self.refused:
                for images, labels in self.batches:
                    loss = self._one_step(called, images, labels)
                    self.seconds = before + time.perf_counter() - began
                    if self.step % every == 0 and log is not None:
                        log.write(self.step, **self._state(), loss=round(float(loss), 5))
                    if self._may_shrink():
                        self._shrink()
                        called = self.team.wrap(self.network)
                    display.update(task, completed=self.step)
                    if self.step >= last or self.refused:
                        break
                    if time.perf_counter() - saved > checkpoint_s:
                        self.checkpoint()
                        saved = time.perf_counter()
                if log is not None and not self.refused:
                    accuracy = self.accuracy(self.network, self.splits.validation)
                    log.write(self.step, validation=accuracy)
                elif not self.refused:
                    self.accuracy(self.network, self.splits.validation)
        if log is not None:
            log.close()
        self.checkpoint()
        self.team.wait()

    def _one_step(self, called: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        rate = self.run.rate(self.step, self.per_epoch, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        images = shrink(images, self.splits.size).contiguous(memory_format=_LAYOUT)
        self.optimizer.zero_grad()
        loss = cross_entropy(called(images), labels)
        loss.backward()
        if self.run.clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.run.clip)
        self.optimizer.step()
        self.step += 1
        if self.step == self.search_steps:
            self._look_at_marked()
        return loss.detach()

    def _look_at_marked(self) -> None:
        """What cannot become a network is refused here, with the space's reason, and not trained on."""
        if isinstance(self.optimizer, HalfSpace):
            self.refused = self.space.explain(self.optimizer.redundant)

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"lr": self.optimizer.param_groups[0]["lr"], "seconds": round(self.seconds, 2)}
        if isinstance(self.optimizer, HalfSpace):
            state |= {"phase": self.optimizer.phase, "zero": self.optimizer.zero_structures()}
        return state

    @torch.no_grad()
    def accuracy(self, network: nn.Module, data: Dataset) -> float:
        """Per cent of right predictions in eval mode, over all ranks."""
        network.eval()
        right = seen = 0
        rows = range(self.team.rank, len(data), self.team.world)
        for start in range(0, len(rows), 250):
            images, labels = data.tensors(list(rows[start : start + 250]))
            images = (
                shrink(images, self.splits.size, self.run.crop).to(self.team.device).contiguous(memory_format=_LAYOUT)
            )
            right += int((network(images).argmax(1).cpu() == labels).sum())
            seen += len(labels)
        network.train()
        right, seen = self.team.total(right, seen)
        return round(100.0 * right / seen, 3)

    # Going on with the sub-network.

    def _may_shrink(self) -> bool:
        done = isinstance(self.optimizer, HalfSpace) and self.optimizer.phase == "done"
        return self.run.construct_early and self.removed is None and done and not self.refused

    def _shrink(self) -> None:
        solution = self.optimizer.solution()  # type: ignore[attr-defined]
        self._become(solution.removed)

    def _become(self, removed: tuple[str, ...]) -> None:
        """From here on the network is the sub-network, and plain SGD trains it."""
        self.removed = removed
        small = construct(self.space, self.space.solution(removed))
        self.network = small.to(memory_format=_LAYOUT).train()  # type: ignore[call-overload]
        self.optimizer = make_optimizer(replace(self.run, method="full"), self.space, self.network, self.steps)

    # Stopping and going on.

    def checkpoint(self) -> None:
        """Write all that a bit-identical continuation needs; the old file stays until the new one is whole."""
        if self.team.leads:
            _save(self._snapshot(), self.folder / "checkpoint.pt")

    def _snapshot(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "removed": None if self.removed is None else list(self.removed),
            "refused": self.refused,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "random": torch.get_rng_state(),
        }

    def _resume(self) -> bool:
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return False
        saved = torch.load(path, map_location=self.team.device, weights_only=True)
        if saved["removed"] is not None:
            self._become(tuple(saved["removed"]))
        self.network.load_state_dict(saved["network"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.batches.load_state_dict(saved["batches"])
        torch.set_rng_state(saved["random"].cpu())
        self.step, self.seconds, self.refused = saved["step"], saved["seconds"], saved["refused"]
        return True

    def _start_shared(self, checkpoint_s: float) -> None:
        """Begin where plain training stands shortly before the end of the search phase.

        Until then, every method takes the base optimizer's own steps, and only looks at the saliency.
        """
        stop = max(1, self.search_steps - self.run.watched)
        plain = replace(self.run, method="full", sparsity=None, params=None, shared=False, projection=0.0, watched=50)
        path = self.folder.parent / f"shared-{plain.name}-{plain.digest}" / f"{stop}.pt"
        if not path.exists():
            first = Training(plain, path.parent, self.team, self.console)
            first.go(stop, checkpoint_s)
            if self.team.leads:
                named = {n: first.optimizer.state[p] for n, p in first.network.named_parameters()}
                _save({**first._snapshot(), "named": named}, path)
            self.team.wait()
        saved = torch.load(path, map_location=self.team.device, weights_only=True)
        self.network.load_state_dict(saved["network"])
        for name, parameter in self.network.named_parameters():
            self.optimizer.state[parameter] = saved["named"][name]
        if isinstance(self.optimizer, HalfSpace):
            self.optimizer.steps_done = stop
        self.batches.load_state_dict(saved["batches"])
        torch.set_rng_state(saved["random"].cpu())
        self.step, self.seconds = stop, saved["seconds"]

    # The end.

    def result(self) -> dict[str, Any]:
        """Build the sub-network, and look at the test set, once."""
        full = self.space.cost()
        line: dict[str, Any] = {"name": self.run.name, "run": asdict(self.run), "machine": machine(self.team)}
        line |= {"steps": self.steps, "seconds": round(self.seconds, 1), "structures": len(self.space)}
        line |= {"full_params": full.params, "full_macs": full.macs}
        if self.run.method != "full":
            line["note"] = nearest(self.run, self.space)[1]
        if self.refused:
            return line | {"refused": self.refused}
        small, removed = self.network, self.removed or ()
        if self.removed is None and self.run.method != "full":
            solution = self.optimizer.solution()  # type: ignore[attr-defined]
            small, removed = construct(self.space, solution), solution.removed
            line["zeroed_validation"] = self.accuracy(self.space.masked(solution), self.splits.validation)
        if self.team.leads and self.run.method != "full":
            save(small, self.folder / "small.espalier")
        return line | {
            "removed": list(removed),
            "params": count_params(small),
            "macs": count_macs(small, (self.example,)),
            "validation": self.accuracy(small, self.splits.validation),
            "test": self.accuracy(small, self.splits.test),
        }


def train(
    run: Run, root: Path, team: Team, console: Console | None = None, checkpoint_s: float = 30.0
) -> dict[str, Any]:
    """Do one run below ``root``, or go on with it, or read its result if it is done."""
    folder = _folder(run, root)
    path = folder / "result.json"
    if is_done(run, root):
        return json.loads(path.read_text())
    training = Training(run, folder, team, console)
    training.go(checkpoint_s=checkpoint_s)
    line = training.result()
    if team.leads:
        path.with_suffix(".part").write_text(json.dumps(line, indent=1) + "\n")
        os.replace(path.with_suffix(".part"), path)
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    team.wait()
    return line


def is_done(run: Run, root: Path) -> bool:
    """Whether the run's result lies below ``root``."""
    return (_folder(run, root) / "result.json").exists()


def _folder(run: Run, root: Path) -> Path:
    return root / f"{run.name}-{run.digest}"


def machine(team: Team) -> dict[str, Any]:
    """Where and when."""
    name = platform.machine()
    if team.device.type == "cuda":
        name = torch.cuda.get_device_name(team.device)
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ranks": team.world,
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _save(value: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(value, part)
    try:
        os.replace(part, path)
    except OSError as error:
        raise EspalierError(f"cannot write {path}: {error}") from error
