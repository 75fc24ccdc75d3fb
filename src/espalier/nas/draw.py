"""Cells as drawings: SVG by this program alone, PNG where a converter is at hand."""

import re
import shutil
import subprocess
from pathlib import Path

from espalier.errors import FormatError
from espalier.nas.genotype import Genotype
from espalier.nas.spaces import space
from espalier.report.draw import draw, draw_beside
from espalier.report.figures import Figure, Vertex
from espalier.report.html import write_text

_CONVERTERS = (
    ("rsvg-convert", ["-o", "{png}", "{svg}"]),
    ("inkscape", ["{svg}", "-o", "{png}"]),
    ("magick", ["{svg}", "{png}"]),
    ("convert", ["{svg}", "{png}"]),
)
_KINDS = {"skip": "shape", "max_pool_3x3": "pool", "avg_pool_3x3": "pool", "noise": "other"}
_NAMES = {"normal": "Normal cell", "reduce": "Reduction cell"}


def cell_figure(genotype: Genotype, kind: str) -> Figure:
    """One kind of cell: its inputs, nodes that sum, and the operations between them."""
    within, edges = space(genotype.space), genotype.edges(kind)
    inputs = ["cell before last", "cell before"] if within.inputs == 2 else ["cell before"]
    nodes = sorted({int(edge.split("_")[1]) for edge in edges})
    sources = {int(edge.split("_")[0]) for edge in edges}
    vertices = [Vertex(name, detail=str(i), kind="io", form="pill") for i, name in enumerate(inputs)]
    at = dict(enumerate(range(len(inputs))))
    for node in nodes:
        at[node] = len(vertices)
        vertices.append(Vertex("+", note=str(node), kind="joint", form="circle", tooltip=f"node {node}"))
    pairs: list[tuple[int, int]] = []
    for edge, names in edges.items():
        source, node = map(int, edge.split("_"))
        for name in names:
            stride = "halves the size" if kind == "reduce" and source < within.inputs else ""
            title, detail = name.replace("_", " "), stride or f"{source} to {node}"
            pairs += [(at[source], len(vertices)), (len(vertices), at[node])]
            vertices.append(Vertex(title, detail=detail, kind=_KINDS.get(name, "weight"), tooltip=f"{name}, {edge}"))
    out = len(vertices)
    if within.stacking == "darts":
        vertices.append(Vertex("‖", note="concat", kind="joint", form="circle", tooltip="the nodes, concatenated"))
        pairs += [(at[node], out) for node in nodes]
    else:
        pairs.append((at[nodes[-1]], out))
    vertices.append(Vertex("output", kind="io", form="pill"))
    pairs = pairs if within.stacking != "darts" else [*pairs, (out, out + 1)]
    used = {v for pair in pairs for v in pair} | {i for i in range(len(inputs)) if i in sources}
    order = [i for i in range(len(vertices)) if i in used]
    place = {old: new for new, old in enumerate(order)}
    edges_of = tuple((place[a], place[b]) for a, b in pairs)
    return Figure(_NAMES[kind], tuple(vertices[i] for i in order), edges_of)


def draw_genotype(genotype: Genotype) -> str:
    """All kinds of cells side by side, as SVG text.

    >>> from espalier.nas.genotype import GENOTYPES
    >>> draw_genotype(GENOTYPES["darts-v2"])[:4]
    '<svg'
    """
    figures = [cell_figure(genotype, kind) for kind in genotype.cells]
    return draw(figures[0]) if len(figures) == 1 else draw_beside(figures, f"Cells found in '{genotype.space}'")


def save_drawing(genotype: Genotype, path: str | Path) -> None:
    """Write the drawing; ``path`` ends in .svg or .png.

    PNG needs rsvg-convert, Inkscape or ImageMagick. Raises :class:`FormatError` without one, and for another
    ending.
    """
    path = Path(path)
    if path.suffix == ".svg":
        write_text(path, draw_genotype(genotype))
        return
    if path.suffix != ".png":
        raise FormatError(f"{path}: a drawing is written as .svg or .png.")
    vector = path.with_suffix(".svg")
    write_text(vector, _plain(draw_genotype(genotype)))
    try:
        for program, arguments in _CONVERTERS:
            if shutil.which(program):
                command = [program, *(a.format(svg=vector, png=path) for a in arguments)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode == 0 and path.exists():
                    return
        raise FormatError(f"{path}: PNG needs rsvg-convert, Inkscape or ImageMagick; write .svg instead.")
    finally:
        vector.unlink(missing_ok=True)


def _plain(svg: str) -> str:
    """The light colours put in place: converters know no custom properties and no dark scheme."""
    style = re.search(r"<style>(.*?)</style>", svg, re.S)
    if style is None:
        return svg
    light, _, rest = style[1].partition("@media")
    colours = dict(re.findall(r"(--[\w-]+):([^;}]+)", light))
    rules = rest[rest.index("}}") + 2 :]
    for kind, body in re.findall(r"\.k-(\w+)\{(.*?)\}", rules):
        own = dict(re.findall(r"(--\w+):([^;}]+)", body))
        paint = f"fill:{own['--fill']};stroke:{own['--stroke']};stroke-width:1.2"
        rules += f".es .k-{kind} rect,.es .k-{kind} circle{{{paint}}}"
    rules = re.sub(r"var\((--[\w-]+)\)", lambda match: colours.get(match[1], "#888"), rules)
    return svg.replace(style[0], f"<style>{rules}</style>")
