"""What a run reports: log line and progress bar (rank 0), TensorBoard and `metrics.jsonl`."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mora_ds.checkpoint.layout import METRICS_FILE
from mora_ds.data import IGNORED
from mora_ds.files import disk_errors


class SourceLosses:
    """Of one optimizer step. `names` are the sources'."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._sums: Tensor | None = None

    def reset(self) -> None:
        """A step begins."""
        self._sums = None

    def add(self, sources: Sequence[int], row_nll: Tensor, labels: Tensor) -> None:
        """A micro-batch: (B,) source of each row, (B,) its summed loss, (B, T) its labels, here or of this part."""
        predicted = (labels != IGNORED).sum(dim=-1)
        values = torch.stack([row_nll.detach().double(), predicted.double()])
        if self._sums is None:  # where the losses are: nothing waits for the device before `sums`
            self._sums = values.new_zeros(2, len(self.names))
        self._sums.index_add_(1, torch.tensor(sources, device=values.device), values)

    def sums(self) -> list[float]:
        """This rank's, to be added up over all ranks: losses, then predicted tokens."""
        return [] if self._sums is None else self._sums.flatten().tolist()

    def facts(self, sums: Sequence[float], tokens: dict[str, int]) -> dict[str, dict[str, Any]]:
        """{source: loss, perplexity, tokens} from the sums over all ranks; no loss where the step had none of it.
        `tokens`: of each source since the run's first step."""
        nll, predicted = torch.tensor(sums, dtype=torch.float64).view(2, -1).tolist()
        facts = {}
        for name, value, count in zip(self.names, nll, predicted, strict=True):
            loss = value / count if count else None
            ppl = None if loss is None else perplexity(loss)
            facts[name] = {"loss": loss, "perplexity": ppl, "tokens": tokens[name]}
        return facts


@dataclass(frozen=True)
class StepMetrics:
    """One logged optimizer step. `loss` is the mean over all predicted tokens of the global batch."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    """Tokens read since the first step, all ranks together."""
    tokens_per_s: float
    tokens_per_s_per_rank: float
    step_time_s: float
    peak_memory_bytes: int
    bytes_gathered: int

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    def line(self, total_steps: int) -> str:
        return (
            f"step {self.step}/{total_steps}  loss {self.loss:.4f}  ppl {self.perplexity:.2f}  "
            f"lr {self.learning_rate:.2e}  grad {self.grad_norm:.3f}  "
            f"{self.tokens_per_s:,.0f} tok/s ({self.tokens_per_s_per_rank:,.0f}/rank)  {self.step_time_s:.3f} s  "
            f"mem {self.peak_memory_bytes / 2**30:.2f} GiB  gathered {self.bytes_gathered / 1e6:.2f} MB"
        )

    def row(self) -> dict[str, Any]:
        return {**vars(self), "perplexity": self.perplexity}


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def peak_memory_bytes() -> int:
    """Highest memory of this rank so far: allocated on the device where there is one, resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class MetricsLog:
    """Sinks of one run. On ranks other than 0 (`enabled=False`) every call does nothing."""

    def __init__(self, folder: Path, total_steps: int, enabled: bool, start_step: int = 0) -> None:
        """Rows after `start_step` (written by a run that was interrupted later than its last checkpoint) are dropped,
        so that a resumed curve reads as an uninterrupted one. 0 is a run's beginning: all rows are dropped."""
        self.total_steps, self.enabled = total_steps, enabled
        if not enabled:
            return
        self._path = folder / METRICS_FILE
        _keep_rows(self._path, start_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1 if start_step else 0)
        quiet = not sys.stderr.isatty()  # in a log file the lines are enough
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, disable=quiet)

    def step(self, metrics: StepMetrics) -> None:
        if not self.enabled:
            return
        self._write(metrics.row())
        for name, value in metrics.row().items():
            if name != "step":
                self._board.add_scalar(f"train/{name}", value, metrics.step)
        self.say(metrics.line(self.total_steps))

    def evaluation(self, step: int, perplexities: dict[str, float]) -> None:
        if not self.enabled:
            return
        self._write({"step": step, "eval": perplexities})
        for name, value in perplexities.items():
            self._board.add_scalar(f"eval/{name}", value, step)
        self.say(f"step {step}  perplexity " + "  ".join(f"{name} {value:.3f}" for name, value in perplexities.items()))

    def merge(self, step: int, facts: dict[str, Any]) -> None:
        if not self.enabled:
            return
        self._write({"step": step, "merge": facts})
        for name, value in facts.items():
            if value is not None:
                self._board.add_scalar(f"merge/{name}", value, step)

    def sources(self, step: int, facts: dict[str, dict[str, Any]]) -> None:
        """Loss, perplexity and tokens of every source of the mixture in `step`."""
        if not self.enabled:
            return
        self._write({"step": step, "sources": facts})
        for name, values in facts.items():
            for key, value in values.items():
                if value is not None:
                    self._board.add_scalar(f"sources/{name}/{key}", value, step)

    def stall(self, step: int, facts: dict[str, Any]) -> None:
        """Where `stall.StallRule` stands after `step`; `facts` as it gives them."""
        if not self.enabled:
            return
        self._write({"step": step, "stall": facts})
        for name, value in facts.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"stall/{name}", value, step)

    def alignment(self, step: int, share: float) -> None:
        """Of the deltas' energy in the weights' leading subspaces, as `step` began."""
        if self.enabled:
            self._write({"step": step, "alignment": share})
            self._board.add_scalar("train/alignment", share, step)

    def advance(self, step: int) -> None:
        if self.enabled:
            self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        if self.enabled:
            self._bar.write(text)

    def close(self) -> None:
        if self.enabled:
            self._bar.close()
            self._board.close()
            self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        with disk_errors(self._path.parent):
            self._file.write(json.dumps(plain_json(row), allow_nan=False) + "\n")
            self._file.flush()


def plain_json(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not have (a perplexity may overflow)."""
    if isinstance(value, dict):
        return {key: plain_json(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _keep_rows(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line + "\n" for line in lines if 0 < last_step >= _step_of(line)]
    beside = path.with_suffix(".tmp")
    with disk_errors(path.parent):
        beside.write_text("".join(kept), encoding="utf-8")
        beside.replace(path)


def _step_of(line: str) -> float:
    """After every other one for a line that is damaged, or that a killed process was writing."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf
