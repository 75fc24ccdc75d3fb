"""A training loop that survives being killed: checkpoints, a log of JSON lines, and several ranks."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from espalier.data import Batches
from espalier.errors import FormatError

Line = dict[str, Any]


class Stepper(Protocol):
    """What :func:`advance` drives. ``step`` does one step and may return a line for the log."""

    steps: int

    @property
    def done(self) -> int: ...
    def step(self) -> Line | None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class Folder:
    """Where a run lies; only the first rank writes. ``tell`` is called with every line of the log."""

    path: Path
    tell: Callable[[Line], None] = lambda line: None
    save_every: float = 60.0
    lines: list[Line] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        if rank() == 0:
            self.path.mkdir(parents=True, exist_ok=True)

    def below(self, name: str) -> "Folder":
        """The folder of a part of the run."""
        return Folder(self.path / name, self.tell, self.save_every)

    def settings(self, settings: Mapping[str, Any]) -> None:
        """Write the run's settings, or compare them with those that are there.

        Raises :class:`FormatError` where the folder holds a run of other settings.
        """
        file = self.path / "settings.json"
        text = json.dumps(dict(settings), indent=1, sort_keys=True, default=str) + "\n"
        if file.exists():
            old, new = json.loads(file.read_text()), json.loads(text)
            if old != new:
                differ = [k for k in {*old, *new} if old.get(k) != new.get(k)]
                raise FormatError(
                    f"{self.path} holds a run with another {', '.join(sorted(differ))}: give the same settings to go "
                    f"on with it, or another folder."
                )
        elif rank() == 0:
            write_whole(file, text.encode())

    def log(self, line: Line) -> None:
        """Append one line to log.jsonl."""
        self.lines.append(line)
        self.tell(line)
        if rank() == 0:
            with (self.path / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        """Write a file of tensors and plain values, whole or not at all."""
        if rank() == 0:
            part = self.path / f"{name}.part"
            torch.save(dict(state), part)
            os.replace(part, self.path / name)

    def load(self, name: str) -> dict[str, Any] | None:
        """Read it back, if it is there; nothing but tensors and plain values is ever unpickled."""
        file = self.path / name
        if not file.exists():
            return None
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise FormatError(f"{file} is damaged: {error}. Delete it to begin this run anew.") from error

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """Write a JSON file whole."""
        if rank() == 0:
            write_whole(self.path / name, (json.dumps(dict(data), indent=1) + "\n").encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file, if it is there."""
        file = self.path / name
        return json.loads(file.read_text()) if file.exists() else None

    def write_lines(self, name: str, lines: Iterable[Line]) -> None:
        """Write a file of JSON lines whole."""
        if rank() == 0:
            write_whole(self.path / name, "".join(json.dumps(line) + "\n" for line in lines).encode())

    def read_lines(self, name: str) -> list[Line]:
        """A file of JSON lines; nothing, if it is not there."""
        file = self.path / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def advance(stepper: Stepper, folder: Folder) -> None:
    """Do all steps that are left, from the last checkpoint if there is one.

    Random numbers depend on (seed, rank, step) alone, so that the result is the same, bit for bit, however
    often the run was stopped.
    """
    state = folder.load("checkpoint.pt")
    if state is not None:
        stepper.load_state_dict(state["stepper"])
        folder.lines = list(state["lines"])
        if rank() == 0:
            text = "".join(json.dumps(line) + "\n" for line in folder.lines)
            write_whole(folder.path / "log.jsonl", text.encode())
    elif rank() == 0:
        (folder.path / "log.jsonl").unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
    saved = time.monotonic()
    while stepper.done < stepper.steps:
        line = stepper.step()
        if line is not None:
            folder.log(line)
        if stepper.done == stepper.steps or time.monotonic() - saved >= folder.save_every:
            if rank() == 0:
                folder.save("checkpoint.pt", {"stepper": stepper.state_dict(), "lines": folder.lines})
            saved = time.monotonic()
    if dist.is_initialized():
        dist.barrier()


def endless(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch after batch, epoch after epoch, from where ``batches`` stands."""
    while True:
        yield from batches


def seed_step(seed: int, step: int) -> None:
    """The random numbers of one step of this rank."""
    torch.manual_seed((seed * 1_000_003 + step) * 1_009 + rank())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


# Ranks.


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def join_ranks(device: torch.device) -> bool:
    """Join the processes that torchrun started, if it did; whether this call did it."""
    if dist.is_initialized() or "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return False
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return True


def own_device(name: str) -> torch.device:
    """The device by name; of several GPUs, under torchrun, the rank's own."""
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise FormatError("--device cuda: torch sees no GPU here. Use --device cpu, or install torch for CUDA.")
        if device.index is None and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def wrapped(model: nn.Module, device: torch.device, compiled: bool = False) -> nn.Module:
    """The model as a step calls it: compiled where asked for, and with gradients averaged over ranks."""
    net = torch.compile(model) if compiled else model
    if not dist.is_initialized():
        return net  # type: ignore[return-value]
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(net, device_ids=ids)  # type: ignore[arg-type]
