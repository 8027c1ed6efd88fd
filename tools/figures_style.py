"""What the figures of the documentation have in common: SVG whose text stays text, in the
reader's colours.
"""

from io import StringIO
from pathlib import Path
from typing import Any

COLOURS = {
    "#010101": ("ink", "#1f2328", "#e6edf3"),
    "#020202": ("faint", "#d0d7de", "#3d444d"),
    "#030303": ("blue", "#0969da", "#58a6ff"),
    "#040404": ("orange", "#bf5700", "#f0883e"),
    "#050505": ("green", "#1a7f37", "#3fb950"),
    "#060606": ("purple", "#8250df", "#bc8cff"),
}
"""Placeholder in a drawing -> name, colour in a light and in a dark scheme."""

INK, FAINT, BLUE, ORANGE, GREEN, PURPLE = COLOURS


def axes(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure of `size` inches, and its axes row by row."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({
        "svg.fonttype": "none", "svg.hashsalt": "mora_ds", "font.family": "sans-serif", "font.size": 11,
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": INK, "ytick.color": INK,
    })  # fmt: skip
    figure, panels = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in panels.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(panels.flat)


def save(figure: Any, path: Path, title: str) -> None:
    """Write a figure as SVG whose text can be selected."""
    text = StringIO()
    figure.savefig(
        text,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Title": title, "Creator": "mora_ds"},
    )
    svg = text.getvalue()
    # The placeholders become CSS variables, which follow the reader's scheme.
    for placeholder, (variable, light, _) in COLOURS.items():
        svg = svg.replace(placeholder, f"var(--{variable}, {light})")
    light_scheme = " ".join(f"--{name}: {light};" for name, light, _ in COLOURS.values())
    dark_scheme = " ".join(f"--{name}: {dark};" for name, _, dark in COLOURS.values())
    dark_rule = f"@media (prefers-color-scheme: dark) {{ :root {{ {dark_scheme} }} }}"
    style = f"<style>:root {{ {light_scheme} }} {dark_rule}</style>"
    start = svg.index(">", svg.index("<svg")) + 1
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (svg[:start] + style + svg[start:]).splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")
