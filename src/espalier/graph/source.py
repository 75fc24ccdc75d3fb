"""Where a node comes from, in words that a user can act on."""

import re
import traceback

from torch import fx, nn

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module whose forward made the node ('' for the model itself)."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if not entry[0].startswith("_empty_nn_module_stack")]
    return paths[-1] if paths else ""


def source_line(node: fx.Node) -> str:
    """``file.py:12`` of the call in the user's code, '' if unknown."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return f"{frames[-1][0]}:{frames[-1][1]}" if frames else ""


def where(node: fx.Node) -> str:
    """``module 'layer1.0' (model.py:42)``."""
    path, line = module_path(node), source_line(node)
    return f"module '{path or '<root>'}'" + (f" ({line})" if line else "")


def where_raised(model: nn.Module, error: BaseException) -> tuple[str, str]:
    """(dotted path, ``file.py:12``) of the innermost module of ``model`` in the error's traceback."""
    names = {id(module): name for name, module in model.named_modules()}
    path, line = "", ""
    for frame, lineno in traceback.walk_tb(error.__traceback__):
        owner = id(frame.f_locals.get("self"))
        if owner in names:
            path, line = names[owner], f"{frame.f_code.co_filename}:{lineno}"
    return path, line
