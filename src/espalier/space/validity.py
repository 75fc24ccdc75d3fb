"""Which sets of structures may go together and leave a working network."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from espalier.graph.constants import Constant
from espalier.graph.segments import SegmentGraph


@dataclass(frozen=True, eq=False)
class Validity:
    """Decides on sets of removed segments, in O(V + E) each.

    A removal is valid if every joint vertex that an output still rests on keeps an input, and no product on
    the way vanishes. Since removable segments end in joint vertices only, inputs and outputs then stay
    connected and every output is kept.

    ``constant(segment)`` is what a removed segment yields; ``products`` are the joint vertices that multiply.
    """

    graph: SegmentGraph
    products: frozenset[int]
    constant: Callable[[int], Constant]

    def live(self, removed: Collection[int]) -> set[int]:
        """Segments that some output still rests on."""
        pending = [s.index for s in self.graph if s.feeds_output]
        found: set[int] = set()
        while pending:
            index = pending.pop()
            if index not in found and index not in removed:
                found.add(index)
                pending += self.graph[index].incoming
        return found

    def explain(self, removed: Mapping[int, str]) -> str:
        """'' if the removal of these segments (index → structure's name) is valid, else the reason."""
        for index in sorted(self.live(removed)):
            segment = self.graph[index]
            if not segment.joint:
                continue
            gone = [i for i in segment.incoming if i in removed]
            if not gone:
                continue
            if len(gone) == len(segment.incoming) and not segment.reads_input:
                names = ", ".join(f"'{removed[i]}'" for i in gone)
                return (
                    f"the joint vertex '{segment.name}' keeps no input: all that enter it are removed ({names}). "
                    f"Keep one of them."
                )
            if index in self.products:
                for i in gone:
                    if self.constant(i).is_zero:
                        return (
                            f"the product '{segment.name}' vanishes: '{removed[i]}' yields zero once it is removed, "
                            f"and the output rests on the product. Remove what follows the product as well, "
                            f"or keep '{removed[i]}'."
                        )
        return ""
