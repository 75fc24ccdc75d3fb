"""Where a node comes from, in words that a user can act on."""

import re
import traceback
from pathlib import Path

import torch
from torch import fx, nn

_TORCH = str(Path(torch.__file__).parent)
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module whose forward made the node ('' for the model itself)."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if not entry[0].startswith("_empty_nn_module_stack")]
    return paths[-1] if paths else ""


def source_line(node: fx.Node) -> str:
    """``file.py:12`` of the call in the user's code, '' if unknown."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not _is_torch(frame[0])] or frames
    return f"{own[-1][0]}:{own[-1][1]}" if own else ""


def where(node: fx.Node) -> str:
    """``module 'layer1.0' (model.py:42)``."""
    path, line = module_path(node), source_line(node)
    return f"module '{path or '<root>'}'" + (f" ({line})" if line else "")


def where_raised(model: nn.Module, error: BaseException) -> tuple[str, str]:
    """(dotted path, ``file.py:12``) of the innermost module of ``model`` in the error's traceback."""
    names = {id(module): name for name, module in model.named_modules()}
    path = own = line = ""
    for frame, lineno in traceback.walk_tb(error.__traceback__):
        first_argument = (*frame.f_code.co_varnames, "self")[0]
        owner = id(frame.f_locals.get(first_argument))
        if owner in names:
            path, line = names[owner], f"{frame.f_code.co_filename}:{lineno}"
            own = own if _is_torch(frame.f_code.co_filename) else line
    return path, own or line


def _is_torch(file: str) -> bool:
    return file.startswith(_TORCH)
