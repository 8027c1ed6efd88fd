"""What a run reports: step lines (rank 0), `metrics.jsonl`, and the curves of
trackers."""

import json
import logging
import math
import os
import resource
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from mora_ds.checkpoint.layout import METRICS_FILE
from mora_ds.common.files import DISK_FULL, JsonObject, atomic_path, disk_errors
from mora_ds.common.nested import flattened
from mora_ds.common.untrusted import lines_of, parse_json
from mora_ds.config.forgetting import change
from mora_ds.models.loss import perplexity
from mora_ds.train.run_file import Facts
from mora_ds.train.trackers import TENSORBOARD, Numbers, Tracker

logger = logging.getLogger(__name__)

STEP_TAGS = {
    "loss": ("1_loss/training", 1.0),
    "perplexity": ("1_loss/training_perplexity", 1.0),
    "learning_rate": ("3_learning_rate/learning_rate", 1.0),
    "grad_norm": ("3_learning_rate/gradient_norm", 1.0),
    "bytes_gathered": ("5_traffic/all_gather_MB_per_step", 1e-6),
    "tokens_per_s": ("6_speed/tokens_per_second", 1.0),
    "tokens_per_s_per_rank": ("6_speed/tokens_per_second_and_process", 1.0),
    "mfu": ("6_speed/model_flops_utilization", 1.0),
    "step_time_s": ("6_speed/seconds_per_step", 1.0),
    "tokens": ("6_speed/tokens_read", 1.0),
    "peak_memory_bytes": ("7_memory/peak_GiB", 2.0**-30),
    "alignment": ("9_research/alignment", 1.0),
}
"""Key of a step's row -> its TensorBoard tag and the factor to the tag's unit.
TensorBoard sorts groups by name and opens the first ones: the digits put the most
important curves first."""

GROUPS = {
    "eval_perplexity": "2_evaluation/perplexity",
    "merge": "4_merges",
    "sources": "8_sources",
    "tasks": "2_evaluation/tasks",
}
"""Kind of a row of metrics.jsonl -> the TensorBoard group of its numbers."""

FORGETTING = "2_forgetting/change_percent"
"""The TensorBoard group of the change of each evaluation set's perplexity since the start."""


def source_facts(
    sums: Sequence[float], tokens: Mapping[str, int]
) -> dict[str, JsonObject]:
    """{source: loss, perplexity, tokens} of a step. `sums`: over all processes, the
    sources' losses, then their labels. `tokens`: of each source since the first step.

    The loss is None for a source without sequences in this step.
    """
    nll = sums[: len(tokens)]
    labels = sums[len(tokens) :]
    facts = {}
    for name, value, count in zip(tokens, nll, labels, strict=True):
        loss = value / count if count else None
        facts[name] = {
            "loss": loss,
            "perplexity": None if loss is None else perplexity(loss),
            "tokens": tokens[name],
        }
    return facts


def step_line(row: Facts, total_steps: int) -> str:
    """What is printed of a step's row; the time left if every step takes as long."""
    step = row["step"]
    cells = [
        f"step {step:>{len(str(total_steps))}}/{total_steps}",
        f"loss {row['loss']:.4f}",
        f"ppl {row['perplexity']:.2f}",
        f"lr {row['learning_rate']:.2e}",
        f"grad {row['grad_norm']:.3f}",
        f"{row['tokens_per_s']:,.0f} tok/s",
    ]
    if "mfu" in row:
        cells.append(f"MFU {row['mfu']:.1%}")
    cells.append(f"{row['peak_memory_bytes'] / 2**30:.2f} GiB")
    if row["bytes_gathered"]:
        cells.append(f"gathered {row['bytes_gathered'] / 1e6:.2f} MB")
    cells.append(f"{duration((total_steps - step) * row['step_time_s'])} left")
    return "  ".join(cells)


def duration(seconds: float) -> str:
    """Such as "0:02:21" or "3 days, 4:00:00"."""
    return str(timedelta(seconds=round(seconds)))


def peak_memory_bytes() -> int:
    """This process's peak memory: allocated on its GPU since a phase ended, or without
    one resident so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class PhaseMemory:
    """The peak memory of this process by phase of its run, on a GPU: what `--dry_run`
    plans, as it was.

    The numbers are the allocator's own, so that nothing waits for the GPU. Without one
    there are no phases: the peak of resident memory cannot be restarted.
    """

    def __init__(self) -> None:
        self.by_phase: dict[str, int] = {}
        """Phase -> bytes at its highest, with all that lies in memory meanwhile."""

    def end(self, phase: str) -> None:
        """End a phase, which began where the one before it ended."""
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
            self.by_phase[phase] = max(peak, self.by_phase.get(phase, 0))
            torch.cuda.reset_peak_memory_stats()

    @property
    def peak(self) -> int:
        """Peak bytes so far, in all phases."""
        return max([peak_memory_bytes(), *self.by_phase.values()])


class MetricsLog:
    """Writes the metrics of one run; `enabled=False`, on ranks other than 0,
    nothing."""

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        enabled: bool,
        start_step: int = 0,
        trackers: Sequence[Tracker] = (),
        pending: Collection[str] = (),
    ) -> None:
        """Drop the rows after `start_step`, of a run that was interrupted after its
        last checkpoint, so that a resumed curve reads as an uninterrupted one; 0 drops
        all rows. `pending`: kinds of rows of `start_step` that come again. TensorBoard
        has then no points of that step, and gets those of its other rows once more."""
        self.total_steps = total_steps
        self.enabled = enabled
        self.trackers = trackers
        if enabled:
            self._path = folder / METRICS_FILE
            rows = _keep_rows(self._path, start_step, pending)
            self._file = self._path.open("ab", buffering=0)
            for tracker in trackers:
                # Weights & Biases has kept its points, and takes no step twice
                if pending and tracker.name == TENSORBOARD:
                    for row in rows:
                        tracker.log(_curves(row), row["step"])

    def step(self, row: JsonObject) -> None:
        """A logged optimizer step, whose row has "step" and the keys of `STEP_TAGS`."""
        self._record(row)
        logger.info(step_line(row, self.total_steps))

    def evaluation(
        self, step: int, perplexities: dict[str, float], before: Numbers | None = None
    ) -> None:
        """The perplexity of each evaluation set after `step`; `before`: before the
        first step. Trackers also get the change since then in percent: positive where
        the model has forgotten."""
        self.record("eval_perplexity", step, perplexities)
        changes = change(before or {}, perplexities)
        curves = {f"{FORGETTING}/{name}": value for name, value in changes.items()}
        self._track(curves, step)
        values = "  ".join(
            f"{name} {value:.3f}" for name, value in perplexities.items()
        )
        logger.info(f"step {step}  perplexity {values}")

    def record(self, kind: str, step: int, facts: Facts) -> None:
        """A row of this kind: "eval_perplexity", "merge", "tasks" or "sources". The facts of the
        last two are those of each task or source."""
        self._record({"step": step, kind: facts})

    def close(self) -> None:
        if self.enabled:
            self._file.close()
        for tracker in self.trackers:
            tracker.close()

    def _record(self, row: JsonObject) -> None:
        """A row of metrics.jsonl, and its curves."""
        if self.enabled:
            line = json.dumps(without_nan(row), allow_nan=False) + "\n"
            with disk_errors(self._path.parent):
                self._append(line.encode())
        self._track(_curves(row), row["step"])

    def _append(self, line: bytes) -> None:
        """Add a line. A full disk costs the line, not the run, which may need no disk
        before there is space again."""
        end = os.fstat(self._file.fileno()).st_size
        try:
            is_written = self._file.write(line) == len(line)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            is_written = False
        if not is_written:
            logger.warning("warning: the disk is full: a row of %s is lost", self._path)
            # The start of a row would spoil the next one
            self._file.truncate(end)

    def _track(self, numbers: Numbers, step: int) -> None:
        if numbers:
            for tracker in self.trackers:
                tracker.log(numbers, step)


def _curves(row: Facts) -> dict[str, float]:
    """Curve -> number of a row of metrics.jsonl."""
    if "loss" in row:
        return {
            tag: row[name] * unit
            for name, (tag, unit) in STEP_TAGS.items()
            if row.get(name) is not None
        }
    numbers: dict[str, float] = {}
    for kind in row.keys() & GROUPS.keys():
        for curve, value in flattened(row[kind], f"{GROUPS[kind]}/", "/").items():
            if isinstance(value, (int, float)):
                numbers[curve] = value
    return numbers


def without_nan(value: Any) -> Any:
    """`value` with null for NaN and infinity, which JSON lacks: a perplexity may
    overflow."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _keep_rows(
    path: Path, last_step: int, pending: Collection[str]
) -> list[JsonObject]:
    """Drop the rows after `last_step`, those of it that are `pending`, and damaged
    ones. Return the rows of that step which stay."""
    if last_step == 0 or not path.exists():
        path.unlink(missing_ok=True)
        return []
    lines = []
    rows_of_last_step = []
    for line in lines_of(path):
        row = _row_of(line)
        if row is None or row["step"] > last_step:
            continue
        if row["step"] == last_step:
            if not row.keys().isdisjoint(pending):
                continue
            rows_of_last_step.append(row)
        lines.append(line + "\n")
    with atomic_path(path) as partial:
        partial.write_text("".join(lines), encoding="utf-8")
    return rows_of_last_step


def _row_of(line: str) -> JsonObject | None:
    """The row; None for a damaged one, such as one that a killed process was
    writing."""
    try:
        row = parse_json(line)
        return row if isinstance(row["step"], int) else None
    except (ValueError, TypeError, KeyError):
        return None
