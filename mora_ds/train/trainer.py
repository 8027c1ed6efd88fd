"""The training loop: batch, loss, backward, optimizer step; then merge, evaluate and
save when due.

A batch is a pure function of (seed, step, global batch size). Micro-batch m of replica
r holds the global rows [(m * replicas + r) * B, ... + B) for a micro-batch size of B.
The loss is the mean over all predicted tokens of the global batch, so neither the
number of processes nor that of micro-batches changes the curve.

The host waits for the device once a step, for one small all-reduce: the loss, stop
requests, and the number of labels of the next batch, by which its losses are divided.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress

import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.adapters.domains import domains_of
from mora_ds.checkpoint.layout import step_of
from mora_ds.common.errors import BESIDE, RunError, Stopped, reason
from mora_ds.config.forgetting import report
from mora_ds.engine import zero
from mora_ds.engine.traffic import CollectiveCounter
from mora_ds.models.base import BaseChanged
from mora_ds.models.loss import perplexity, row_nll, token_nll
from mora_ds.remora.schedule import Schedule
from mora_ds.runtime import signals
from mora_ds.train.evaluator import Evaluator
from mora_ds.train.job import Job
from mora_ds.train.loader import (
    BatchLoader,
    MicroBatch,
    NotFinite,
    Replica,
    labels_in,
    require_finite,
)
from mora_ds.train.metrics import MetricsLog, PhaseMemory, source_facts
from mora_ds.train.profile import step_profiler
from mora_ds.train.run import Run

logger = logging.getLogger(__name__)

PROBE_ROWS = 2
"""The first sequences of the corpus, whose loss is measured before and after a
merge."""

BETWEEN = "between_steps"
"""The phase of memory that is neither a step nor a merge nor a save, such as
evaluations."""

PATIENCE_S = 60.0
"""Seconds that a failing run waits for a checkpoint that is written in the
background."""


class Trainer:
    """Trains one job to the end of its schedule."""

    def __init__(self, job: Job, schedule: Schedule, log: MetricsLog) -> None:
        training = job.arguments.training
        self.job = job
        self.ranks = job.start.ranks
        self.schedule = schedule
        self.total_steps = schedule.total_steps
        self.training = training
        self.log = log
        self.engine = job.engine
        self.state = job.state
        self.domains = domains_of(job.loaded.model)
        self.train_data = job.data.train
        self.last_checkpoint = job.start.checkpoint
        self.memory = PhaseMemory()
        self.counter = CollectiveCounter(job.run.base_tensors if job.is_trained else ())
        self.replica = Replica(job.engine, training.ranks_per_replica, job.sequence)
        self.evaluator = Evaluator(job, self.replica, log)
        self.loader = BatchLoader(
            self.train_data, self.replica, training, self.total_steps
        )
        self.rows_per_step = self.train_data.rows_per_step
        self._next_labels: float | None = None
        """Labels of the next global batch; None before the first step of this
        process."""
        self.bytes_gathered_per_step = 0
        self._stop_asked = False
        """Whether any process was asked to stop; the same on all processes."""
        self._saved_step: int | None = None
        """The step of the newest checkpoint; None where that does not have the present
        model: after a merge, and after a resume from an older checkpoint."""
        checkpoint = job.start.checkpoint
        if checkpoint is not None and job.is_trained:

            def is_latest() -> bool:
                latest = job.run.checkpoints.latest()
                return latest is not None and latest.resolve() == checkpoint.resolve()

            if self.ranks.on_first("newest checkpoint", is_latest):
                self._saved_step = self.state.step
        self._mixture = self.train_data if len(self.train_data.names) > 1 else None

    @property
    def is_finished(self) -> bool:
        """Whether the run had ended before it was resumed, last evaluation included."""
        at_end = self.state.step == self.total_steps
        return self.state.finished and (at_end or self.evaluator.forgotten is not None)

    def run(self) -> None:
        """Train from `state.step` to the end.

        Raises `RunError` when the loss becomes NaN or infinite or a checkpoint could
        not be written, and `Stopped`, on all processes at the same step and after a
        checkpoint, when one of them was asked to stop.
        """
        try:
            self._run()
        except BaseException as error:
            with suppress(RunError):  # `error` is the one to report
                self.job.run.wait(PATIENCE_S)
            if isinstance(error, (NotFinite, BaseChanged)):
                raise RunError(self._message_of(error)) from error
            raise
        self.job.run.wait()

    def _message_of(self, error: NotFinite | BaseChanged) -> str:
        """The message of an error that all processes have, with the checkpoint from
        which the run can be resumed."""
        try:
            # Weights of the base that were overwritten may be what made a NaN: that is
            # then the error to report.
            self.job.run.check_base()
        except BaseChanged as changed:
            error = changed
        last = self.last_checkpoint
        newest = f"Newest checkpoint: {last or 'none was written'}"
        if last is not None and step_of(last) == self.state.step:
            newest += ", which holds this model: resume from the one before it"
        if isinstance(error, BaseChanged):
            return f"{error}. {newest}"
        advice = "A lower --learning_rate, a longer --warmup_steps or a smaller --max_grad_norm may help"
        return f"{error}. {newest}. {advice}"

    def _run(self) -> None:
        state = self.state
        evaluator = self.evaluator
        if self.is_finished:
            done = f"all {state.step} steps of this run are done: nothing left to train"
            logger.info(evaluator.forgotten or done)
            return
        state.finished = False
        self.memory.end("start")
        if self.schedule.merge_every:
            merges = self.schedule.merges_left(state.step)
            steps = f", after steps {merges[0]} to {merges[-1]}" if merges else ""
            logger.info(f"merges still to come: {len(merges)}{steps}")
            if not merges and not state.merges:
                logger.warning(
                    f"--merge_every {self.schedule.merge_every}: this run of {self.total_steps} steps has no merge "
                    "and trains plain MoRA: the re-warmup after a merge must end before the run does"
                )
        profiler = None
        if self.training.profile is not None and self.ranks.is_first:
            profiler = step_profiler(
                self.training.profile, state.step, self.job.start.folder, state.failures
            )
        with signals.deferred(), self.counter.counting(), profiler or nullcontext():
            if state.step == 0 and self.training.eval_on_start:
                state.perplexity_before = self._evaluate()
            is_pending = state.merge_pending or state.evaluation_pending
            if is_pending and state.step < self.total_steps:
                self._do_what_is_pending()
            while state.step < self.total_steps and not evaluator.forgotten:
                if profiler is not None:
                    profiler.step()
                self.train_step()
            self._finish()

    # -- one optimizer step ------------------------------------------------------------

    def train_step(self) -> None:
        """Train on the next batch, log the step, and do what is due after it."""
        state = self.state
        device = self.engine.device
        step = state.step + 1
        started = time.perf_counter()
        self.memory.end(BETWEEN)
        self.counter.reset()
        # The schedule is that of the MoRA matrices. What is trained beside them follows
        # it too, scaled to a peak of its own.
        learning_rate = self.schedule.learning_rate(state.step, state.merges)
        factor_of_others = (
            self.training.other_learning_rate / self.training.peak_learning_rate
        )
        zero.set_learning_rate(self.engine, learning_rate, factor_of_others)

        # A step has one all-reduce: the labels of this batch were summed in that of the
        # step before it. The first step of a process sums them here.
        batch = self.loader.take(state.step)
        if self._next_labels is None:
            self._next_labels = self.replica.sum(labels_in(batch))
        # Where no label counts, as with documents of one token, the loss is 0, not 0 / 0.
        total_labels = max(self._next_labels, 1.0)
        # DeepSpeed divides a loss by the number of micro-batches, and averages
        # gradients over ranks. Both are undone here, and the summed loss is divided by
        # the tokens of the global batch instead.
        micro_batches = self.training.gradient_accumulation_steps
        scale = micro_batches * self.replica.world / total_labels
        nll = torch.zeros(1, dtype=torch.float64, device=device)
        # Of a mixture: the summed loss of each source in row 0, its labels in row 1.
        n_sources = len(self._mixture.names) if self._mixture else 0
        by_source = torch.zeros(2, n_sources, dtype=torch.float64, device=device)

        self.engine.train()
        for micro_batch in batch:
            sources = [self.train_data.names[source] for source in micro_batch.sources]
            with self.domains.of_rows(sources):
                batch_nll = self.nll(micro_batch, by_source)
                self.engine.backward(batch_nll * scale)
            self.memory.end("forward_backward")
            # DeepSpeed counts the calls: only that of the last micro-batch steps the
            # optimizer.
            self.engine.step()
            self.memory.end("optimizer_step")
            nll += batch_nll.detach()

        # The one place of a step where the host waits for the device. The base's files,
        # which may lie on a network, are looked at in the steps that are logged.
        base_changed = self._is_logged(step) and bool(self.job.run.changed_base_files())
        labels_ahead = self.loader.labels_ahead(step)
        total_nll, *source_sums, self._next_labels = self._sum_and_hear_requests(
            [nll, by_source.flatten()], [labels_ahead], base_changed
        )
        mean_loss = total_nll / total_labels

        state.step = step
        state.at_peak = self.schedule.is_at_peak(step)
        state.tokens += self.rows_per_step * self.train_data.seq_len
        self.bytes_gathered_per_step = self.counter.gathered_bytes
        require_finite(mean_loss, f"the loss is {mean_loss} at step {step}", step)
        if self._is_logged(step):
            seconds = time.perf_counter() - started
            self._log_step(mean_loss, learning_rate, seconds, source_sums)
        self.after_step()

    def nll(self, micro_batch: MicroBatch, by_source: Tensor) -> Tensor:
        """The summed loss of a micro-batch. Of a mixture it is added to `by_source`
        too, (2, sources), without waiting for the device."""
        rows = self.replica.on_device(micro_batch.rows)
        if self._mixture is None:
            return token_nll(self.engine, rows)
        losses = row_nll(self.engine, rows)
        labels = torch.tensor(micro_batch.labels, dtype=torch.float64)
        labels = labels.to(losses.device, non_blocking=True)
        index = torch.tensor(micro_batch.sources).to(losses.device, non_blocking=True)
        by_source.index_add_(1, index, torch.stack([losses.detach().double(), labels]))
        return losses.sum()

    def _sum_and_hear_requests(
        self,
        on_device: Sequence[Tensor] = (),
        on_host: Sequence[float] = (),
        base_changed: bool = False,
    ) -> list[float]:
        """The sums over all processes of vectors on the device and of numbers on the
        host, in that order. The host waits for the device here.

        A last number tells whether any process was asked to stop, or finds the base's
        files changed. Both are rare: a second collective then tells which of them it
        is.
        """
        has_news = base_changed or signals.requested()
        host = torch.tensor([*on_host, float(has_news)], dtype=torch.float64)
        sums = torch.cat([*on_device, host.to(self.engine.device, non_blocking=True)])
        dist.all_reduce(sums)
        *totals, news = sums.tolist()
        if news > 0:
            self.job.run.check_base()
            self._stop_asked |= self.replica.sum(signals.requested()) > 0
        return totals

    def _is_logged(self, step: int) -> bool:
        return step % self.training.logging_steps == 0 or step == self.total_steps

    def _log_step(
        self,
        loss: float,
        learning_rate: float,
        seconds: float,
        source_sums: Sequence[float],
    ) -> None:
        """Log the step just done. `source_sums`: losses, then labels, of a mixture's
        sources."""
        step = self.state.step
        tokens = self.rows_per_step * self.train_data.seq_len
        row = {
            "step": step,
            "loss": loss,
            "perplexity": perplexity(loss),
            "learning_rate": learning_rate,
            "grad_norm": zero.gradient_norm(self.engine),
            "tokens": self.state.tokens,
            "tokens_per_s": tokens / seconds,
            "tokens_per_s_per_rank": tokens / seconds / self.replica.world,
            "step_time_s": seconds,
            "peak_memory_bytes": self.memory.peak,
            "bytes_gathered": self.bytes_gathered_per_step,
        }
        utilization = self.job.utilization(tokens / seconds)
        if utilization is not None:
            row["mfu"] = utilization
        self.log.step(row)
        if self._mixture is not None:
            source_tokens = self._mixture.tokens(step)
            self.log.record("sources", step, source_facts(source_sums, source_tokens))

    # -- what follows a step -----------------------------------------------------------

    def after_step(self) -> None:
        """Merge, evaluate and save where that is due. A checkpoint that is due comes
        first, and says what is pending: whatever happens in a merge or an evaluation,
        the step is not lost."""
        state = self.state
        training = self.training
        state.merge_pending = self.schedule.merges_after(state.step)
        # The last evaluation is that of `_finish`.
        state.evaluation_pending = False
        if training.eval_steps and state.step < self.total_steps:
            state.evaluation_pending = state.step % training.eval_steps == 0
        if state.merge_pending and self._save_is_due:
            self._save()
        self._do_what_is_pending()

    def _do_what_is_pending(self) -> None:
        """What follows the newest step, after it or when a run resumes there."""
        merges = self.state.merge_pending
        if merges:
            self._merge()
        self._leave_if_asked(hear_again=merges)
        if self._save_is_due and self._saved_step != self.state.step:
            self._save()
        if self.state.evaluation_pending:
            self._evaluate()
            # The best checkpoint so far is written at once, whatever --save_steps says:
            # no later one has this model.
            if self.state.best_step == self.state.step:
                self._save()
        if self._save_is_due:
            self._leave_if_asked()

    @property
    def _save_is_due(self) -> bool:
        """Whether --save_steps asks for a checkpoint of the newest step, if not the
        last."""
        step = self.state.step
        every = self.training.save_steps
        return bool(every) and step % every == 0 and 0 < step < self.total_steps

    def _leave_if_asked(self, hear_again: bool = True) -> None:
        """Save and raise `Stopped` once a process was asked to stop. `hear_again`:
        exchange requests first (collective), as the step's own exchange may be long
        ago."""
        if hear_again:
            self._sum_and_hear_requests()
        if not self._stop_asked:
            return
        step = self.state.step
        if step > 0 and self._saved_step != step:
            self._save()
        self.job.run.wait()
        signals.ignore_requests()
        self.log.close()
        # No process leaves before all ignore signals and the end of others.
        dist.barrier()
        if step == 0:
            raise Stopped("stopped before the first step, with nothing to save")
        raise Stopped(
            f"stopped at step {step}, saved to {self.last_checkpoint}; --resume_from_checkpoint auto goes on"
        )

    def _save(self) -> None:
        """Write a checkpoint, once the loss of the probe batch is finite: a step with a
        finite loss may leave NaN in the MoRA matrices, and a checkpoint of those would
        pass for a good one."""
        step = self.state.step
        self.memory.end(BETWEEN)
        # Before the probe, which reads the base: to read beyond the end of a mapped
        # file that has become shorter kills the process.
        self.job.run.check_base()
        # Of all ranks, since one rank alone may read a damaged base.
        loss = self.replica.sum(self._probe_loss())
        problem = f"after step {step} the loss of the probe batch is {loss}"
        require_finite(loss, problem, step)
        self.state.stream = self.train_data.states_at(step)
        keep = self.training.save_total_limit
        if keep is not None and self.state.evaluation_pending:
            # Should the evaluation find NaN, the checkpoint before this one is the last
            # good one.
            keep = max(keep, 2)
        self.last_checkpoint = self.job.run.save(step, keep)
        self._saved_step = step
        self.memory.end("save")

    def _merge(self) -> None:
        self.memory.end(BETWEEN)
        run = self.job.run
        assert isinstance(run, Run), "full training has no merges"
        merge = run.merge(self.state.step, self._probe_loss)
        self.state.merge_pending = False
        self._saved_step = None  # what was saved before is not the merged model
        self.memory.end("merge")
        self.log.record("merge", merge.step, merge.row())
        logger.info(str(merge))

    def _finish(self) -> None:
        state = self.state
        if state.step < self.total_steps:
            done = f"{state.step} of {self.total_steps}"
            logger.info(f"stopping after step {done}: {self.evaluator.forgotten}")
        else:
            state.evaluation_pending = bool(self.evaluator.sets or self.evaluator.tasks)
            if state.evaluation_pending and self._saved_step != state.step:
                self._save()
            self._evaluate()
        for line in report(state.perplexity_before, state.perplexity_last):
            logger.info(line)
        state.finished = True
        self._save()

    # -- evaluation --------------------------------------------------------------------

    def _evaluate(self) -> dict[str, float]:
        """The perplexity of each evaluation set. Where an evaluation or a task fails,
        the failure is logged and training goes on; before the first step, when nothing
        can be lost, it ends the run."""
        self.job.run.check_base()
        step = self.state.step
        state_before = dict(vars(self.state))
        perplexities: dict[str, float] = {}
        failure = None
        try:
            perplexities = self.evaluator.evaluate(before_batch=self._leave_if_asked)
        except BESIDE as error:
            # All ranks find a broken model alike, and none can train on. Once a rank
            # was asked to stop, the error is that of the run's last checkpoint.
            is_of_model = isinstance(error, (NotFinite, BaseChanged))
            if step == 0 or is_of_model or self._stop_asked:
                raise
            failure = f"{type(error).__name__}: {reason(error)}"
        # A rank that has failed alone must not meet the others in a collective of the
        # evaluation, whose sums would be wrong from there on: it waits for them at this
        # check, which has a group of its own.
        what = f"evaluation after step {step}"
        failures = [
            line for line in self.ranks.gather(what, failure) if line is not None
        ]
        if failures:
            # Rank 0 alone writes: where that has failed, the others have the results in
            # their states, and would save a best checkpoint, or end the run, without
            # it.
            vars(self.state).update(state_before, evaluation_pending=False)
            self.state.failures.append(f"{what}: {failures[0]}")
            logger.error(f"{self.state.failures[-1]}. Training goes on")
        return perplexities

    def _probe_loss(self) -> float:
        """Mean loss of the probe batch, which is of the first source, the same in every
        replica. A NaN in any MoRA matrix makes it NaN, of whichever domain."""
        rows = self.train_data.first_rows(PROBE_ROWS)
        first_domain = next(iter(self.domains.names), None)
        return self.replica.replica_nll(rows, first_domain)
