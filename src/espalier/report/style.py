"""Colours of drawings and charts, for light and dark pages."""

from importlib.resources import files

FONT = "Inter, 'Segoe UI', system-ui, -apple-system, 'Helvetica Neue', Arial, sans-serif"

# (light fill, light line, dark fill, dark line)
_KINDS = {
    "weight": ("#dbe8fd", "#3b74d6", "#1d3354", "#6c9df0"),
    "norm": ("#e9e2fb", "#7c5ccf", "#2f2650", "#a68df0"),
    "activation": ("#fdebd1", "#cf8417", "#463319", "#eaa94b"),
    "pool": ("#d5f1ec", "#16907f", "#153d38", "#46c4b1"),
    "attention": ("#fbdcea", "#c43d80", "#4b1f35", "#ee7fb2"),
    "joint": ("#ffffff", "#334155", "#0f172a", "#cbd5e1"),
    "shape": ("#e8edf2", "#75859a", "#28323f", "#93a3b8"),
    "other": ("#eeeae4", "#8c7b66", "#36302a", "#b8a68f"),
    "segment": ("#f7f9fb", "#9aa8bb", "#182132", "#5b6b80"),
    "io": ("#334155", "#334155", "#cbd5e1", "#cbd5e1"),
}

_LIGHT = {
    "paper": "#ffffff", "ink": "#0f172a", "muted": "#5b6b80", "line": "#94a3b8", "edge": "#8796aa",
    "grid": "#e6ebf1", "accent": "#1d8348", "accent-fill": "#eefaf2",
    "red": "#d1293d", "red-fill": "#fdf0f1", "card": "#f7f9fb",
    "blue": "#3b74d6", "io-text": "#ffffff", "idle": "#b6c1ce",
}  # fmt: skip
_DARK = {
    "paper": "#111827", "ink": "#e8edf4", "muted": "#9aa8bb", "line": "#475569", "edge": "#64748b",
    "grid": "#273244", "accent": "#4ade80", "accent-fill": "#14291f",
    "red": "#ff6b7d", "red-fill": "#3a1a22", "card": "#182132",
    "blue": "#6c9df0", "io-text": "#0f172a", "idle": "#45536a",
}  # fmt: skip


def variables() -> str:
    """The custom properties ``--es-…`` of the light scheme and, where the system asks for it, the dark."""

    def block(dark: bool) -> str:
        names = _DARK if dark else _LIGHT
        rows = [f"--es-{name}:{value}" for name, value in names.items()]
        for kind, colours in _KINDS.items():
            fill, line = colours[2:] if dark else colours[:2]
            rows += [f"--es-{kind}:{fill}", f"--es-{kind}-line:{line}"]
        return ";".join(rows)

    return f":root{{{block(False)}}}\n@media(prefers-color-scheme:dark){{:root{{{block(True)}}}}}"


def drawing_rules() -> str:
    """How the parts of a drawing look, given :func:`variables`."""
    kinds = "".join(f".k-{k}{{--fill:var(--es-{k});--stroke:var(--es-{k}-line)}}" for k in _KINDS)
    return kinds + files("espalier.report").joinpath("drawing.css").read_text("utf-8")


def drawing_style() -> str:
    """Everything that a drawing on its own needs."""
    return variables() + drawing_rules()
