"""What every search returns, and how it is written down."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from espalier.nas.genotype import Genotype
from espalier.nas.loop import Line


@dataclass(frozen=True)
class Found:
    """A search's outcome.

    Fields:
        genotype: what it found. params: of the derived network at the target's size.
        scores: accuracies in per cent of the supernet before and after it is discretised, and the like.
        cost: steps, images and seconds that the search took.
        lines: the log of the training that led there. notes: what a reader should know.
    """

    genotype: Genotype
    params: int
    scores: Mapping[str, float]
    cost: Mapping[str, float]
    lines: Sequence[Line] = ()
    notes: Sequence[str] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Everything but the log."""
        return {
            "genotype": self.genotype.to_json(),
            "params": self.params,
            "scores": dict(self.scores),
            "cost": dict(self.cost),
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], lines: Sequence[Line] = ()) -> "Found":
        """The inverse of :meth:`to_json`."""
        genotype = Genotype.from_json(data["genotype"])
        return cls(genotype, data["params"], data["scores"], data["cost"], lines, data["notes"])
