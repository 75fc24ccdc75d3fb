"""What stays."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from espalier.errors import FormatError

_FORMAT = "espalier.solution.2"
_BYTES = "espalier.solution.1"  # a mask took a byte per weight


@dataclass(frozen=True)
class Solution:
    """The outcome of a search: what goes, what stays, and where it came from.

    ``removed`` are names of structures, in the order in which they were chosen. ``masks`` maps parameter names
    to boolean tensors of what stays, for methods at weight and kernel level. ``fingerprint`` names the search
    space; another model's space refuses the solution. ``provenance`` says which method made it, how, and what
    it costs.

    >>> Solution(removed=("conv2-bn2",), fingerprint="0f").removed
    ('conv2-bn2',)
    """

    removed: tuple[str, ...]
    fingerprint: str
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the masks, one bit per weight, and the rest as JSON in its header.

        The file is written beside ``path`` first and then moved: an interrupted call leaves no half file.
        """
        header = {
            "format": _FORMAT,
            "removed": list(self.removed),
            "fingerprint": self.fingerprint,
            "provenance": dict(self.provenance),
            "shapes": {name: list(mask.shape) for name, mask in self.masks.items()},
        }
        tensors = {name: _packed(mask) for name, mask in self.masks.items()}
        path = Path(path)
        temporary = path.parent / f".{path.name}.{os.getpid()}"
        try:
            save_file(tensors, temporary, metadata={"espalier": json.dumps(header)})
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | Path) -> "Solution":
        """Read what :meth:`save` wrote. Raises :class:`FormatError`; never unpickles."""
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["espalier"])
                if header["format"] not in (_FORMAT, _BYTES):
                    raise FormatError(f"{path}: written in the format {header['format']!r}, expected {_FORMAT!r}.")
                masks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if header["format"] == _BYTES:
                masks = {name: mask.to(torch.bool) for name, mask in masks.items()}
            else:
                masks = {name: _unpacked(mask, header["shapes"][name]) for name, mask in masks.items()}
            return cls(tuple(header["removed"]), header["fingerprint"], masks, header["provenance"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path} is not a saved solution, or is damaged: {error}") from error


def _packed(mask: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.packbits(mask.detach().cpu().bool().numpy().reshape(-1)))


def _unpacked(bits: torch.Tensor, shape: list[int]) -> torch.Tensor:
    values = np.unpackbits(bits.numpy(), count=prod(shape))
    return torch.from_numpy(values).to(torch.bool).reshape(shape)
