"""The page of a search: what it found, the norms over time, what it cost."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from espalier.nas.draw import draw_genotype
from espalier.nas.heatmap import heatmap
from espalier.nas.loop import Line
from espalier.nas.recipe import SearchRecipe
from espalier.nas.result import Found
from espalier.report.charts import ticks
from espalier.report.html import write_text
from espalier.report.style import FONT, drawing_rules, variables


def write_report(path: str | Path, recipe: SearchRecipe, found: Found) -> None:
    """Write one HTML file that needs nothing beside it."""
    write_text(path, page(recipe, found))


def page(recipe: SearchRecipe, found: Found) -> str:
    """The page as text."""
    lines = [line for line in found.lines if "norms" in line]
    notes = "".join(f"<p>{escape(note)}</p>" for note in found.notes)
    rows = [("parameters of the derived network", f"{found.params:,}")]
    rows += [(name, f"{value:.2f} %") for name, value in found.scores.items()]
    rows += [(f"search: {name}", f"{value:g}") for name, value in found.cost.items()]
    table = "".join(f'<tr><td>{escape(a)}</td><td class="num">{escape(b)}</td></tr>' for a, b in rows)
    size = f"{recipe.target_cells} cells and {recipe.target_channels} channels"
    body = [
        f"<header><h1>{escape(recipe.method)} on {escape(recipe.space)}</h1><p class='lead'>"
        f"{len(found.genotype.operations())} operations stay; with {size} they have {found.params:,} parameters.</p>"
        f"</header>",
        f"<section><h2>Cells</h2>{draw_genotype(found.genotype)}</section>",
        f"<section><h2>Results</h2>{notes}<div class='scroll'><table>{table}</table></div></section>",
    ]
    if found.lines and "loss" in found.lines[0]:
        body.append(f"<section><h2>Training</h2>{_curve(found.lines)}</section>")
    if lines:
        what = "weight of every operation" if "darts" in recipe.method else "norm of every group"
        body.append(
            f"<section><h2>The {what} over time</h2><p class='muted'>Relative to the first; red is exactly zero.</p>"
            f"{heatmap([line['norms'] for line in lines], [line['step'] for line in lines])}</section>"
        )
    style = variables() + drawing_rules() + files("espalier.report").joinpath("page.css").read_text("utf-8")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(recipe.name)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{style}body{{font-family:{FONT}}} .es{{max-width:100%;height:auto}}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _curve(lines: Sequence[Line]) -> str:
    """Training loss and milliseconds per step against the step."""
    panels = [("training loss", "loss", "curve"), ("milliseconds per step", "step_ms", "curve norm")]
    last = max(line["step"] for line in lines)
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 720 330" role="img">']
    for i, (name, key, kind) in enumerate(panels):
        top, high = 24 + 150 * i, 1.05 * max(line[key] for line in lines)
        parts.append(f'<text class="panel" x="46" y="{top - 6}">{name}</text>')
        for tick in ticks(0, high, 3):
            y = top + 110 * (1 - tick / high)
            parts.append(f'<line class="grid" x1="46" x2="708" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="40" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        points = [(46 + 662 * line["step"] / last, top + 110 * (1 - line[key] / high)) for line in lines]
        parts.append(f'<path class="{kind}" d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>')
    parts += [
        f'<text class="tick" x="{46 + 662 * t / last:.1f}" y="322" text-anchor="middle">{t:g}</text>'
        for t in ticks(0, last)
    ]
    return "".join([*parts, "</svg>"])
