"""Figures of what `tools/bench/learning.py` has measured, from its JSON alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.figures_style import BASE, FAINT, FOURTH, INK, OURS, SECOND, THIRD, axes, save

LABELS = {
    "none": "before", "lora": "LoRA", "relora": "ReLoRA", "mora-rotate": "MoRA", "remora-rotate": "ReMoRA",
    "remora-10": "ReMoRA, ten cycles", "remora-30": "ReMoRA, thirty cycles",
    "mora-scaled": "MoRA, delta divided by the side",
    "mora-muon": "MoRA, Muon", "remora-muon": "ReMoRA, Muon", "replay-10": "MoRA, 10% replay",
    "lora-embeddings": "LoRA, embeddings", "mora-embeddings": "MoRA, embeddings",
    "muon-embeddings": "Muon, embeddings", "recipe": "default recipe", "remora-recipe": "recipe, merged",
    "full": "full training", "token-bias": "a bias per token", "embeddings": "embeddings alone",
}  # fmt: skip
"""Method of tools/bench/learning.yaml -> its name in a figure; others have their own."""
CURVES = ("lora", "mora-rotate", "mora-muon", "recipe", "full")
LONG_CURVES, LONG_RANK = ("lora", "relora", "mora-rotate", "remora-rotate", "remora-30", "full"), 2
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
        return LABELS.get(self.method, self.method)

    @property
    def is_dashed(self) -> bool:
        """As it shares its colour with the method that it is a form of."""
        return "muon" in self.method or self.method.startswith(("relora", "remora"))

    @property
    def colour(self) -> str:
        kinds = {"full": FOURTH, "none": BASE, "token-bias": BASE, "embeddings": BASE, "recipe": THIRD}
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
    """learning.svg and learning-curves.svg: nothing where there is no such JSON."""
    if not path.is_file():
        return
    found = points(path)
    _draw_both_domains(found, folder / "learning.svg")
    _draw_curves(found, CURVES, folder / "learning-curves.svg")


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


def _draw_both_domains(found: Sequence[Point], path: Path) -> None:
    figure, (axis,) = axes(1, 1, (6, 4.6))
    for point in found:
        x, y = mean(point.old), mean(point.new)
        bars = [[max(x - min(point.old), 0)], [max(point.old) - x]], [[y - min(point.new)], [max(point.new) - y]]
        axis.errorbar(x, y, xerr=bars[0], yerr=bars[1], fmt="o", color=point.colour, markersize=6, linewidth=1)
    _logarithmic(axis, [value for point in found for value in point.new])
    axis.set_xlabel("perplexity on the old text")
    axis.set_ylabel("perplexity on the new text")
    axis.set_title("Learning against forgetting (down and left is better)", fontsize=11, color=INK)
    _label_beside(axis, [(mean(point.old), mean(point.new), point.label, point.colour) for point in found])
    save(figure, path, "Learning against forgetting")


def _draw_curves(found: Sequence[Point], methods: Sequence[str], path: Path) -> None:
    figure, panels = axes(2, 1, (6, 6.4))
    start = next((point for point in found if point.method == "none"), None)
    for axis, name, title in zip(panels, ("new", "old"), ("new text", "old text"), strict=True):
        ends = []
        for point in (point for point in found if point.method in methods):
            steps = [row["step"] for row in point.curves[0]]
            seeds = list(zip(*([row[name] for row in curve] for curve in point.curves), strict=True))
            if start is not None:
                steps, seeds = [0, *steps], [(mean(getattr(start, name)),), *seeds]
            means = [mean(values) for values in seeds]
            axis.fill_between(steps, *zip(*((min(each), max(each)) for each in seeds), strict=True), color=point.colour,
                              alpha=0.2, linewidth=0)  # fmt: skip
            axis.plot(steps, means, color=point.colour, linewidth=2, linestyle="--" if point.is_dashed else "-")
            ends.append((steps[-1], means[-1], point.label, point.colour))
        _logarithmic(axis, [value for line in axis.lines for value in line.get_ydata()])
        axis.set_ylabel(f"perplexity on the {title}")
        _label_beside(axis, ends, apart=0.11)
    panels[1].set_xlabel("optimizer steps")
    save(figure, path, "Perplexity of the new and the old text during training")


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean."""
    found = list(values)
    return sum(found) / len(found)


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


def _label_beside(axis: Any, labels: Sequence[tuple[float, float, str, str]], apart: float = 0.065) -> None:
    """Names at the right of the axes, in the order of their points and never over one another, a thin line to each.

    `labels`: (x, y, text, colour). `apart`: the least distance of two names, as a part of the height.
    """
    axis.figure.subplots_adjust(left=0.12, right=0.66, top=0.92, bottom=0.12, hspace=0.25)

    def height(x: float, y: float) -> float:
        return float(axis.transAxes.inverted().transform(axis.transData.transform((x, y)))[1])

    ordered = sorted(labels, key=lambda label: height(label[0], label[1]))
    places: list[float] = []
    for x, y, *_ in ordered:
        places.append(max(height(x, y), places[-1] + apart if places else 0.0))
    over = max(0.0, places[-1] - 1.0) if places else 0.0
    for number in reversed(range(len(places))):
        above = places[number + 1] - apart if number + 1 < len(places) else places[number] - over
        places[number] = min(places[number], above)
    for (x, y, text, colour), place in zip(ordered, places, strict=True):
        axis.annotate(text, (x, y), xycoords="data", xytext=(1.04, place), textcoords="axes fraction", va="center",
                      color=colour, fontsize=10, arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.7},
                      annotation_clip=False)  # fmt: skip
