"""Draw the figures of the documentation as SVG, from the JSON of `tools/bench/learning.py`
alone.

    python tools/figures.py                                     draws docs/assets/*.svg (needs matplotlib)
    python tools/figures.py --learning FILE --output FOLDER     draws one file of tools/bench/learning.py --json FILE

A figure has the name of its JSON. Text stays text, and colours follow the reader's light or
dark scheme.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

# A bare checkout, not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.figures_style import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, axes, save
from tools.plans import DATA, ROOT

ASSETS = ROOT / "docs" / "assets"

STYLES = {
    "lora": ("LoRA", ORANGE, "-"),
    "relora": ("ReLoRA", ORANGE, "--"),
    "mora-rotate": ("MoRA", BLUE, "-"),
    "remora-rotate": ("ReMoRA", BLUE, "--"),
    "remora-10": ("ReMoRA, 10 cycles", BLUE, ":"),
    "remora-30": ("ReMoRA, 30 cycles", BLUE, ":"),
    "mora-muon": ("MoRA, Muon", BLUE, "--"),
    "recipe": ("with embeddings", GREEN, "-"),
    "full": ("full training", PURPLE, "-"),
}
"""Method of tools/bench/learning.yaml -> its name in a figure, the colour and the style of
its line.
"""
LONG_RUN = ("none", "lora", "relora", "mora-rotate", "remora-rotate", "remora-30", "full")
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
"""JSON of the documentation -> the methods whose curves are drawn, as far as they were run.
"none" is where they start, which a model from scratch leaves out: it knows nothing."""
DRAWN_RANK = 2
"""Of the ranks that one JSON compares."""


@dataclass(frozen=True)
class Point:
    """A method at its best learning rate: values of all seeds."""

    method: str
    rank: int
    """0 where it has none of the ranks that were compared."""
    trained: int
    new: list[float]
    old: list[float]
    curves: list[list[dict[str, float]]]
    """Of each seed: step, new, old."""


def points(path: Path) -> list[Point]:
    """The methods of a JSON of `tools/bench/learning.py`, in their order."""
    by_kind: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in json.loads(path.read_text(encoding="utf-8"))["runs"]:
        if run["is_best"]:
            by_kind.setdefault((run["method"], run.get("rank", 0)), []).append(run)
    return [
        Point(
            *kind,
            trained=runs[0]["trained"],
            new=[run["perplexity"]["new"] for run in runs],
            old=[run["perplexity"]["old"] for run in runs],
            curves=[run["curve"] for run in runs],
        )
        for kind, runs in by_kind.items()
    ]


def draw(path: Path, folder: Path) -> None:
    """Draw the curves of both texts into `folder`, at one rank."""
    methods = DRAWN.get(path.stem, tuple(STYLES))
    measured = [point for point in points(path) if point.method in methods]
    ranks = {point.rank for point in measured if point.rank}
    rank = DRAWN_RANK if DRAWN_RANK in ranks else min(ranks, default=0)
    measured = [point for point in measured if point.rank in (0, rank)]
    start = next((point for point in measured if point.method == "none"), None)
    figure, panels = axes(2, 1, (6, 6.4))
    for axis, name in zip(panels, ("new", "old"), strict=True):
        for point in measured:
            if point is not start:
                _draw_curve(axis, name, point, start)
        _logarithmic(axis, [value for line in axis.lines for value in line.get_ydata()])
        axis.set_ylabel(f"perplexity on the {name} text")
    panels[1].set_xlabel("optimizer steps")
    figure.subplots_adjust(left=0.12, right=0.65, top=0.92, bottom=0.12, hspace=0.25)
    panels[0].legend(
        loc="upper left",
        bbox_to_anchor=(1.02, 1),
        frameon=False,
        labelcolor=INK,
        fontsize=10,
    )
    target = folder / f"{path.stem.replace('_', '-')}.svg"
    save(figure, target, "Perplexity of the new and the old text during training")


def _draw_curve(axis: Any, name: str, point: Point, start: Point | None) -> None:
    """The mean over seeds of the perplexity on a text, and the range in which they lie."""
    label, colour, line = STYLES[point.method]
    steps = [row["step"] for row in point.curves[0]]
    seeds = list(
        zip(*([row[name] for row in curve] for curve in point.curves), strict=True)
    )
    if start is not None:
        steps = [0, *steps]
        seeds = [(fmean(getattr(start, name)),), *seeds]
    lowest = [min(values) for values in seeds]
    highest = [max(values) for values in seeds]
    axis.fill_between(steps, lowest, highest, color=colour, alpha=0.2, linewidth=0)
    axis.plot(
        steps,
        [fmean(values) for values in seeds],
        line,
        color=colour,
        linewidth=2,
        label=label,
    )


def _logarithmic(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic y axis over these values, with ticks at round numbers."""
    low = min(values) / 1.06
    high = max(values) * 1.06
    axis.set_yscale("log")
    axis.set_ylim(low, high)
    step = next(
        size
        for size in (1, 2, 5, 10, 20, 25, 50, 100, 200, 500, 1000)
        if (high - low) / size < 9
    )
    ticks = [step * number for number in range(int(low / step) + 1, int(high / step) + 1)]
    axis.set_yticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.grid(True, axis="y", color=FAINT, linewidth=0.6)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "--learning",
        type=Path,
        metavar="FILE",
        help="draw only this JSON of tools/bench/learning.py",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ASSETS,
        metavar="FOLDER",
        help="where it is drawn",
    )
    options = parser.parse_args()
    for path in (
        [options.learning]
        if options.learning
        else [DATA / f"{name}.json" for name in DRAWN]
    ):
        draw(path, options.output)


if __name__ == "__main__":
    main()
