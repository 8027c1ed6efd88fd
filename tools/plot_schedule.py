"""Plot the learning rate of a run against its steps, with its merges, as the trainer computes it.

    python tools/plot_schedule.py --max_steps 400 --merge_every 100 --lr_scheduler_type cosine
    python tools/plot_schedule.py configs/recipes/pretrain_250m.yaml --png schedule.png
    python tools/plot_schedule.py out/run.yaml --max_steps 900 --merges 210 480   the merges that a run has made

Takes the recipe and the flags of a run. --max_steps must be given, since no text is read. Exit code 2: an error that
you can correct in the command.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout, not installed

from mora_ds.common.errors import UserError
from mora_ds.config.arguments import parse
from mora_ds.remora.schedule import Schedule, ScheduleKind
from mora_ds.remora.schedule_text import side_by_side, start_lines, text_plot
from mora_ds.runtime import cli

PANEL_COLUMNS, PANEL_ROWS = 34, 6
"""Size of each of the four plots, in characters."""


def main() -> None:
    options, rest = _parser().parse_known_args()
    arguments = parse(rest)
    if arguments.training.max_steps < 1:
        raise UserError("--max_steps: give the number of steps of the run; without it the text would have to be read")
    schedule = arguments.schedule(arguments.training.max_steps)
    merges = schedule.merge_steps() if options.merges is None else sorted(options.merges)
    if options.all_kinds:
        lines = _four(schedule, merges)
    else:
        lines = text_plot(schedule, merges, options.columns, options.rows)
    lines += [f"{'steps':>8} 0 to {schedule.total_steps}; ^ merge", *_about_merges(schedule, options.merges)]
    print("\n".join(line.rstrip() for line in lines))
    if options.png is not None:
        _write_png(schedule, merges, options.png)


def _four(schedule: Schedule, merges: list[int]) -> list[str]:
    kinds = [ScheduleKind.COSINE, ScheduleKind.LINEAR, ScheduleKind.CONSTANT, ScheduleKind.WARMUP_STABLE_DECAY]
    schedules = [dataclasses.replace(schedule, kind=kind) for kind in kinds]
    one, two, three, four = (text_plot(each, merges, PANEL_COLUMNS, PANEL_ROWS) for each in schedules)
    return [*side_by_side(one, two), "", *side_by_side(three, four)]


def _about_merges(schedule: Schedule, given: list[int] | None) -> list[str]:
    if given is not None:
        return []
    return start_lines(schedule)


def _write_png(schedule: Schedule, merges: list[int], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--png needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    steps = range(schedule.total_steps)
    axes.plot(steps, [schedule.learning_rate(step, merges) for step in steps], linewidth=1.2)
    for merge in merges:
        axes.axvline(merge, color="0.6", linewidth=0.8, linestyle=":")
    axes.set(xlabel="optimizer step (dotted: merge)", ylabel="learning rate", title=schedule.kind.value, ylim=(0, None))
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise UserError(f"--png: cannot write {path}: {error.strerror}") from error
    print(f"written to {path}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    """The flags of this tool; all others are those of a run."""
    parser = _Parser(
        description=(__doc__ or "").splitlines()[0],
        allow_abbrev=False,
        usage="%(prog)s [recipe.yaml] --max_steps N [a run's flags] [the flags below]",
    )
    parser.add_argument("--merges", type=int, nargs="*", help="steps of the merges, in place of the planned ones")
    parser.add_argument("--all_kinds", action="store_true", help="plot all four kinds of schedule, each smaller")
    parser.add_argument("--columns", type=_positive, default=72, help="width of the plot")
    parser.add_argument("--rows", type=_positive, default=12, help="height of the plot")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also write a picture (needs matplotlib)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    cli.run(main)
