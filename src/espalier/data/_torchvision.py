"""One place that imports torchvision, also where its wheel was built for CUDA and torch for the CPU."""

import importlib
import sys
from types import ModuleType

from torch.library import Library

__all__ = ["import_torchvision"]

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[Library] = []  # a schema lives as long as its library


def import_torchvision() -> ModuleType:
    """The `torchvision` package, usable for datasets, transforms and classification models.

    >>> import_torchvision().datasets.CIFAR10.__name__
    'CIFAR10'

    The registry's wheel is built for CUDA. Beside a CPU-only torch its operators do not load, and its import
    stops with "operator torchvision::nms does not exist"; with the two schemas defined, it goes on.
    Raises ImportError, which says what to install, where torchvision is missing.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        raise ImportError("this needs torchvision: pip install 'espalier[data]'") from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # half imported
    library = Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)
    return importlib.import_module("torchvision")
