"""The segment graph as a figure: what can go, and what goes."""

from collections.abc import Iterable, Mapping

from espalier.report.figures import Figure, Subject
from espalier.space.search_space import SearchSpace

_WORDS = {
    "candidate": "removable",
    "removed": "redundant: removed",
    "idle": "nothing rests on it any more",
}


def segment_figure(space: SearchSpace, removed: Iterable[str] = (), title: str = "Segment graph") -> Figure:
    """The segments; structures are candidates, those in ``removed`` are marked as redundant.

    Segments that no output rests on without the removed ones are idle.
    """
    gone: Mapping[int, str] = {i: name for name in removed for i in space[name].segments}
    candidates = {i for structure in space.structures for i in structure.segments}
    live = space.validity.live(gone) if gone else set(range(len(space.graph)))
    subject = Subject(space.trace)
    vertices = []
    for segment in space.graph:
        status = "candidate" if segment.index in candidates else ""
        if segment.index in gone:
            status = "removed"
        elif segment.index not in live:
            status = "idle"
        words = _WORDS.get(status) or f"stays: {space.kept.get(segment.name, 'part of the network')}"
        vertices.append(subject.run(segment.name, segment.nodes, status, words))
    return subject.figure(title, [segment.nodes for segment in space.graph], vertices)
