"""The batches of a run, each prepared while the step before it computes.

    loader.take(step)         the micro-batches of a step; a thread begins with those of the next one
    loader.labels_ahead()     waits for them; how many of their labels this process predicts

Everything that needs the data on the host happens here, before anything is copied to the device: packing, this
process's part of each row, the number of labels, pinned memory. The thread runs only between the two calls, so what is
saved after a step is never the position of a batch that is still being read. An error is raised when the batch that it
concerns is taken.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from mora_ds.config.training import TrainingArguments
from mora_ds.data import IGNORED, Mixture, StreamMixture, TrainData
from mora_ds.train.replicas import Replica


@dataclass(frozen=True)
class MicroBatch:
    """What this process computes of one micro-batch."""

    rows: dict[str, Any]
    """input_ids, labels, position_ids, each int64 (B, T), and their `documents`, on the CPU; pinned where the device is
    a GPU."""
    labels: list[int]
    """Of each row, how many labels count."""
    sources: list[int]
    """Of each row, its source in the mixture; empty without a mixture."""


StepBatch = list[MicroBatch]
"""The micro-batches of one optimizer step."""


class BatchLoader:
    """This process's batches of the steps up to `last_step`."""

    def __init__(self, data: TrainData, replica: Replica, training: TrainingArguments, last_step: int) -> None:
        self.data = data
        self.replica = replica
        self.training = training
        self.last_step = last_step
        self.rows_per_step = training.rows_per_step(replica.world)
        self.mixture = data if isinstance(data, Mixture) and len(data.names) > 1 else None
        # Processes read a stream together (`Ranks.__call__`), so that each must read at the same moment as the others.
        reads_together = isinstance(data, StreamMixture) and replica.world > 1
        self._thread = None if reads_together else ThreadPoolExecutor(1, thread_name_prefix="mora_ds batches")
        self._device = torch.device(replica.engine.device)
        self._ahead: tuple[int, Future[StepBatch]] | None = None

    def take(self, step: int) -> StepBatch:
        """The micro-batches of `step`, the number of steps done before it; raises what reading them has raised."""
        if self._ahead is None or self._ahead[0] != step:  # the first step of this process
            self._ahead = step, self._read_now(step)
        batch = self._ahead[1].result()
        self._ahead = None
        if self._thread is not None:
            self._begin(step + 1)
        return batch

    def labels_ahead(self, step: int) -> int:
        """Labels of this process in the batch of `step`, which `take` returns next; 0 where there is none, or where
        `take` will raise. To be called once the work of the step before is queued."""
        if self._ahead is None:
            self._begin(step)
        if self._ahead is None or self._ahead[1].exception() is not None:
            return 0
        return labels_in(self._ahead[1].result())

    def position(self, step: int, index: int) -> tuple[int, int, slice]:
        """(batch number, batch size, rows) of this replica's micro-batch `index` of a step, in the order of the
        data."""
        size = self.training.per_device_train_batch_size
        first = (index * self.replica.count + self.replica.index) * size
        return step, self.rows_per_step, slice(first, first + size)

    def _begin(self, step: int) -> None:
        if step < self.last_step:
            future = self._read_now(step) if self._thread is None else self._thread.submit(self._read, step)
            self._ahead = step, future

    def _read_now(self, step: int) -> Future[StepBatch]:
        """What `_read` returns or raises, as the thread would give it."""
        future: Future[StepBatch] = Future()
        try:
            future.set_result(self._read(step))
        except BaseException as error:  # raised when the batch is taken
            future.set_exception(error)
        return future

    def _read(self, step: int) -> StepBatch:
        if self._device.type == "cuda":  # a new thread has device 0, and would make a context there
            torch.cuda.set_device(self._device)
        return [self._micro_batch(step, index) for index in range(self.training.gradient_accumulation_steps)]

    def _micro_batch(self, step: int, index: int) -> MicroBatch:
        position = self.position(step, index)
        rows = self.replica.rows(self.data.batch(*position))
        labels = (rows["labels"].numpy() != IGNORED).sum(axis=1).tolist()  # numpy starts no threads of its own
        sources = [] if self.mixture is None else self.mixture.sources_of(*position)
        if self._device.type == "cuda":
            rows = {name: part.pin_memory() for name, part in rows.items()}
        return MicroBatch(rows, labels, sources)


def labels_in(batch: StepBatch) -> int:
    """How many labels of a step's batch count."""
    return sum(sum(micro_batch.labels) for micro_batch in batch)
