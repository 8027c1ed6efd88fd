"""The loop: a batch -> loss -> backward -> step -> merge, evaluate, log, save when it is time.

A batch is a pure function of (seed, step, global batch size); micro-batch m of replica r (a rank, or the ranks that
share its work) holds the global rows [(m * replicas + r) * B, ... + B). The loss is the mean over all predicted tokens
of the global batch, whichever rank and micro-batch they fall into, so neither the number of ranks nor of micro-batches
changes the curve.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.adapters.alignment import Alignment
from mora_ds.adapters.domains import Domains
from mora_ds.checkpoint.state import TrainerState
from mora_ds.config.forgetting import Watch, report
from mora_ds.data import IGNORED, Mixture, PackedDataset, StreamMixture, TrainData
from mora_ds.engine import zero
from mora_ds.engine.traffic import CollectiveCounter
from mora_ds.errors import RunError, Stopped
from mora_ds.models.loss import row_nll, token_nll
from mora_ds.remora.merge import MergeReport
from mora_ds.remora.schedule import Schedule
from mora_ds.remora.schedule_text import start_lines
from mora_ds.remora.stall import StallRule
from mora_ds.runtime import signals
from mora_ds.train.metrics import MetricsLog, SourceLosses, StepMetrics, peak_memory_bytes, perplexity
from mora_ds.train.replicas import Share
from mora_ds.train.stall_watch import StallWatch


@dataclass(frozen=True)
class LoopSettings:
    """When things happen, in optimizer steps; 0 means never (but see each)."""

    total_steps: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    eval_batch_size: int
    logging_steps: int = 1
    eval_steps: int = 0
    eval_on_start: bool = True
    max_eval_batches: int | None = None
    save_steps: int = 0
    """0: one checkpoint, at the end."""
    merge_at_end: bool = False
    first_batch: int = 0
    """Number of the first step's batch in the order of the data."""
    others_rate: float = 1.0
    """Learning rate of what is trained beside the squares, as a share of theirs."""
    stall: StallRule | None = None
    """What makes a merge due where the schedule waits for a stall."""


PROBE_ROWS = 2
"""Sequences of the batch whose loss is measured before and after a merge: the first of the corpus, on every rank."""

PATIENCE_S = 60.0
"""How long a run that fails waits for a checkpoint that is being written in the background."""


class Merger(Protocol):
    probe: Callable[[], float] | None

    def merge(self, step: int) -> MergeReport: ...


@dataclass
class Trainer:
    """One run on one engine. `save(state)` writes a checkpoint on all ranks and returns its folder."""

    share: Share
    train_data: TrainData
    eval_data: Mapping[str, PackedDataset]
    schedule: Schedule
    settings: LoopSettings
    log: MetricsLog
    counter: CollectiveCounter
    state: TrainerState
    save: Callable[[TrainerState], Path]
    merger: Merger | None = None
    wait: Callable[[float | None], None] = lambda timeout_s: None
    """Until the checkpoint that is being written is there, or so many seconds; raises what went wrong with it."""

    watch: Watch = field(default_factory=lambda: Watch({}, {}))
    """What is looked at after every evaluation."""
    domains: Domains = field(default_factory=lambda: Domains(()))
    """Where the domains of rows are said; without names where the model has none."""
    eval_domains: Mapping[str, str | None] = field(default_factory=dict)
    """The domain that an evaluation set is read as."""
    alignment: Alignment | None = None
    """A further loss on the squares; of the reported loss it is no part."""

    def __post_init__(self) -> None:
        self.engine = self.share.engine
        self.last_checkpoint: Path | None = None
        if self.merger is not None:
            self.merger.probe = self._probe_loss
        self.bytes_gathered_per_step = 0
        self._stop_asked = False
        """Whether some rank was asked to stop; the same on all ranks."""
        self._saved_step: int | None = None
        rule = self.settings.stall
        self._stall = StallWatch(self.share, self.schedule, rule, self.log, self.state, self._stop_unless_finite)
        data = self.train_data
        self._mixture = data if isinstance(data, Mixture) and len(data.names) > 1 else None
        self._source_losses = SourceLosses(self._mixture.names if self._mixture else [])

    @property
    def rows_per_step(self) -> int:
        """Global batch size, in sequences."""
        return self.settings.micro_batch_size * self.settings.gradient_accumulation_steps * self.share.replicas

    @property
    def is_finished(self) -> bool:
        """Whether a run that was resumed had come to its end, last evaluation and checkpoint included."""
        return self.state.finished and (self.state.step == self.settings.total_steps or self._forgotten is not None)

    def run(self) -> TrainerState:
        """Train from `state.step` to the end. Raises `RunError` when the loss is no number any more or a checkpoint
        could not be written, and `Stopped` when a rank was asked to stop, all ranks at the same step and after a
        checkpoint."""
        try:
            state = self._run()
        except BaseException:
            with suppress(RunError):  # what ended the run is what is told
                self.wait(PATIENCE_S)
            raise
        self.wait(None)
        return state

    def _run(self) -> TrainerState:
        if self.is_finished:
            self.log.say(self._forgotten or f"all {self.state.step} steps of this run are done: nothing left to train")
            return self.state
        self.state.finished = False
        settings, state = self.settings, self.state
        for line in start_lines(self.schedule, settings.stall, settings.merge_at_end, state.step, state.merges):
            self.log.say(line)
        with signals.deferred(), self.counter.counting():
            if self.state.step == 0 and self.settings.eval_on_start:
                self.state.perplexity_before = self.evaluate()
            if self.state.evaluation_pending:
                self._evaluate_and_keep()
            while self.state.step < self.settings.total_steps and not self._forgotten:
                self._step()
            self._finish()
        return self.state

    @property
    def _logs_this_step(self) -> bool:
        return self.state.step % self.settings.logging_steps == 0 or self.state.step == self.settings.total_steps

    # -- one optimizer step ----------------------------------------------------------------------------------------

    def _step(self) -> None:
        started = time.perf_counter()
        self.counter.reset()
        rate = self.schedule.learning_rate(self.state.step, self.state.merges)
        zero.set_learning_rate(self.engine, rate, self.settings.others_rate)
        loss = self._forward_backward()
        self.state.step += 1
        self.state.tokens += self.rows_per_step * self.train_data.seq_len
        self.bytes_gathered_per_step = self.counter.gathered_bytes
        self._stop_unless_finite(loss, f"the loss is {loss} at step {self.state.step}")
        self._stall.note(loss)
        if self._logs_this_step:
            self.log.step(self._metrics(loss, rate, time.perf_counter() - started))
            self._log_sources()
            if self.alignment is not None:
                self.log.alignment(self.state.step, self.alignment.share.item())
        self.log.advance(self.state.step)
        self._after_step()

    def _forward_backward(self) -> float:
        """All micro-batches and the optimizer's step. Returns the global mean loss."""
        micro_batches = [self._micro_batch(index) for index in range(self.settings.gradient_accumulation_steps)]
        predicted = sum(int((batch["labels"] != IGNORED).sum()) for batch in micro_batches)
        total_predicted = max(self.share.sum(predicted), 1.0)
        # DeepSpeed divides by the number of micro-batches and averages over ranks: undo both, divide by tokens.
        scale = self.settings.gradient_accumulation_steps * self.share.world / total_predicted
        nll = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        self.engine.train()
        self._source_losses.reset()
        for index, batch in enumerate(micro_batches):
            with nullcontext() if self.alignment is None else self.alignment.hearing():
                batch_nll = self._nll(index, batch)
            loss = batch_nll * scale
            self.engine.backward(loss if self.alignment is None else loss + self.alignment.loss())
            self.engine.step()
            nll += batch_nll.detach()
        total, *self._source_sums = self._sums_and_requests([nll.item(), *self._source_losses.sums()])
        return total / total_predicted

    def _nll(self, index: int, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss of micro-batch `index`, noted by source where there are several."""
        if self._mixture is None:
            return token_nll(self.engine, batch)
        sources = self._mixture.sources_of(*self._place(index))
        if self.domains.names:  # until the next micro-batch: with checkpointing, backward asks again
            self.domains.set([self._mixture.names[source] for source in sources])
        rows = row_nll(self.engine, batch)
        self._source_losses.add(sources, rows, batch["labels"])
        return rows.sum()

    def _place(self, index: int) -> tuple[int, int, slice]:
        """(batch, its size, rows) of this rank's micro-batch `index` in the order of the data."""
        size = self.settings.micro_batch_size
        first = (index * self.share.replicas + self.share.replica) * size
        return self.settings.first_batch + self.state.step, self.rows_per_step, slice(first, first + size)

    def _micro_batch(self, index: int) -> dict[str, Tensor]:
        return self.share.rows(self.train_data.batch(*self._place(index)))

    def _sums_and_requests(self, values: list[float]) -> list[float]:
        """The sums over ranks, and with them, in the same collective, whether any of them was asked to stop."""
        numbers = [*values, float(signals.requested())]
        everyone = torch.tensor(numbers, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(everyone)
        *totals, requests = everyone.tolist()
        self._stop_asked |= requests > 0
        return totals

    def _stop_unless_finite(self, value: float, what: str) -> None:
        if math.isfinite(value):
            return
        if self.state.step == 0:
            raise RunError(f"{what}, before any training: the model itself is broken, or needs another dtype")
        good = self.last_checkpoint or "none was written"
        raise RunError(
            f"{what}. Last good checkpoint: {good}. "
            "A lower --learning_rate, a longer --warmup_steps or a smaller --max_grad_norm may help"
        )

    # -- what follows a step -----------------------------------------------------------------------------------------

    def _after_step(self) -> None:
        step, settings = self.state.step, self.settings
        at_end, merges = step == settings.total_steps, self._stall.merge_is_due(self._logs_this_step)
        if merges:
            self._merge()
        self.state.evaluation_pending = bool(settings.eval_steps) and step % settings.eval_steps == 0 and not at_end
        self._leave_if_asked(ask=merges)
        if self.state.evaluation_pending:
            self._evaluate_and_keep()
        if settings.save_steps and step % settings.save_steps == 0 and not at_end:
            if self._saved_step != step:
                self._save()
            self._leave_if_asked(ask=True)

    def _leave_if_asked(self, ask: bool) -> None:
        """Save and raise `Stopped` once a rank was asked to stop; `ask`: hear them again, much time may have passed."""
        if ask:
            self._sums_and_requests([])
        if not self._stop_asked:
            return
        step = self.state.step
        if step > 0 and self._saved_step != step:
            self._save()
        self.wait(None)
        signals.settle()
        self.log.close()
        dist.barrier()  # no rank is gone before all are settled
        if step == 0:
            raise Stopped("stopped before the first step, with nothing to save")
        raise Stopped(f"stopped at step {step}, saved to {self.last_checkpoint}; --resume_from_checkpoint auto goes on")

    def _save(self) -> None:
        """Not without a look at the loss of another batch: a step may have a finite loss and leave squares that are no
        numbers, and a checkpoint of those would pass for a good one."""
        nll = self.share.sum(self._loss_to_come())
        self._stop_unless_finite(nll, f"after step {self.state.step} the loss of the next batch is {nll}")
        if isinstance(self.train_data, StreamMixture):
            self.state.stream = self.train_data.states_at(self.settings.first_batch + self.state.step)
        self.last_checkpoint = self.save(self.state)
        self._saved_step = self.state.step

    def _loss_to_come(self) -> float:
        """Of the next micro-batch; of a mixture, which may have no next one or not be able to read it, of its first
        sequences."""
        if isinstance(self.train_data, Mixture):
            return self._probe_loss()
        return self.share.nll(self.train_data.batch(*self._place(0)))[0]

    def _merge(self) -> None:
        assert self.merger is not None, "a schedule with merges needs a merger"
        report = self.merger.merge(self.state.step)
        self.state.merges.append(self.state.step)
        self.state.stall_window = []
        self.log.merge(report.step, report.row())
        self.log.say(str(report))

    def _finish(self) -> None:
        early = self.state.step < self.settings.total_steps
        if early:
            self.log.say(f"stopping after step {self.state.step} of {self.settings.total_steps}: {self._forgotten}")
        if self.settings.merge_at_end and self.state.step not in self.state.merges:
            self._merge()
        if not early or self.settings.merge_at_end:
            self.evaluate()
        for line in report(self.state.perplexity_before, self.state.perplexity_last):
            self.log.say(line)
        self.state.finished = True
        self._save()

    def _metrics(self, loss: float, rate: float, seconds: float) -> StepMetrics:
        tokens = self.rows_per_step * self.train_data.seq_len
        return StepMetrics(
            step=self.state.step,
            loss=loss,
            learning_rate=rate,
            grad_norm=zero.gradient_norm(self.engine),
            tokens=self.state.tokens,
            tokens_per_s=tokens / seconds,
            tokens_per_s_per_rank=tokens / seconds / self.share.world,
            step_time_s=seconds,
            peak_memory_bytes=peak_memory_bytes(),
            bytes_gathered=self.bytes_gathered_per_step,
        )

    def _log_sources(self) -> None:
        if self._mixture is not None:
            tokens = self._mixture.tokens(self.settings.first_batch + self.state.step)
            self.log.sources(self.state.step, self._source_losses.facts(self._source_sums, tokens))

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Perplexity of each evaluation set, over all ranks; logged, and kept in the state."""
        found = {}
        for name, data in self.eval_data.items():
            with self.domains.using(self.eval_domains.get(name)):
                nll = self.share.mean_nll(self._eval_batches(data))
            self._stop_unless_finite(nll, f"the loss on {name!r} is {nll} after step {self.state.step}")
            found[name] = perplexity(nll)
        if found:
            self.log.evaluation(self.state.step, found)
        self.state.perplexity_last, self.state.evaluation_pending = found, False
        self._note_best(found)
        return found

    def _evaluate_and_keep(self) -> None:
        """In mid-run: the checkpoint of the best evaluation is written at once, whatever --save_steps says."""
        self.evaluate()
        if self.state.best_step == self.state.step:
            self._save()

    @property
    def _forgotten(self) -> str | None:
        """Why the run is to end here, if it is."""
        return self.watch.forgotten(self.state.perplexity_before, self.state.perplexity_last)

    def _note_best(self, found: dict[str, float]) -> None:
        score = self.watch.score(found)
        if score is None or self.state.step == 0:
            return
        if self.state.best_score is None or score < self.state.best_score:
            self.state.best_step, self.state.best_score = self.state.step, score
            self.log.say(f"step {self.state.step}: the best so far by --best_by, {score:.4f}")

    def _probe_loss(self) -> float:
        """Mean loss of the corpus's first sequences, the same in every replica; of a mixture the first source's. A
        square that is no number makes it none, whichever domain it belongs to."""
        with self.domains.using(self.domains.names[0] if self.domains.names else None):
            return self.share.replica_nll(self.train_data.first_rows(PROBE_ROWS))

    def _eval_batches(self, data: PackedDataset) -> Iterator[dict[str, Tensor]]:
        """This replica's. Every rank has the same number of them, as ZeRO-3 needs."""
        replica, replicas = self.share.replica, self.share.replicas
        most = self.settings.max_eval_batches or sys.maxsize
        for index, batch in enumerate(data.eval_batches(replica, replicas, self.settings.eval_batch_size)):
            if index * replicas >= most:
                break
            self._leave_if_asked(ask=True)
            if index * replicas + replica >= most:  # the limit counts batches over all replicas
                batch["labels"].fill_(IGNORED)
            yield batch
