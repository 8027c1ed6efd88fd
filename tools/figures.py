"""Draw the figures of the documentation as SVG, from the JSON of
`tools/bench/learning.py`, `memorization.py` and `soak.py` alone.

    python tools/figures.py         draws docs/assets/*.svg (needs matplotlib)

A figure has the name of its JSON. Text stays text, and colors follow the reader's light
or dark scheme.
"""

import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

# A bare checkout, not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mora_ds.common.files import read_json
from tools.plans import DATA, ROOT
from tools.runs import Row, best_rows, rows_of

ASSETS = ROOT / "docs" / "assets"

COLORS = {
    "#010101": ("ink", "#1f2328", "#e6edf3"),
    "#020202": ("faint", "#d0d7de", "#3d444d"),
    "#030303": ("blue", "#0969da", "#58a6ff"),
    "#040404": ("orange", "#bf5700", "#f0883e"),
    "#050505": ("green", "#1a7f37", "#3fb950"),
    "#060606": ("purple", "#8250df", "#bc8cff"),
}
"""Placeholder in a drawing -> name, color in a light and in a dark scheme."""

INK, FAINT, BLUE, ORANGE, GREEN, PURPLE = COLORS

STYLES = {
    "lora": ("LoRA", ORANGE, "-"),
    "relora": ("ReLoRA", ORANGE, "--"),
    "mora": ("MoRA", BLUE, "-"),
    "mora-rotate": ("MoRA", BLUE, "-"),
    "remora-rotate": ("ReMoRA", BLUE, "--"),
    "remora-10": ("ReMoRA, 10 cycles", BLUE, ":"),
    "remora-30": ("ReMoRA, 30 cycles", BLUE, ":"),
    "mora-muon": ("MoRA, Muon", BLUE, "--"),
    "recipe": ("with embeddings", GREEN, "-"),
    "full": ("full training", PURPLE, "-"),
}
"""Method of tools/bench/learning.yaml -> its name in a figure, the color and the style
of its line."""
LONG_RUN = (
    "none",
    "lora",
    "relora",
    "mora-rotate",
    "remora-rotate",
    "remora-30",
    "full",
)
DRAWN = {
    "learning": ("none", "lora", "mora-rotate", "mora-muon", "recipe", "full"),
    "learning_long": LONG_RUN,
    "learning_long_13m": LONG_RUN,
    "learning_scratch": (
        "lora",
        "relora",
        "mora-rotate",
        "remora-rotate",
        "remora-10",
        "full",
    ),
}
"""JSON of the documentation -> the methods whose curves are drawn, as far as they were
run. "none" is where they start, which a model from scratch leaves out: it knows
nothing."""
TITLE = "Perplexity of the new and the old text during training"
DRAWN_RANK = 2
"""The rank whose curves are drawn, of those that a JSON compares."""


def draw(name: str, folder: Path) -> None:
    """Draw the curves of both texts of data/NAME.json into `folder`, at one rank."""
    rows = [
        row for row in best_rows(DATA / f"{name}.json") if row.method in DRAWN[name]
    ]
    if len({row.rank for row in rows if row.rank}) > 1:
        rows = [row for row in rows if row.rank in (0, DRAWN_RANK)]
    start = next((row for row in rows if row.method == "none"), None)
    figure, panels = _panels()
    for axis, text in zip(panels, ("new", "old"), strict=True):
        for row in rows:
            if row is not start:
                _draw_curve(axis, text, row, start)
        _logarithmic(axis, [value for line in axis.lines for value in line.get_ydata()])
        axis.set_ylabel(f"perplexity on the {text} text")
    panels[1].set_xlabel("optimizer steps")
    figure.subplots_adjust(left=0.12, right=0.65, top=0.92, bottom=0.12, hspace=0.25)
    panels[0].legend(
        loc="upper left",
        bbox_to_anchor=(1.02, 1),
        frameon=False,
        labelcolor=INK,
        fontsize=10,
    )
    _save(figure, folder / f"{name.replace('_', '-')}.svg")


def draw_memorization(folder: Path) -> None:
    """Draw the digits that each method knows in the course of
    data/memorization_135m_seeds.json."""
    plots = _pyplot()
    figure, axis = plots.subplots(figsize=(6, 3.4))
    for row in rows_of(read_json(DATA / "memorization_135m_seeds.json")["runs"]):
        values_at: dict[int, list[float]] = {}
        for run in row.runs:
            for step, share in zip(run["steps"], run["accuracy"], strict=True):
                values_at.setdefault(step, []).append(100 * share)
        _draw_mean(axis, row.method, values_at)
    axis.set_ylim(0, 100)
    axis.set_ylabel("digits right, %")
    axis.set_xlabel("optimizer steps")
    axis.grid(True, axis="y", color=FAINT, linewidth=0.6)
    axis.legend(loc="lower right", frameon=False, labelcolor=INK)
    figure.subplots_adjust(bottom=0.16)
    _save(figure, folder / "memorization.svg", "Digits of random pairs memorized")


def draw_soak(folder: Path) -> None:
    """Draw what the processes of a long run held, and what its steps and merges took, of
    data/soak*.json."""
    figure, (memory, seconds) = _panels()
    periods = read_json(DATA / "soak.json")["periods"]
    held = [period["resident MB"] for period in periods]
    memory.plot([period["step"] for period in periods], held, color=BLUE)
    memory.set_ylim(0, 1.2 * max(held))
    memory.set_ylabel("memory of rank 0, MB")
    periods = read_json(DATA / "soak_merges.json")["periods"]
    steps = [period["step"] for period in periods]
    for what, color in (("step", BLUE), ("merge", ORANGE)):
        taken = [period[f"a {what}, in steps alone"] for period in periods]
        seconds.plot(steps, taken, color=color, label=f"a {what}")
    seconds.set_ylim(bottom=0)
    seconds.set_ylabel("CPU time, steps of the model alone")
    seconds.set_xlabel("optimizer steps")
    seconds.legend(frameon=False, labelcolor=INK)
    _save(figure, folder / "soak.svg", "Memory and time of a long run")


def _panels() -> tuple[Any, Any]:
    """A figure, and its two axes, one above the other."""
    figure, panels = _pyplot().subplots(2, 1, figsize=(6, 6.4))
    return figure, panels


def _pyplot() -> Any:
    """`matplotlib.pyplot`, which then draws as all figures look."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "mora_ds",
        "font.family": "sans-serif",
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    pyplot.rcParams.update(style)
    return pyplot


def _draw_curve(axis: Any, text: str, row: Row, start: Row | None) -> None:
    """The perplexity on a text, from `start` on."""
    values_at: dict[int, list[float]] = {}
    if start is not None:
        values_at[0] = [start.mean(text)]
    for run in row.runs:
        for point in run["curve"]:
            values_at.setdefault(point["step"], []).append(point[text])
    _draw_mean(axis, row.method, values_at)


def _draw_mean(axis: Any, method: str, values_at: dict[int, list[float]]) -> None:
    """The mean over seeds of what was measured at each step, and the range in which
    they lie."""
    label, color, line = STYLES[method]
    steps = list(values_at)
    lowest = [min(values) for values in values_at.values()]
    highest = [max(values) for values in values_at.values()]
    means = [fmean(values) for values in values_at.values()]
    axis.fill_between(steps, lowest, highest, color=color, alpha=0.2, linewidth=0)
    axis.plot(steps, means, line, color=color, linewidth=2, label=label)


def _logarithmic(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic y axis over these values, with ticks at round numbers."""
    low = min(values) / 1.06
    high = max(values) * 1.06
    axis.set_yscale("log")
    axis.set_ylim(low, high)
    steps = (1, 2, 5, 10, 20, 25, 50, 100, 200, 500, 1000)
    step = next(size for size in steps if (high - low) / size < 9)
    ticks = [
        step * number for number in range(int(low / step) + 1, int(high / step) + 1)
    ]
    axis.set_yticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.grid(True, axis="y", color=FAINT, linewidth=0.6)


def _save(figure: Any, path: Path, title: str = TITLE) -> None:
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
    for placeholder, (variable, light, _) in COLORS.items():
        svg = svg.replace(placeholder, f"var(--{variable}, {light})")
    light_scheme = " ".join(f"--{name}: {light};" for name, light, _ in COLORS.values())
    dark_scheme = " ".join(f"--{name}: {dark};" for name, _, dark in COLORS.values())
    dark_rule = f"@media (prefers-color-scheme: dark) {{ :root {{ {dark_scheme} }} }}"
    style = f"<style>:root {{ {light_scheme} }} {dark_rule}</style>"
    start = svg.index(">", svg.index("<svg")) + 1
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (svg[:start] + style + svg[start:]).splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


def main() -> None:
    for name in DRAWN:
        draw(name, ASSETS)
    draw_memorization(ASSETS)
    draw_soak(ASSETS)


if __name__ == "__main__":
    main()
