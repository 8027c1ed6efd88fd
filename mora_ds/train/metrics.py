"""What a run reports: step lines and a progress bar (rank 0), `metrics.jsonl`, and the curves of trackers."""

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mora_ds.checkpoint.layout import METRICS_FILE
from mora_ds.common.files import JsonObject, atomic_path, disk_errors
from mora_ds.common.nested import flattened
from mora_ds.config.forgetting import change
from mora_ds.models.loss import perplexity
from mora_ds.train.run_file import Facts
from mora_ds.train.trackers import Numbers, Service, TensorBoard, Tracker

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
}
"""Field of `StepMetrics` -> its TensorBoard tag and the factor to the tag's unit. TensorBoard sorts groups by name and
opens the first ones: the digits put the curves first that a person looks for first."""

GROUPS = {
    "eval": "2_evaluation/perplexity",
    "merge": "4_merges",
    "sources": "8_sources",
    "tasks": "2_evaluation/tasks",
}
"""Kind of a row of metrics.jsonl -> the TensorBoard group of its numbers."""

FORGETTING = "2_forgetting/change_percent"
"""The TensorBoard group of what each evaluation set has lost since the start."""


class SourceLosses:
    """The losses and label counts of one optimizer step, summed by source of the mixture."""

    def __init__(self, names: Sequence[str], device: torch.device | str = "cpu") -> None:
        """`names`: of the sources, in the order of their indices. `device`: of the losses."""
        self.names = list(names)
        self._losses = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self.reset()

    def reset(self) -> None:
        """Begin a step."""
        self._losses.zero_()
        self._labels = [0] * len(self.names)

    def add(self, sources: Sequence[int], row_nll: Tensor, labels: Sequence[int]) -> None:
        """Add a micro-batch: of each row its source, its summed loss (B,), which is not waited for, and how many of its
        labels count."""
        index = torch.tensor(sources).to(self._losses.device, non_blocking=True)
        self._losses.index_add_(0, index, row_nll.detach().double())
        for source, count in zip(sources, labels, strict=True):
            self._labels[source] += count

    def sums(self) -> tuple[Tensor, list[int]]:
        """This process's summed losses, a vector on the device, and labels by source; to be summed over all
        processes."""
        return self._losses, self._labels

    def facts(self, sums: Sequence[float], tokens: dict[str, int]) -> dict[str, JsonObject]:
        """{source: loss, perplexity, tokens} from the sums over all processes, losses first, then labels.

        The loss is None for a source without rows in this step. `tokens`: of each source since the first step.
        """
        nll, predicted = torch.tensor(sums, dtype=torch.float64).view(2, -1).tolist()
        facts = {}
        for name, value, count in zip(self.names, nll, predicted, strict=True):
            loss = value / count if count else None
            ppl = None if loss is None else perplexity(loss)
            facts[name] = {"loss": loss, "perplexity": ppl, "tokens": tokens[name]}
        return facts


@dataclass(frozen=True)
class StepMetrics:
    """One logged optimizer step."""

    step: int
    loss: float
    """Mean over all predicted tokens of the global batch."""
    learning_rate: float
    grad_norm: float
    tokens: int
    """Tokens read since the first step, over all processes."""
    tokens_per_s: float
    tokens_per_s_per_rank: float
    step_time_s: float
    peak_memory_bytes: int
    bytes_gathered: int
    """All-gather volume of the step, per process."""
    mfu: float | None = None
    """The share of the GPU's peak that the model's FLOPs are; None where a peak is not known."""

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    def line(self, total_steps: int, seconds_a_step: float) -> str:
        """What is printed. The time left is that of the other steps, if each takes `seconds_a_step`."""
        width = len(str(total_steps))
        gathered = f"  gathered {self.bytes_gathered / 1e6:.2f} MB" if self.bytes_gathered else ""
        mfu = "" if self.mfu is None else f"  MFU {self.mfu:.1%}"
        left = duration((total_steps - self.step) * seconds_a_step)
        return (
            f"step {self.step:>{width}}/{total_steps}  loss {self.loss:.4f}  ppl {self.perplexity:.2f}  "
            f"lr {self.learning_rate:.2e}  grad {self.grad_norm:.3f}  {self.tokens_per_s:,.0f} tok/s{mfu}  "
            f"{self.peak_memory_bytes / 2**30:.2f} GiB{gathered}  {left} left"
        )

    def row(self) -> JsonObject:
        row = {**vars(self), "perplexity": self.perplexity}
        if self.mfu is None:
            del row["mfu"]
        return row


def duration(seconds: float) -> str:
    """Such as "0:02:21" or "3 days, 4:00:00"."""
    return str(timedelta(seconds=round(seconds)))


def peak_memory_bytes() -> int:
    """This process's peak memory: allocated on its GPU since a phase ended, or resident so far where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class PhaseMemory:
    """The peak memory of this process by phase of its run, on a GPU: what `--dry_run` plans, as it was.

    The numbers are the allocator's own, so that nothing waits for the GPU. Without one there are no phases: the peak of
    resident memory cannot be restarted.
    """

    def __init__(self) -> None:
        self.by_phase: dict[str, int] = {}
        """Phase -> bytes at its highest, with all that lies in memory meanwhile."""

    def end(self, phase: str) -> None:
        """End a phase, which began where the one before it ended."""
        if torch.cuda.is_available():
            self.by_phase[phase] = max(torch.cuda.max_memory_allocated(), self.by_phase.get(phase, 0))
            torch.cuda.reset_peak_memory_stats()

    @property
    def peak(self) -> int:
        """Bytes at the highest so far, whatever the phase; without a GPU of resident memory."""
        return max([peak_memory_bytes(), *self.by_phase.values()])


class MetricsLog:
    """Writes the metrics of one run. On ranks other than 0 (`enabled=False`) every call does nothing."""

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        enabled: bool,
        start_step: int = 0,
        report_to: Callable[[int], Sequence[Tracker]] | None = None,
        pending: Collection[str] = (),
    ) -> None:
        """Drop the rows after `start_step`, of a run that was interrupted after its last checkpoint, so that a resumed
        curve reads as an uninterrupted one; 0 drops all rows. `pending`: kinds of rows of `start_step` that come again.
        `report_to` starts the trackers, by default TensorBoard, for the first step of which they get numbers.
        """
        self.total_steps = total_steps
        self.enabled = enabled
        self._start_step = start_step
        self._started = time.monotonic()
        self._trackers: Sequence[Tracker] = ()
        if not enabled:
            return
        self._path = folder / METRICS_FILE
        newest = _keep_rows(self._path, start_step, pending)
        self._file = self._path.open("a", encoding="utf-8")
        first_step = start_step if pending or not start_step else start_step + 1
        self._trackers = [TensorBoard(folder, first_step)] if report_to is None else report_to(first_step)
        # TensorBoard drops whole steps: of one whose merge or evaluation comes again, what stays is given again.
        for tracker in self._trackers if pending else ():
            if isinstance(tracker, TensorBoard):
                for row in newest:
                    tracker.log(_curves(row), start_step)
        quiet = not sys.stderr.isatty()  # in a log file the lines are enough
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            disable=quiet,
        )

    @property
    def failed_trackers(self) -> list[str]:
        """Names of the services of --report_to that were given up after an error."""
        return [tracker.name for tracker in self._trackers if isinstance(tracker, Service) and tracker.has_failed]

    def step(self, metrics: StepMetrics) -> None:
        self._record(metrics.row())
        # The mean of all steps of this process, with what lies between them: a single step says little.
        seconds_a_step = (time.monotonic() - self._started) / max(metrics.step - self._start_step, 1)
        logger.info(metrics.line(self.total_steps, seconds_a_step))

    def evaluation(self, step: int, perplexities: dict[str, float], before: Numbers | None = None) -> None:
        """The perplexity of each evaluation set after `step`; `before`: before the first step.

        Trackers also get the change since then in per cent: positive where the model has forgotten.
        """
        self.record("eval", step, perplexities)
        if step == self._start_step:
            self._started = time.monotonic()  # the steps begin now: what came before says nothing of their time
        self._log(
            {f"{FORGETTING}/{name}": value for name, value in change(before or {}, perplexities).items()},
            step,
        )
        values = "  ".join(f"{name} {value:.3f}" for name, value in perplexities.items())
        logger.info(f"step {step}  perplexity {values}")

    def tasks(self, step: int, results: Mapping[str, Numbers]) -> None:
        """The metrics of each task after `step`: {task: {metric: value}}."""
        self.record("tasks", step, results)
        for name, metrics in results.items():
            logger.info(
                f"step {step}  {name}  " + "  ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
            )

    def record(self, kind: str, step: int, facts: Facts | float) -> None:
        """A row of this kind: "eval", "merge", "tasks" or "sources", whose facts are those of each task or
        source; or the name of a hook's term of the loss, and its value at the beginning of the step."""
        self._record({"step": step, kind: facts})

    def summary(self, facts: Facts) -> None:
        """The results of the run, for the trackers."""
        for tracker in self._trackers:
            tracker.summary(facts)

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`."""
        if self.enabled:
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        if self.enabled:
            self._bar.close()
            self._file.close()
            for tracker in self._trackers:
                tracker.close()

    def _record(self, row: JsonObject) -> None:
        """A row of metrics.jsonl, and its curves."""
        if self.enabled:
            with disk_errors(self._path.parent):
                self._file.write(json.dumps(plain_json(row), allow_nan=False) + "\n")
                self._file.flush()
        self._log(_curves(row), row["step"])

    def _log(self, numbers: Numbers, step: int) -> None:
        if numbers:
            for tracker in self._trackers:
                tracker.log(numbers, step)


def _curves(row: Facts) -> dict[str, float]:
    """Curve -> number of a row of metrics.jsonl."""
    if "loss" in row:
        return {tag: row[name] * unit for name, (tag, unit) in STEP_TAGS.items() if row.get(name) is not None}
    numbers: dict[str, float] = {}
    for name, facts in row.items():
        if name in GROUPS:
            values = flattened(facts, f"{GROUPS[name]}/", "/").items()
            numbers |= {curve: value for curve, value in values if isinstance(value, (int, float))}
        elif name != "step" and facts is not None:
            numbers[f"9_research/{name}"] = facts
    return numbers


def plain_json(value: Any) -> Any:
    """`value` with null for NaN and infinity, which JSON does not have (a perplexity may overflow)."""
    if isinstance(value, dict):
        return {key: plain_json(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _keep_rows(path: Path, last_step: int, pending: Collection[str]) -> list[JsonObject]:
    """Returns the rows of the last step that stay."""
    if last_step == 0 or not path.exists():
        path.unlink(missing_ok=True)
        return []
    lines = []
    newest = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        row = _row_of(line)
        if row is None or row["step"] > last_step:
            continue
        if row["step"] == last_step:
            if any(kind in row for kind in pending):
                continue
            newest.append(row)
        lines.append(line + "\n")
    with atomic_path(path) as partial:
        partial.write_text("".join(lines), encoding="utf-8")
    return newest


def _row_of(line: str) -> JsonObject | None:
    """The row with its step; None for a damaged one, such as one that a killed process was writing."""
    try:
        row = json.loads(line)
        return row if isinstance(row["step"], int) else None
    except (ValueError, TypeError, KeyError):
        return None
