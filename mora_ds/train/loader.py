"""The batches of a run, each prepared while the step before it computes, and who
computes which rows.

    world = replicas x processes_per_replica; the processes of a replica (`Replica`) have
    consecutive ranks and are given the same rows

    loader.take(step)         the micro-batches of a step; a thread begins with those of the next one
    loader.labels_ahead()     waits for them; how many of their labels this process predicts

Everything that needs the data on the host happens here, before anything is copied to
the device: packing, this process's part of each row, the number of labels, pinned
memory. The thread runs only between the two calls, so what is saved after a step is
never the position of a batch that is still being read. An error is raised when the
batch that it concerns is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mora_ds.common.errors import RunError
from mora_ds.config.training import TrainingArguments
from mora_ds.data import IGNORED, Mixture
from mora_ds.data.documents import Rows
from mora_ds.engine import zero
from mora_ds.models.loss import token_nll
from mora_ds.parallel.ulysses import SequenceParallel
from mora_ds.train.beside import beside_training


@dataclass(frozen=True)
class MicroBatch:
    """What this process computes of one micro-batch."""

    rows: Rows
    """On the CPU; pinned where the device is a GPU."""
    labels: list[int]
    """The number of labels that count, for each row."""
    sources: list[int]
    """The source of each row in the mixture; empty where there is one source."""


StepBatch = list[MicroBatch]
"""The micro-batches of one optimizer step."""


class BatchLoader:
    """This process's batches of the steps up to `last_step`."""

    def __init__(
        self,
        data: Mixture,
        replica: Replica,
        training: TrainingArguments,
        last_step: int,
    ) -> None:
        self.data = data
        self.replica = replica
        self.training = training
        self.last_step = last_step
        # Processes read a stream together (`Ranks.__call__`), so that each must read at
        # the same moment as the others.
        self._reads_together = data.has_streams and replica.world > 1
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="mora_ds batches")
        self._device = torch.device(replica.engine.device)
        self.ahead: Future[StepBatch] | None = None
        """The batch that `take` returns next, if reading it has begun."""

    def take(self, step: int) -> StepBatch:
        """The micro-batches of `step`, before which as many steps are done. Raises what
        reading them has raised."""
        if self.ahead is None:  # the first step of this process
            self._begin(step)
        assert self.ahead is not None, "there is a batch for every step of the run"
        batch = self.ahead.result()
        self.ahead = None
        if not self._reads_together:
            self._begin(step + 1)
        return batch

    def labels_ahead(self, step: int) -> int:
        """Labels of this process in the batch of `step`, which `take` returns next; 0
        where there is none, or where `take` will raise. To be called once the work of
        the step before is queued."""
        if self.ahead is None:
            self._begin(step)
        if self.ahead is None or self.ahead.exception() is not None:
            return 0
        return labels_in(self.ahead.result())

    def position(self, index: int) -> slice:
        """The rows of this replica's micro-batch `index` in a step's global batch."""
        size = self.training.per_device_train_batch_size
        first = (index * self.replica.count + self.replica.index) * size
        return slice(first, first + size)

    def _begin(self, step: int) -> None:
        if step < self.last_step:
            self.ahead = self._reader.submit(self._read, step)

    def _read(self, step: int) -> StepBatch:
        # A thread begins with device 0: pinning memory would make a context there.
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        micro_batches = range(self.training.gradient_accumulation_steps)
        return [self._micro_batch(step, index) for index in micro_batches]

    def _micro_batch(self, step: int, index: int) -> MicroBatch:
        position = self.position(index)
        rows = self.replica.rows(self.data.batch(step, position))
        # By numpy, since torch would start threads beside those that compute the step.
        labels = (rows["labels"].numpy() != IGNORED).sum(axis=1).tolist()
        sources = (
            self.data.sources_of(step, position) if len(self.data.names) > 1 else []
        )
        if self._device.type == "cuda":
            rows = {name: tensor.pin_memory() for name, tensor in rows.items()}
        return MicroBatch(rows, labels, sources)


def labels_in(batch: StepBatch) -> int:
    """How many labels of a step's batch count."""
    return sum(sum(micro_batch.labels) for micro_batch in batch)


# -- who computes what -----------------------------------------------------------------


class NotFinite(RunError):
    """A loss is NaN or infinite after training has begun. The trainer adds the last
    checkpoint."""


def require_finite(value: float, what: str, step: int) -> None:
    """Raise `NotFinite` with the message `what`, or `RunError` at step 0, for a NaN or
    infinite value."""
    if math.isfinite(value):
        return
    if step == 0:
        raise RunError(
            f"{what}, before any training: the model itself is broken, or needs another dtype"
        )
    raise NotFinite(what)


@dataclass
class Replica:
    """The replica of this process: its number, its rows of a batch, and sums over
    all."""

    engine: zero.Engine
    processes_per_replica: int = 1
    sequence: SequenceParallel | None = None
    """Gives this process its tokens of the replica's rows (--sequence_parallel_size);
    None: it computes all of them."""

    def __post_init__(self) -> None:
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.index = self.rank // self.processes_per_replica
        self.count = self.world // self.processes_per_replica

    def rows(self, batch: Rows) -> Rows:
        """This process's part of a batch of its replica, on the CPU as the batch."""
        return batch if self.sequence is None else self.sequence.split(batch)

    def on_device(self, batch: Rows) -> Rows:
        """The batch on the engine's device. The host does not wait for a pinned one."""
        device = self.engine.device
        return {
            name: rows.to(device, non_blocking=True) for name, rows in batch.items()
        }

    def sum(self, value: float) -> float:
        """The sum of `value` over all processes. Collective."""
        total = torch.tensor(value, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(total)
        return total.item()

    def nll(self, batch: Rows, domain: str | None) -> tuple[float, int]:
        """(summed loss, number of predicted tokens) of this process's part of a batch,
        as of `domain`. Collective under ZeRO-3."""
        local_batch = self.rows(batch)
        predicted = int((local_batch["labels"] != IGNORED).sum())
        with beside_training(self.engine, domain):
            nll = token_nll(self.engine, self.on_device(local_batch)).item()
        return nll, predicted

    def mean_nll(self, batches: Iterable[Rows], domain: str | None) -> float:
        """Mean loss over all predicted tokens of all processes. Each brings the same
        number of batches. Collective."""
        total = 0.0
        predicted = 0
        for batch in batches:
            nll, tokens = self.nll(batch, domain)
            total += nll
            predicted += tokens
        return self.sum(total) / max(self.sum(predicted), 1.0)

    def replica_nll(self, batch: Rows, domain: str | None) -> float:
        """Mean loss of a batch that is the same in every replica. Collective."""
        nll, predicted = self.nll(batch, domain)
        if self.processes_per_replica > 1:
            nll = self.sum(nll)
            predicted = int(self.sum(predicted))
        return nll / max(predicted, 1)
