"""Figures of what `tools/bench/learning.py` has measured, from its JSON alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tools.figures_style import FAINT, FOURTH, INK, OURS, SECOND, THIRD, axes, save

LABELS = {
    "lora": "LoRA", "relora": "ReLoRA", "mora-rotate": "MoRA", "remora-rotate": "ReMoRA",
    "remora-10": "ReMoRA, 10 cycles", "remora-30": "ReMoRA, 30 cycles",
    "mora-muon": "MoRA, Muon", "recipe": "default recipe", "full": "full training",
}  # fmt: skip
"""Method of tools/bench/learning.yaml -> its name in a figure."""
CURVES = ("lora", "mora-rotate", "mora-muon", "recipe", "full")
LONG_CURVES = ("lora", "relora", "mora-rotate", "remora-rotate", "remora-30", "full")
LONG_RANK = 2
SCRATCH_CURVES = ("lora", "relora", "mora-rotate", "remora-rotate", "remora-10", "full")
"""The methods whose curves are drawn, as far as they were run, and the rank of those of a long run."""


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

    @property
    def label(self) -> str:
        return LABELS[self.method]

    @property
    def line(self) -> str:
        """The style of its line: it shares its colour with the method that it is a form of."""
        if self.method[-1].isdigit():
            return ":"
        return "--" if "muon" in self.method or self.method.startswith(("relora", "remora")) else "-"

    @property
    def colour(self) -> str:
        kinds = {"full": FOURTH, "recipe": THIRD}
        return kinds.get(self.method, SECOND if "lora" in self.method else OURS)


def points(path: Path) -> list[Point]:
    """The methods of a JSON of `tools/bench/learning.py`, in their order."""
    runs = [run for run in json.loads(path.read_text(encoding="utf-8"))["runs"] if run["is_best"]]
    found = []
    for kind in dict.fromkeys((run["method"], run.get("rank", 0)) for run in runs):
        own = [run for run in runs if (run["method"], run.get("rank", 0)) == kind]
        new, old = ([run["perplexity"][name] for run in own] for name in ("new", "old"))
        found.append(Point(*kind, own[0]["trained"], new, old, [run["curve"] for run in own]))
    return found


def draw(path: Path, folder: Path) -> None:
    """learning-curves.svg: nothing where there is no such JSON."""
    if path.is_file():
        _draw_curves(points(path), CURVES, folder / "learning-curves.svg")


def draw_long(path: Path, folder: Path, from_scratch: bool = False) -> None:
    """The curves of long runs at one rank, NAME.svg for NAME.json: nothing where there is no such JSON.
    `from_scratch`: without the untrained model."""
    if not path.is_file():
        return
    found = [point for point in points(path) if not (from_scratch and point.method == "none")]
    ranks = {point.rank for point in found if point.rank}
    shown = (0, LONG_RANK if LONG_RANK in ranks else min(ranks))
    curves = folder / f"{path.stem.replace('_', '-')}.svg"
    methods = SCRATCH_CURVES if from_scratch else LONG_CURVES
    _draw_curves([point for point in found if point.rank in shown], methods, curves)


def _draw_curves(found: Sequence[Point], methods: Sequence[str], path: Path) -> None:
    figure, panels = axes(2, 1, (6, 6.4))
    start = next((point for point in found if point.method == "none"), None)
    for axis, name, title in zip(panels, ("new", "old"), ("new text", "old text"), strict=True):
        for point in (point for point in found if point.method in methods):
            steps = [row["step"] for row in point.curves[0]]
            seeds = list(zip(*([row[name] for row in curve] for curve in point.curves), strict=True))
            if start is not None:
                steps, seeds = [0, *steps], [(fmean(getattr(start, name)),), *seeds]
            axis.fill_between(steps, *zip(*((min(each), max(each)) for each in seeds), strict=True), color=point.colour,
                              alpha=0.2, linewidth=0)  # fmt: skip
            axis.plot(steps, [fmean(values) for values in seeds], point.line, color=point.colour, linewidth=2,
                      label=point.label)  # fmt: skip
        _logarithmic(axis, [value for line in axis.lines for value in line.get_ydata()])
        axis.set_ylabel(f"perplexity on the {title}")
    panels[1].set_xlabel("optimizer steps")
    figure.subplots_adjust(left=0.12, right=0.65, top=0.92, bottom=0.12, hspace=0.25)
    panels[0].legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, labelcolor=INK, fontsize=10)
    save(figure, path, "Perplexity of the new and the old text during training")


def _logarithmic(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic y axis over these values, with ticks at round numbers."""
    low, high = min(values), max(values)
    axis.set_yscale("log")
    axis.set_ylim(low / 1.06, high * 1.06)
    step = next(each for each in (1, 2, 5, 10, 20, 25, 50, 100, 200, 500, 1000) if (high - low) / each < 8)
    ticks = [step * number for number in range(int(low / 1.06 / step) + 1, int(high * 1.06 / step) + 1)]
    axis.set_yticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.grid(True, axis="y", color=FAINT, linewidth=0.6)
