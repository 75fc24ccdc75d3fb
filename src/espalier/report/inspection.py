"""What ``espalier inspect`` does: anybody's model, named by a path, to its search space."""

import contextlib
import importlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from espalier.errors import EspalierError
from espalier.report.console import space_table
from espalier.report.draw import draw
from espalier.report.figures import trace_figure
from espalier.report.html import Report, write_text
from espalier.report.operators import quantity
from espalier.report.segment_figures import segment_figure
from espalier.space.search_space import search_space

_TYPES = {
    "float": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32,
    "float64": torch.float64, "int": torch.int64, "int32": torch.int32, "int64": torch.int64,
    "bool": torch.bool, "uint8": torch.uint8,
}  # fmt: skip


def inspect(
    factory: str,
    inputs: Sequence[str],
    levels: Sequence[str],
    keep: Sequence[str],
    out: Path,
    svg: bool,
    console: Console,
) -> None:
    """Print the search space of the model that ``factory`` makes, and write its drawings to ``out``."""
    args, kwargs = parse_inputs(inputs)
    model = load_model(factory)
    with console.status(f"Tracing {type(model).__name__} and looking for structures"), _quiet():
        space = search_space(model, args, kwargs, levels=levels, keep=keep)
        summary, cost = space.summary(), space.cost()
    console.print(space_table(summary, limit=40))
    name = type(model).__name__
    words = (
        f"{name}: {quantity(cost.params)} parameters, {quantity(cost.macs)} MACs per example; "
        f"{len(space)} of {len(space.graph)} segments can be removed."
    )
    console.print("", words)
    figures = [trace_figure(space.trace), segment_figure(space)]
    captions = ("every operator", "what lives or goes as one; green can go")
    Report(title=f"{name}: search space", lead=words, figures=figures, captions=captions, summary=summary).write(out)
    written = [out]
    if svg:
        for figure, kind in zip(figures, ("trace", "segments"), strict=True):
            written.append(out.with_name(f"{out.stem}-{kind}.svg"))
            write_text(written[-1], draw(figure))
    console.print(f"Wrote {', '.join(map(str, written))}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch prints of its own accord when an export fails; the error says it in fewer words."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def parse_inputs(texts: Sequence[str]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Example inputs from their descriptions: (positional, keyword).

    >>> args, kwargs = parse_inputs(["1x3x8x8", "mask=1x16:bool"])
    >>> args[0].shape, kwargs["mask"].dtype
    (torch.Size([1, 3, 8, 8]), torch.bool)
    """
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for text in texts:
        name, _, rest = text.rpartition("=")
        shape, _, kind = rest.partition(":")
        try:
            sizes = [int(size) for size in shape.lower().replace(",", "x").split("x")]
        except ValueError:
            sizes = [0]
        if min(sizes) < 1 or ("=" in text and not name.isidentifier()):
            raise EspalierError(f"--input {text}: a shape is sizes joined by x, the batch first, like 1x3x32x32.")
        if kind and kind not in _TYPES:
            raise EspalierError(f"--input {text}: there is no type '{kind}'; there are {', '.join(_TYPES)}.")
        tensor = _example(sizes, _TYPES[kind or "float"])
        if name:
            kwargs[name] = tensor
        else:
            args.append(tensor)
    return tuple(args), kwargs


def _example(sizes: Sequence[int], kind: torch.dtype) -> Tensor:
    if kind.is_floating_point:
        return torch.randn(*sizes).to(kind)
    return torch.ones(*sizes, dtype=kind)


def load_model(factory: str) -> nn.Module:
    """The model that ``package.module:name`` is or makes. Raises :class:`EspalierError` with what to mend."""
    module_name, colon, name = factory.partition(":")
    if not colon or not module_name or not name:
        raise EspalierError(
            f"'{factory}' is no path to a model: write package.module:name, like torchvision.models:resnet18."
        )
    found: Any = _import(module_name)
    for part in name.split("."):
        if not hasattr(found, part):
            close = [n for n in dir(found) if n.lower().startswith(part[:3].lower()) and not n.startswith("_")][:8]
            hint = f" It has {', '.join(close)}." if close else ""
            raise EspalierError(f"module '{module_name}' has no '{name}'.{hint}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise EspalierError(
            f"'{factory}' is of type {type(found).__name__}: name a function or class that makes a torch.nn.Module."
        )
    try:
        model = found()
    except Exception as error:
        raise EspalierError(
            f"'{factory}' was called without arguments and raised "
            f"{type(error).__name__}: {error}{_raised_at(error)}\n"
            "If it needs arguments, name a function of your own that gives them."
        ) from error
    if not isinstance(model, nn.Module):
        raise EspalierError(f"'{factory}' made a {type(model).__name__}, not a torch.nn.Module.")
    return model


def _import(name: str) -> Any:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(f"{missing}."):
            raise EspalierError(f"there is no module '{missing}', neither installed nor in {here}.") from error
        raise EspalierError(f"module '{name}' needs '{missing}', which is not installed.") from error
    except Exception as error:
        raise EspalierError(f"importing '{name}' raised {type(error).__name__}: {error}{_raised_at(error)}") from error


def _raised_at(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename != __file__ and "importlib" not in f.filename]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
