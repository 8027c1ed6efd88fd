"""The loop: a batch -> loss -> backward -> step -> merge, evaluate, log, save when it is time.

A batch is a pure function of (seed, step, global batch size); micro-batch m of rank r holds the global rows
[(m * world + r) * B, ... + B). The loss is the mean over all predicted tokens of the global batch, whichever rank and
micro-batch they fall into, so neither the number of ranks nor of micro-batches changes the curve.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mora_ds import zero
from mora_ds.checkpoint import TrainerState
from mora_ds.data import IGNORED, PackedDataset
from mora_ds.errors import RunError, UserError
from mora_ds.metrics import MetricsLog, StepMetrics, peak_memory_bytes, perplexity
from mora_ds.remora import MergeReport
from mora_ds.schedules import Schedule

PROBE_ROWS = 2
"""Sequences of the batch whose loss is measured before and after a merge: the first of the corpus, on every rank."""

PATIENCE_S = 60.0
"""How long a run that fails waits for a checkpoint that is being written in the background."""


class Merger(Protocol):
    probe: Callable[[], float] | None

    def merge(self, step: int) -> MergeReport: ...


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


@dataclass
class Trainer:
    """One run on one engine. `save(state)` writes a checkpoint on all ranks and returns its folder."""

    engine: zero.Engine
    train_data: PackedDataset
    eval_data: Mapping[str, PackedDataset]
    schedule: Schedule
    settings: LoopSettings
    log: MetricsLog
    counter: zero.CollectiveCounter
    state: TrainerState
    save: Callable[[TrainerState], Path]
    merger: Merger | None = None
    wait: Callable[[float | None], None] = lambda timeout_s: None
    """Until the checkpoint that is being written is there, or so many seconds; raises what went wrong with it."""

    def __post_init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.last_checkpoint: Path | None = None
        if self.merger is not None:
            self.merger.probe = self._probe_loss
        self.bytes_gathered_per_step = 0

    @property
    def rows_per_step(self) -> int:
        """Global batch size, in sequences."""
        return self.settings.micro_batch_size * self.settings.gradient_accumulation_steps * self.world

    @property
    def is_finished(self) -> bool:
        """Whether a run that was resumed had come to its end, last evaluation and checkpoint included."""
        return self.state.finished and self.state.step == self.settings.total_steps

    def run(self) -> TrainerState:
        """Train from `state.step` to the end. Raises `RunError` when the loss is no number any more, or a checkpoint
        could not be written."""
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
            self.log.say(f"all {self.state.step} steps of this run are done: nothing left to train")
            return self.state
        self.state.finished = False
        with self.counter.counting():
            if self.state.step == 0 and self.settings.eval_on_start:
                self.state.perplexity_before = self.evaluate()
            while self.state.step < self.settings.total_steps:
                self._step()
            self._finish()
        return self.state

    # -- one optimizer step ----------------------------------------------------------------------------------------

    def _step(self) -> None:
        started = time.perf_counter()
        self.counter.reset()
        rate = self.schedule.learning_rate(self.state.step)
        zero.set_learning_rate(self.engine, rate)
        loss = self._forward_backward()
        self.state.step += 1
        self.state.tokens += self.rows_per_step * self.train_data.seq_len
        self.bytes_gathered_per_step = self.counter.gathered_bytes
        self._stop_unless_finite(loss, f"the loss is {loss} at step {self.state.step}")
        if self.state.step % self.settings.logging_steps == 0 or self.state.step == self.settings.total_steps:
            self.log.step(self._metrics(loss, rate, time.perf_counter() - started))
        self.log.advance(self.state.step)
        self._after_step()

    def _forward_backward(self) -> float:
        """All micro-batches and the optimizer's step. Returns the global mean loss."""
        micro_batches = [self._micro_batch(index) for index in range(self.settings.gradient_accumulation_steps)]
        predicted = sum(int((batch["labels"] != IGNORED).sum()) for batch in micro_batches)
        total_predicted = max(self._sum_over_ranks(predicted), 1.0)
        # DeepSpeed divides by the number of micro-batches and averages over ranks: undo both, divide by tokens.
        scale = self.settings.gradient_accumulation_steps * self.world / total_predicted
        nll = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        self.engine.train()
        for batch in micro_batches:
            batch_nll = token_nll(self.engine, batch)
            self.engine.backward(batch_nll * scale)
            self.engine.step()
            nll += batch_nll.detach()
        return self._sum_over_ranks(nll.item()) / total_predicted

    def _micro_batch(self, index: int) -> dict[str, Tensor]:
        size = self.settings.micro_batch_size
        first = (index * self.world + self.rank) * size
        batch = self.train_data.batch(self.state.step, self.rows_per_step, slice(first, first + size))
        return {name: tensor.to(self.engine.device) for name, tensor in batch.items()}

    def _sum_over_ranks(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(total)
        return total.item()

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
        if self.schedule.merges_after(step):
            self._merge()
        at_end = step == settings.total_steps
        if settings.eval_steps and step % settings.eval_steps == 0 and not at_end:
            self.evaluate()
        if settings.save_steps and step % settings.save_steps == 0 and not at_end:
            self._save()

    def _save(self) -> None:
        """Not without a look at the loss of the batch to come: a step may have a finite loss and leave squares that
        are no numbers, and a checkpoint of those would pass for a good one."""
        batch = self._micro_batch(0)
        with torch.no_grad():
            self.engine.eval()
            nll = self._sum_over_ranks(token_nll(self.engine, batch).item())
            self.engine.train()
        self._stop_unless_finite(nll, f"after step {self.state.step} the loss of the next batch is {nll}")
        self.last_checkpoint = self.save(self.state)

    def _merge(self) -> None:
        assert self.merger is not None, "a schedule with merges needs a merger"
        report = self.merger.merge(self.state.step)
        self.state.merges.append(self.state.step)
        self.log.merge(report.step, report.row())
        self.log.say(str(report))

    def _finish(self) -> None:
        if self.settings.merge_at_end and self.state.step not in self.state.merges:
            self._merge()
        self.evaluate()
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
            tokens_per_s_per_rank=tokens / seconds / self.world,
            step_time_s=seconds,
            peak_memory_bytes=peak_memory_bytes(),
            bytes_gathered=self.bytes_gathered_per_step,
        )

    # -- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Perplexity of each evaluation set, over all ranks; logged, and kept in the state."""
        found = {}
        for name, data in self.eval_data.items():
            nll = self._mean_nll(data)
            self._stop_unless_finite(nll, f"the loss on {name!r} is {nll} after step {self.state.step}")
            found[name] = perplexity(nll)
        if found:
            self.log.evaluation(self.state.step, found)
        self.state.perplexity_last = found
        return found

    @torch.no_grad()
    def _probe_loss(self) -> float:
        """Mean loss of the corpus's first sequences, the same on every rank."""
        rows = [self.train_data.block(index) for index in range(min(PROBE_ROWS, self.train_data.n_blocks))]
        batch = {name: torch.stack([row[name] for row in rows]).to(self.engine.device) for name in rows[0]}
        self.engine.eval()
        nll = token_nll(self.engine, batch).item()
        self.engine.train()
        return nll / max(int((batch["labels"] != IGNORED).sum()), 1)

    @torch.no_grad()
    def _mean_nll(self, data: PackedDataset) -> float:
        """Every rank runs the same number of forwards, as ZeRO-3 needs."""
        self.engine.eval()
        nll, predicted = 0.0, 0
        most = self.settings.max_eval_batches or sys.maxsize
        for index, batch in enumerate(data.eval_batches(self.rank, self.world, self.settings.eval_batch_size)):
            if index * self.world >= most:
                break
            if index * self.world + self.rank >= most:  # the limit counts batches over all ranks
                batch["labels"].fill_(IGNORED)
            batch = {name: tensor.to(self.engine.device) for name, tensor in batch.items()}
            nll += token_nll(self.engine, batch).item()
            predicted += int((batch["labels"] != IGNORED).sum())
        self.engine.train()
        return self._sum_over_ranks(nll) / max(self._sum_over_ranks(predicted), 1.0)


def token_nll(model: Callable[..., object], batch: Mapping[str, Tensor]) -> Tensor:
    """Summed negative log-likelihood (nats, fp32) of a batch's labels, which are already shifted: labels[t] is what
    follows input_ids[t], or IGNORED. Restarting `position_ids` keep attention inside each document."""
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits  # type: ignore[attr-defined]
    labels = batch["labels"].flatten()
    return F.cross_entropy(logits.flatten(0, -2).float(), labels, ignore_index=IGNORED, reduction="sum")


# -- documents in one row ----------------------------------------------------------------------------------------------

_DOCUMENT = 4
"""Tokens of each of the two documents that `check_document_mask` packs into a row."""

_NOT_ROUNDING = 0.05
"""Share of a whole leak from which on one is seen: experts that get other tokens round otherwise, far below this."""


@torch.no_grad()
def check_document_mask(engine: zero.Engine, vocab_size: int) -> None:
    """Raises `UserError` when the model lets a document see the one before it, restarting positions or not.

    Only transformers' newer models take their mask from the positions (5.24: OPT, Bloom, MPT and GPT-OSS do not), and
    state-space layers know no mask. Measured, not listed: what a changed first document does to the second one, against
    what it does without the restart. Collective: two forwards of two short rows on every rank.
    """
    rows = torch.randint(vocab_size, (2, 2 * _DOCUMENT), generator=torch.Generator().manual_seed(0))
    rows[1, _DOCUMENT:] = rows[0, _DOCUMENT:]
    straight = torch.arange(2 * _DOCUMENT).expand(2, -1)
    engine.eval()
    effects = []
    for positions in (straight % _DOCUMENT, straight):
        inputs = {"input_ids": rows.to(engine.device), "position_ids": positions.to(engine.device)}
        one, other = engine(**inputs, use_cache=False).logits[:, _DOCUMENT:].double()
        effects.append((one - other).norm().item())
    engine.train()
    if effects[0] > _NOT_ROUNDING * effects[1]:
        raise UserError(
            "this model's attention does not stop at restarting positions, so documents packed into one row would see "
            "each other: say --no_document_mask if they may"
        )
