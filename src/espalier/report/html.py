"""The report: one HTML file that needs nothing beside it."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path

import torch

from espalier.report.charts import saliency_chart, training_chart
from espalier.report.draw import draw
from espalier.report.figures import Figure
from espalier.report.results import Check, History, Measurement
from espalier.report.style import FONT, drawing_rules, variables
from espalier.report.tables import before_and_after, check_rows
from espalier.space.summary import Summary


@dataclass(frozen=True)
class Report:
    """What the page shows; each part is left out where it is empty.

    ``networks`` maps the names of two networks (before, after) to their measurements, ``figures`` are drawn
    in their order, ``saliency`` maps structures to scores and ``removed`` names those that went.
    """

    title: str
    lead: str
    figures: Sequence[Figure] = ()
    captions: Sequence[str] = ()
    summary: Summary | None = None
    networks: Mapping[str, Measurement] = field(default_factory=dict)
    networks_note: str = ""
    checks: Sequence[Check] = ()
    saliency: Mapping[str, float] = field(default_factory=dict)
    removed: Sequence[str] = ()
    history: History | None = None

    def html(self) -> str:
        """The page."""
        body = [self._head(), self._results(), self._drawings(), self._training(), self._space(), _footer()]
        style = variables() + drawing_rules() + files("espalier.report").joinpath("page.css").read_text("utf-8")
        script = files("espalier.report").joinpath("page.js").read_text("utf-8")
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f"<title>{escape(self.title)}</title>"
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<style>{style}body{{font-family:{FONT}}}</style></head>\n<body><main>\n"
            + "\n".join(part for part in body if part)
            + f"\n</main><script>{script}</script></body></html>\n"
        )

    def write(self, path: str | Path) -> None:
        """Write the page; a file that is there is replaced whole or not at all."""
        write_text(path, self.html())

    def _head(self) -> str:
        tiles = "".join(
            f'<div class="tile"><span>{escape(row.name)}</span><b>{escape(row.change or row.after)}</b>'
            f"<span>{escape(row.before)} → {escape(row.after)}</span></div>"
            for row in before_and_after(self.networks)
        )
        return f'<header><h1>{escape(self.title)}</h1><p class="lead">{escape(self.lead)}</p></header>' + (
            f'<div class="tiles">{tiles}</div>' if tiles else ""
        )

    def _results(self) -> str:
        parts = []
        if self.networks:
            names = list(self.networks)
            rows = [[escape(r.name), r.before, r.after, r.change] for r in before_and_after(self.networks)]
            table = _table(["", *map(escape, names), "change"], rows, numbers=(1, 2, 3))
            note = f"<p class='muted'>{escape(self.networks_note)}</p>" if self.networks_note else ""
            parts.append(f"<section><h2>Before and after</h2>{note}{table}</section>")
        if self.checks:
            words = "All hold. " if all(check.passed for check in self.checks) else "<b>Some fail.</b> "
            words += "What the sub-network leaves out was exactly zero; only the order of sums can differ."
            rows = [
                [f'<span title="{escape(detail)}">{escape(name)}</span>', found, allowed, _badge(good)]
                for name, detail, found, allowed, good in check_rows(self.checks)
            ]
            table = _table(["outputs compared", "max |difference|", "allowed", ""], rows, numbers=(1, 2))
            parts.append(f"<section><h2>Proof of exactness</h2><p class='muted'>{words}</p>{table}</section>")
        return f'<div class="pair">{"".join(parts)}</div>' if parts else ""

    def _drawings(self) -> str:
        captions = [*self.captions, *[""] * len(self.figures)]
        drawn = "".join(
            f"<figure data-drawing><figcaption><b>{escape(figure.title)}</b>"
            f'<span class="muted">{escape(caption)}</span>'
            '<button data-do="in" title="closer" aria-label="closer">+</button>'
            '<button data-do="out" title="farther" aria-label="farther">−</button>'
            '<button data-do="fit" title="fit (double click)" aria-label="fit">fit</button>'
            '<button data-do="full" title="full screen" aria-label="full screen">full</button></figcaption>'
            f'<div class="view">{draw(figure, style=False)}</div></figure>'
            for figure, caption in zip(self.figures, captions, strict=False)
        )
        return f'<div class="drawings">{drawn}</div>' if drawn else ""

    def _training(self) -> str:
        parts = []
        if self.saliency:
            key = '<div class="key"><span><i></i>stays</span><span><i class="gone"></i>removed</span></div>'
            parts.append(
                "<section><h2>Saliency per structure</h2>"
                "<p class='muted'>Lowest first. A structure whose removal "
                "would cut the network apart stays, whatever its score.</p>"
                f"{key}{saliency_chart(self.saliency, self.removed)}</section>"
            )
        if self.history is not None and self.history.steps:
            parts.append(
                "<section><h2>Training</h2>"
                "<p class='muted'>One run; the redundant structures reach zero in the "
                f"shaded phase.</p>{training_chart(self.history)}</section>"
            )
        return f'<div class="pair">{"".join(parts)}</div>' if parts else ""

    def _space(self) -> str:
        if self.summary is None:
            return ""
        rows = [
            [
                f'<span class="name">{escape(row.name)}</span>',
                escape(row.level),
                f"{row.params:,}",
                f"{row.macs:,}",
                _fate(row.removable, row.name in self.removed, row.reason),
            ]
            for row in self.summary.rows
        ]
        removable = sum(row.removable for row in self.summary.rows)
        notes = "".join(f"<p class='muted'>Note: {escape(note)}</p>" for note in self.summary.notes)
        table = _table(["structure", "level", "parameters", "MACs", ""], rows, numbers=(2, 3))
        return (
            f"<section><h2>Search space</h2><p class='muted'>{removable} structures can be removed; "
            f"{len(self.summary.rows) - removable} segments stay.</p>{table}{notes}</section>"
        )


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, "utf-8")
    os.replace(part, path)


def _fate(removable: bool, removed: bool, reason: str) -> str:
    if removed:
        return '<span class="badge bad">removed</span>'
    if removable:
        return '<span class="badge good">removable</span>'
    return f'<span class="muted">stays: {escape(reason)}</span>'


def _badge(good: bool) -> str:
    return '<span class="badge good">holds</span>' if good else '<span class="badge bad">fails</span>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f'<{tag} class="num">{c}</{tag}>' if i in numbers else f"<{tag}>{c}</{tag}>" for i, c in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    top = f"<thead><tr>{line(head, 'th')}</tr></thead>"
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def _footer() -> str:
    from espalier import __version__

    return (
        f"<footer>espalier {__version__} · torch {escape(torch.__version__)} · "
        f"Python {platform.python_version()} · {torch.get_num_threads()} threads</footer>"
    )
