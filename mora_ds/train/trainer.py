"""The training loop: batch, loss, backward, optimizer step; then merge, evaluate and
save when due.

A batch is a pure function of (seed, step, global batch size). With micro-batch size B,
micro-batch m of replica r holds the sequences [(m * replicas + r) * B, ... + B) of the
global batch. The loss is the mean over all predicted tokens of the global batch, so the
loss curve depends neither on the number of ranks nor on that of micro-batches.

The host waits for the device once per step, in one small all-reduce: the loss, stop
requests, and the number of labels of the next batch, which scales the next loss.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress

import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.adapters.domains import domains_of
from mora_ds.checkpoint.layout import step_of
from mora_ds.common.errors import NON_FATAL_ERRORS, RunError, Stopped, reason
from mora_ds.common.object_store import StoreError
from mora_ds.config.forgetting import report
from mora_ds.config.lr_schedule import Schedule
from mora_ds.data.mixture import BatchLoader, MicroBatch, labels_in
from mora_ds.engine import zero
from mora_ds.engine.traffic import CollectiveCounter
from mora_ds.models.base import BaseChanged
from mora_ds.models.loss import perplexity, sequence_nll, token_nll
from mora_ds.runtime import signals
from mora_ds.train.evaluator import Evaluator
from mora_ds.train.metrics import MetricsLog, PhaseMemory, source_facts
from mora_ds.train.profile import step_profiler
from mora_ds.train.replica import NotFinite, Replica, require_finite
from mora_ds.train.run import Run
from mora_ds.train.training_setup import TrainingSetup

logger = logging.getLogger(__name__)

REFERENCE_SEQUENCES = 2
"""Number of sequences in the reference batch: the first ones of the training data. Its
loss is measured before and after a merge, and before a save."""

BETWEEN = "between_steps"
"""Name of the memory phase outside of steps, merges and saves, such as evaluations."""

SAVE_TIMEOUT_S = 60.0
"""Seconds that a failing run waits for a checkpoint that is written in the
background."""


class Trainer:
    """Trains until the schedule ends."""

    def __init__(
        self, setup: TrainingSetup, schedule: Schedule, log: MetricsLog
    ) -> None:
        training = setup.arguments.training
        self.setup = setup
        self.ranks = setup.context.ranks
        self.schedule = schedule
        self.total_steps = schedule.total_steps
        self.training = training
        self.log = log
        self.engine = setup.engine
        self.state = setup.state
        self.domains = domains_of(setup.loaded.model)
        self.train_data = setup.data.train
        self.last_checkpoint = setup.context.checkpoint
        self._written_checkpoint = self.last_checkpoint
        """The last one that is known to be written."""
        self.memory = PhaseMemory()
        self.counter = CollectiveCounter(
            setup.run.base_tensors if setup.is_trained else ()
        )
        self.replica = Replica(setup.engine, training.ranks_per_replica, setup.sequence)
        self.evaluator = Evaluator(setup, self.replica, log)
        self.loader = BatchLoader(
            self.train_data,
            self.replica.slices(
                training.per_device_train_batch_size,
                training.gradient_accumulation_steps,
            ),
            self.replica.local_part,
            self.total_steps,
            self.engine.device,
            self.ranks.world,
        )
        self.global_batch_size = self.train_data.global_batch_size
        self._next_labels: float | None = None
        """Number of labels of the next global batch; None before the first step of this
        process."""
        self.bytes_gathered_per_step = 0
        self._stop_requested = False
        """Whether any rank got a stop request; the same on all ranks."""
        self._saved_step: int | None = None
        """The step of the newest checkpoint; None if it differs from the current model:
        after a merge, and after a resume from an older checkpoint."""
        checkpoint = setup.context.checkpoint
        if checkpoint is not None and setup.is_trained:

            def is_latest() -> bool:
                latest = setup.run.checkpoints.latest()
                return latest is not None and latest.resolve() == checkpoint.resolve()

            if self.ranks.run_on_rank0("newest checkpoint", is_latest):
                self._saved_step = self.state.step
        self._mixture = self.train_data if len(self.train_data.names) > 1 else None

    @property
    def is_finished(self) -> bool:
        """Whether the run was complete before this resume, including its last
        evaluation."""
        at_end = self.state.step == self.total_steps
        return self.state.finished and (at_end or self.evaluator.forgotten is not None)

    def run(self) -> None:
        """Train from `state.step` to the end.

        Raises `RunError` if the loss becomes NaN or infinite, or if a checkpoint cannot
        be written. After a stop request to any rank, saves a checkpoint and raises
        `Stopped` on all ranks at the same step.
        """
        try:
            self._run()
        except BaseException as error:
            with suppress(RunError):  # report `error` instead
                self.setup.run.wait(SAVE_TIMEOUT_S)
            if isinstance(error, (NotFinite, BaseChanged)):
                raise RunError(self._message_of(error)) from error
            raise
        self.setup.run.wait()

    def _message_of(self, error: NotFinite | BaseChanged) -> str:
        """The message of an error that all ranks raise, with the checkpoint to resume
        from."""
        try:
            # Overwritten base weights may be the cause of a NaN: report that instead.
            self.setup.run.check_base()
        except BaseChanged as changed:
            error = changed
        last = self.last_checkpoint
        newest = f"Newest checkpoint: {last or 'none was written'}"
        if last is not None and step_of(last) == self.state.step:
            newest += ", which holds this model: resume from the previous one"
        if isinstance(error, BaseChanged):
            return f"{error}. {newest}"
        advice = "A lower --learning_rate, a longer --warmup_steps or a smaller --max_grad_norm may help"
        return f"{error}. {newest}. {advice}"

    def _run(self) -> None:
        state = self.state
        evaluator = self.evaluator
        if self.is_finished:
            done = f"all {state.step} steps of this run are done: nothing to train"
            logger.info(evaluator.forgotten or done)
            return
        state.finished = False
        self.memory.end("start")
        if self.schedule.merge_every:
            merges = self.schedule.merges_left(state.step)
            steps = f", after steps {merges[0]} to {merges[-1]}" if merges else ""
            logger.info(f"remaining merges: {len(merges)}{steps}")
            if not merges and not state.merges:
                logger.warning(
                    f"--merge_every {self.schedule.merge_every}: this run of {self.total_steps} steps has no merge: "
                    "one comes only after the warm-up, and early enough for its re-warmup to end before the run does"
                )
        profiler = None
        if self.training.profile is not None and self.ranks.is_rank0:
            profiler = step_profiler(
                self.training.profile,
                state.step,
                self.setup.context.folder,
                state.failures,
            )
        with signals.deferred(), self.counter.counting(), profiler or nullcontext():
            if state.step == 0 and self.training.eval_on_start:
                state.perplexity_before = self._evaluate()
            is_pending = state.merge_pending or state.evaluation_pending
            if is_pending and state.step < self.total_steps:
                self._run_pending()
            while state.step < self.total_steps and not evaluator.forgotten:
                if profiler is not None:
                    profiler.step()
                self.train_step()
            self._finish()

    # -- one optimizer step ------------------------------------------------------------

    def train_step(self) -> None:
        """Train on the next batch, log the step, then merge, evaluate and save if
        due."""
        state = self.state
        device = self.engine.device
        step = state.step + 1
        started = time.perf_counter()
        self.memory.end(BETWEEN)
        self.counter.reset()
        # The learning rate of the MoRA matrices. Other trained parameters have the same
        # schedule, scaled to their own peak.
        learning_rate = self.schedule.learning_rate(state.step, state.merges)
        other_scale = (
            self.training.other_learning_rate / self.training.peak_learning_rate
        )
        zero.set_learning_rate(self.engine, learning_rate, other_scale)

        # The all-reduce of the previous step has summed the labels of this batch. Only
        # the first step of a process sums them here.
        batch = self.loader.take(state.step)
        if self._next_labels is None:
            self._next_labels = self.replica.sum(labels_in(batch))
        # A batch without labels (documents of one token) has a loss of 0, not 0 / 0.
        total_labels = max(self._next_labels, 1.0)
        # DeepSpeed divides the loss by the number of micro-batches and averages
        # gradients over ranks. Undo both, and divide the summed loss by the number of
        # labels of the global batch.
        micro_batches = self.training.gradient_accumulation_steps
        scale = micro_batches * self.replica.world / total_labels
        nll = torch.zeros(1, dtype=torch.float64, device=device)
        # For a mixture: the summed loss of each source in row 0, its labels in row 1.
        n_sources = len(self._mixture.names) if self._mixture else 0
        by_source = torch.zeros(2, n_sources, dtype=torch.float64, device=device)

        self.engine.train()
        for micro_batch in batch:
            sources = [self.train_data.names[source] for source in micro_batch.sources]
            with self.domains.of_rows(sources):
                batch_nll = self.nll(micro_batch, by_source)
                loss = batch_nll * scale
                if self.setup.alignment is not None:
                    # The same on all ranks and micro-batches, over which it is averaged
                    loss = loss + self.setup.alignment.loss()
                self.engine.backward(loss)
            self.memory.end("forward_backward")
            # DeepSpeed counts the calls; only the last micro-batch steps the optimizer.
            self.engine.step()
            self.memory.end("optimizer_step")
            nll += batch_nll.detach()

        # The only place of a step where the host waits for the device. The base's
        # files, which may be on network storage, are checked in logged steps only.
        base_changed = self._is_logged(step) and bool(
            self.setup.run.changed_base_files()
        )
        next_labels = self.loader.next_labels(step)
        total_nll, *source_sums, self._next_labels = self._reduce_metrics_and_stop_flag(
            [nll, by_source.flatten()], [next_labels], base_changed
        )
        mean_loss = total_nll / total_labels

        state.step = step
        state.at_peak = self.schedule.is_at_peak(step)
        state.tokens += self.global_batch_size * self.train_data.seq_len
        self.bytes_gathered_per_step = self.counter.gathered_bytes
        require_finite(mean_loss, f"the loss is {mean_loss} at step {step}", step)
        if self._is_logged(step):
            seconds = time.perf_counter() - started
            self._log_step(mean_loss, learning_rate, seconds, source_sums)
        self.after_step()

    def nll(self, micro_batch: MicroBatch, by_source: Tensor) -> Tensor:
        """The summed loss of a micro-batch. For a mixture, also add the losses and
        labels of each source to `by_source` (2, sources), without waiting for the
        device."""
        batch = self.replica.on_device(micro_batch.batch)
        if self._mixture is None:
            return token_nll(self.engine, batch)
        losses = sequence_nll(self.engine, batch)
        labels = torch.tensor(micro_batch.labels, dtype=torch.float64)
        labels = labels.to(losses.device, non_blocking=True)
        index = torch.tensor(micro_batch.sources).to(losses.device, non_blocking=True)
        by_source.index_add_(1, index, torch.stack([losses.detach().double(), labels]))
        return losses.sum()

    def _reduce_metrics_and_stop_flag(
        self,
        on_device: Sequence[Tensor] = (),
        on_host: Sequence[float] = (),
        base_changed: bool = False,
    ) -> list[float]:
        """Sums over all ranks of device vectors and host numbers, in that order. The
        host waits for the device here.

        The same all-reduce carries a flag: a rank got a stop request or found the
        base's files changed. Both are rare, so a second collective finds out which.
        """
        flag = base_changed or signals.requested()
        host = torch.tensor([*on_host, float(flag)], dtype=torch.float64)
        sums = torch.cat([*on_device, host.to(self.engine.device, non_blocking=True)])
        dist.all_reduce(sums)
        *totals, flags = sums.tolist()
        if flags > 0:
            self.setup.run.check_base()
            self._stop_requested |= self.replica.sum(signals.requested()) > 0
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
        """Log the completed step. `source_sums`: for a mixture the summed losses of all
        sources, then their labels."""
        step = self.state.step
        tokens = self.global_batch_size * self.train_data.seq_len
        metrics = {
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
        if self.setup.alignment is not None:
            metrics["alignment"] = self.setup.alignment.value.item()
        utilization = self.setup.utilization(tokens / seconds)
        if utilization is not None:
            metrics["mfu"] = utilization
        self.log.step(metrics)
        if self._mixture is not None:
            source_tokens = self._mixture.tokens(step)
            self.log.record("sources", step, source_facts(source_sums, source_tokens))

    # -- after a step ------------------------------------------------------------------

    def after_step(self) -> None:
        """Merge, evaluate and save if due. Save before a merge and record it as
        pending, so that a failed merge or evaluation does not lose the step."""
        state = self.state
        training = self.training
        state.merge_pending = self.schedule.merges_after(state.step)
        # `_finish` runs the last evaluation.
        state.evaluation_pending = False
        if training.eval_steps and state.step < self.total_steps:
            state.evaluation_pending = state.step % training.eval_steps == 0
        if state.merge_pending and self._save_is_due:
            self._save()
        self._run_pending()

    def _run_pending(self) -> None:
        """Merge, save and evaluate as the newest step requires, directly after it or
        after a resume."""
        merges = self.state.merge_pending
        if merges:
            self._merge()
        self._stop_if_requested(resync=merges)
        if self._save_is_due and self._saved_step != self.state.step:
            self._save()
        if self.state.evaluation_pending:
            self._evaluate()
            # Save the best model so far even if --save_steps is not due: no later
            # checkpoint has it.
            if self.state.best_step == self.state.step:
                self._save()
        if self._save_is_due:
            self._stop_if_requested()

    @property
    def _save_is_due(self) -> bool:
        """Whether --save_steps requires a checkpoint of the newest step. Not for the
        last step, which `_finish` saves."""
        step = self.state.step
        every = self.training.save_steps
        return bool(every) and step % every == 0 and 0 < step < self.total_steps

    def _stop_if_requested(self, resync: bool = True) -> None:
        """Save and raise `Stopped` if any rank got a stop request. `resync`:
        exchange requests first (collective), because the step's all-reduce may be long
        ago."""
        if resync:
            self._reduce_metrics_and_stop_flag()
        if not self._stop_requested:
            return
        step = self.state.step
        if step > 0 and self._saved_step != step:
            self._save(is_last=True)
        self.setup.run.wait()
        signals.ignore_requests()
        self.log.close()
        # No rank may exit before all ranks ignore signals and the exit of others.
        dist.barrier()
        if step == 0:
            raise Stopped("stopped before the first step, nothing to save")
        assert self.last_checkpoint is not None
        raise Stopped(
            f"stopped at step {step}, saved to {self.last_checkpoint}; continue with --resume_from_checkpoint auto"
        )

    def _save(self, is_last: bool = False) -> None:
        """Check that the loss of the reference batch is finite, then write a
        checkpoint. A step with a finite loss may put NaN into the MoRA matrices, which
        must not be saved.

        Where a store fails for good, training goes on to the next save; the last one of
        a run or a stop raises `StoreError`."""
        step = self.state.step
        self.memory.end(BETWEEN)
        # Before the loss, which reads the base: reading beyond the end of a mapped file
        # that was truncated kills the process.
        self.setup.run.check_base()
        # Summed over all ranks, because a single rank may read a damaged base.
        loss = self.replica.sum(self._reference_loss())
        problem = f"after step {step} the loss of the reference batch is {loss}"
        require_finite(loss, problem, step)
        self.state.stream = self.train_data.states_at(step)
        keep = self.training.save_total_limit
        if keep is not None and self.state.evaluation_pending:
            # If the evaluation finds NaN, the previous checkpoint is the last good one.
            keep = max(keep, 2)
        if remote := self.setup.context.remote:
            # Before it, as a resumed run goes on with the rows up to this step
            remote.upload(self.ranks, self.state.failures)
        with self._without_checkpoint(is_allowed=True):
            self.setup.run.wait()
            self._written_checkpoint = self.last_checkpoint
        with self._without_checkpoint(is_allowed=not is_last):
            self.last_checkpoint = self.setup.run.save(step, keep)
            self._saved_step = step
        self.memory.end("save")

    @contextmanager
    def _without_checkpoint(self, is_allowed: bool) -> Iterator[None]:
        """A context that goes on without the new checkpoint where a store fails, if
        that `is_allowed`."""
        try:
            yield
        except StoreError as error:
            if not is_allowed:
                raise
            self.last_checkpoint = self._written_checkpoint
            self._saved_step = None
            failure = f"save, found at step {self.state.step}: {error}"
            self.state.failures.append(failure)
            logger.error(f"{failure}. Training continues")

    def _merge(self) -> None:
        self.memory.end(BETWEEN)
        run = self.setup.run
        assert isinstance(run, Run), "full training has no merges"
        merge = run.merge(self.state.step, self._reference_loss)
        self.state.merge_pending = False
        self._saved_step = None  # no checkpoint has the merged model yet
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
        self._save(is_last=True)

    # -- evaluation --------------------------------------------------------------------

    def _evaluate(self) -> dict[str, float]:
        """Return the perplexity of each evaluation set. A failed evaluation or task is
        logged and training continues. Before the first step, when no training can be
        lost, it ends the run."""
        self.setup.run.check_base()
        step = self.state.step
        state_before = dict(vars(self.state))
        perplexities: dict[str, float] = {}
        failure = None
        try:
            perplexities = self.evaluator.evaluate(before_batch=self._stop_if_requested)
        except NON_FATAL_ERRORS as error:
            # All ranks detect a broken model, and none can continue. After a stop
            # request, the error comes from saving the last checkpoint.
            is_model_error = isinstance(error, (NotFinite, BaseChanged))
            if step == 0 or is_model_error or self._stop_requested:
                raise
            failure = f"{type(error).__name__}: {reason(error)}"
        # The evaluation's collectives would give wrong sums if a single rank had failed
        # and joined them with a later call. So it waits here, at a check with a
        # separate group.
        what = f"evaluation after step {step}"
        failures = [
            line for line in self.ranks.gather(what, failure) if line is not None
        ]
        if failures:
            # If only rank 0 failed, for example in writing, the other ranks have
            # results in their states: reset these, so that all ranks act alike.
            vars(self.state).update(state_before, evaluation_pending=False)
            self.state.failures.append(f"{what}: {failures[0]}")
            logger.error(f"{self.state.failures[-1]}. Training continues")
        return perplexities

    def _reference_loss(self) -> float:
        """Mean loss of the reference batch, which is the same in every replica and
        comes from the first source. A NaN in any MoRA matrix, of any domain, makes it
        NaN."""
        batch = self.train_data.first_sequences(REFERENCE_SEQUENCES)
        first_domain = next(iter(self.domains.names), None)
        return self.replica.replica_nll(batch, first_domain)
