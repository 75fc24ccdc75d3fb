"""Sub-networks on disk: safetensors with the architecture in the header, and ONNX. Nothing is ever unpickled."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils import _pytree as pytree

from espalier.architecture import from_json, to_json
from espalier.errors import EspalierError, FormatError
from espalier.modes import evaluating

_FORMAT = "espalier.module.1"


def save(module: nn.Module, path: str | Path) -> None:
    """Write a module, weights and architecture, to one safetensors file.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "small.espalier"
    >>> save(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), path)
    >>> load(path)[0].out_features
    2

    The file is written beside ``path`` first and then moved, so that an interrupted call leaves no half file.
    Raises :class:`FormatError` for a module with hooks, or with attributes that only pickle could save.
    """
    tensors: dict[str, torch.Tensor] = {}
    architecture = json.dumps(to_json(module, tensors), separators=(",", ":"))
    stored = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    header = {"format": _FORMAT, "architecture": architecture, "digest": _digest(architecture, stored)}
    path = Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    try:
        save_file(stored, temporary, metadata=header)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(path: str | Path, allow: Collection[str] = ()) -> nn.Module:
    """Read what :func:`save` wrote: an ordinary module, ready to run or to train further.

    Classes are looked up in torch, torchvision, timm and transformers; ``allow`` names further packages that you
    trust. Raises :class:`FormatError` for a file that is truncated, has been changed, or is of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise FormatError(f"{path}: there is no such file.") from error
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is truncated or no espalier file: {error}") from error
    if header.get("format") != _FORMAT:
        raise FormatError(f"{path} holds tensors, but no module that espalier.save wrote.")
    if header.get("digest") != _digest(header["architecture"], tensors):
        raise FormatError(f"{path} is damaged or was changed after it was written: its digest does not match.")
    try:
        return from_json(json.loads(header["architecture"]), tensors, allow)
    except EspalierError:
        raise
    except Exception as error:
        raise FormatError(f"{path}: the architecture cannot be rebuilt ({type(error).__name__}: {error}).") from error


def _digest(architecture: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(architecture.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def export_onnx(
    module: nn.Module,
    args: tuple[Any, ...] | torch.Tensor,
    path: str | Path,
    kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Write ``module`` in eval mode as ONNX, with a free batch dimension where the module allows it.

    Needs the extra ``onnx`` (``pip install espalier[onnx]``). Raises :class:`FormatError` if the exporter fails.
    """
    args = (args,) if isinstance(args, torch.Tensor) else tuple(args)
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim]
    shapes: Any = torch.export.ShapesCollection()
    for tensor in tensors:
        if tensor.shape[0] > 1:
            shapes[tensor] = {0: torch.export.Dim.AUTO}
    try:
        with evaluating(module):
            exported = torch.export.export(module, args, dict(kwargs or {}), dynamic_shapes=shapes, strict=False)
            with _silent("torch.onnx"):  # which of its optional packages are missing is nobody's concern here
                program = torch.onnx.export(exported, dynamo=True, verbose=False)
            assert program is not None
            program.save(str(path))
    except ImportError as error:
        raise FormatError(
            f"ONNX export needs packages that are not installed ({error}): pip install espalier[onnx]."
        ) from error


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    loggers = [log for key, log in logging.root.manager.loggerDict.items() if key.startswith(name)]
    known = [(log, log.level) for log in (*loggers, logging.getLogger(name)) if isinstance(log, logging.Logger)]
    for logger, _ in known:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in known:
            logger.setLevel(level)
