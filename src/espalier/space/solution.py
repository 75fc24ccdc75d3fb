"""What stays."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from espalier.errors import FormatError

_FORMAT = "espalier.solution.1"


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
        """Write one safetensors file: the masks, and the rest as JSON in its header."""
        header = {
            "format": _FORMAT,
            "removed": list(self.removed),
            "fingerprint": self.fingerprint,
            "provenance": dict(self.provenance),
        }
        tensors = {name: mask.to(torch.uint8).contiguous() for name, mask in self.masks.items()}
        save_file(tensors, path, metadata={"espalier": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> "Solution":
        """Read what :meth:`save` wrote. Raises :class:`FormatError`; never unpickles."""
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["espalier"])
                masks = {name: file.get_tensor(name).to(torch.bool) for name in file.keys()}  # noqa: SIM118
            if header["format"] != _FORMAT:
                raise FormatError(f"{path}: written in the format {header['format']!r}, expected {_FORMAT!r}.")
            return cls(tuple(header["removed"]), header["fingerprint"], masks, header["provenance"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path} is not a saved solution, or is damaged: {error}") from error
