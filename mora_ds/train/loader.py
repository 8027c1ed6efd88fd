"""The batches of a run: prefetching, and the sequences that each rank computes.

    world = replicas x ranks_per_replica; the ranks of a replica (`Replica`) are
    consecutive and get the same sequences

    loader.take(step)           returns the micro-batches of a step; a thread starts to read the next ones
    loader.next_labels(step)    waits for the thread; returns the number of labels of this rank

All work on the host happens here, before the copy to the device: packing, this rank's
part of each sequence, the number of labels, pinned memory. The thread runs only between
the two calls. So a checkpoint, written after a step, never stores the position of a
batch that is still being read. An error is raised by the `take` of the batch that
failed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.common.errors import RunError
from mora_ds.config.training import TrainingArguments
from mora_ds.data import IGNORED, Mixture
from mora_ds.data.documents import Batch
from mora_ds.data.packing import stack
from mora_ds.engine import zero
from mora_ds.models.loss import token_nll
from mora_ds.parallel.ulysses import SequenceParallel
from mora_ds.train.non_fatal import eval_mode


@dataclass(frozen=True)
class MicroBatch:
    """This rank's part of one micro-batch."""

    batch: Batch
    """Tensors on the CPU; in pinned memory if the device is a GPU."""
    labels: list[int]
    """The number of labels of each sequence, without ignored ones."""
    sources: list[int]
    """The source of each sequence in the mixture; empty if there is one source."""


StepBatch = list[MicroBatch]
"""The micro-batches of one optimizer step."""


class BatchLoader:
    """This rank's batches of the steps up to `last_step`."""

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
        # Reading a stream is collective (`Ranks.map`), so all ranks must read at the
        # same time.
        self._is_collective = data.has_streams and replica.world > 1
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="mora_ds batches")
        self._device = torch.device(replica.engine.device)
        self.ahead: Future[StepBatch] | None = None
        """The batch that `take` returns next, if its reading was started."""

    def take(self, step: int) -> StepBatch:
        """The micro-batches of the step after `step` completed steps. Raises the error
        of reading them."""
        if self.ahead is None:  # the first step of this process
            self._start(step)
        assert self.ahead is not None, "there is a batch for every step of the run"
        batch = self.ahead.result()
        self.ahead = None
        if not self._is_collective:
            self._start(step + 1)
        return batch

    def next_labels(self, step: int) -> int:
        """This rank's number of labels in the batch that `take(step)` will return; 0 if
        there is no such batch or `take` will raise. Call it when the kernels of the
        previous step are queued."""
        if self.ahead is None:
            self._start(step)
        if self.ahead is None or self.ahead.exception() is not None:
            return 0
        return labels_in(self.ahead.result())

    def position(self, index: int) -> slice:
        """The slice of a step's global batch that is this replica's micro-batch
        `index`."""
        size = self.training.per_device_train_batch_size
        first = (index * self.replica.count + self.replica.index) * size
        return slice(first, first + size)

    def _start(self, step: int) -> None:
        if step < self.last_step:
            self.ahead = self._reader.submit(self._read, step)

    def _read(self, step: int) -> StepBatch:
        # A new thread uses device 0, and pinning memory would create a context there.
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        micro_batches = range(self.training.gradient_accumulation_steps)
        return [self._micro_batch(step, index) for index in micro_batches]

    def _micro_batch(self, step: int, index: int) -> MicroBatch:
        position = self.position(index)
        batch = self.replica.local_part(self.data.batch(step, position))
        # numpy, because torch would start threads that compete with those of the step.
        labels = (batch["labels"].numpy() != IGNORED).sum(axis=1).tolist()
        sources = (
            self.data.sources_of(step, position) if len(self.data.names) > 1 else []
        )
        if self._device.type == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return MicroBatch(batch, labels, sources)


def labels_in(batch: StepBatch) -> int:
    """The number of labels of a step's batch, without ignored ones."""
    return sum(sum(micro_batch.labels) for micro_batch in batch)


# -- replicas --------------------------------------------------------------------------


class NotFinite(RunError):
    """A loss is NaN or infinite after the first step. The trainer adds the path of the
    last checkpoint to the message."""


def require_finite(value: float, what: str, step: int) -> None:
    """Raise `NotFinite` with the message `what` for a NaN or infinite value; at step 0
    raise a plain `RunError`."""
    if math.isfinite(value):
        return
    if step == 0:
        raise RunError(
            f"{what}, before any training: the model itself is broken, or needs another dtype"
        )
    raise NotFinite(what)


@dataclass
class Replica:
    """The replica of this rank: its index, its part of a batch, and sums over all
    ranks."""

    engine: zero.Engine
    ranks_per_replica: int = 1
    sequence: SequenceParallel | None = None
    """Splits the replica's sequences over its ranks (--sequence_parallel_size); None:
    this rank computes all tokens."""

    def __post_init__(self) -> None:
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        self.index = self.rank // self.ranks_per_replica
        self.count = self.world // self.ranks_per_replica

    def local_part(self, batch: Batch) -> Batch:
        """This rank's part of its replica's batch. Both are on the CPU."""
        return batch if self.sequence is None else self.sequence.split(batch)

    def on_device(self, batch: Batch) -> Batch:
        """The batch on the engine's device. The copy is asynchronous from pinned
        memory."""
        device = self.engine.device
        return {
            name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()
        }

    def sum(self, value: float) -> float:
        """The sum of `value` over all ranks. Collective."""
        total = torch.tensor(value, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(total)
        return total.item()

    def nll(self, batch: Batch, domain: str | None) -> tuple[float, int]:
        """(summed loss, number of predicted tokens) of this rank's part of a batch,
        computed with the matrices of `domain`. Collective under ZeRO-3."""
        local_batch = self.local_part(batch)
        predicted = int((local_batch["labels"] != IGNORED).sum())
        with eval_mode(self.engine, domain):
            nll = token_nll(self.engine, self.on_device(local_batch)).item()
        return nll, predicted

    def first_losses(self, data: Mixture, count: int, rows: int) -> Iterator[Tensor]:
        """The summed losses of this replica's part of the run's first `count` sequences,
        of streams those of the first source, `rows` at a time, in training mode; as many
        on every rank. Collective under ZeRO-3."""
        sample = data.sources[0].peek if data.has_streams else data.sample
        count = min(count, data.schedule.limit or count)
        model = self.engine.module
        model.train()
        for start in range(0, count, self.count * rows):
            first = start + self.index * rows
            numbers = range(first, first + rows)
            batch = stack([sample(number % count) for number in numbers])
            batch["labels"][max(0, count - first) :] = IGNORED
            yield token_nll(model, self.on_device(self.local_part(batch)))

    def mean_nll(self, batches: Iterable[Batch], domain: str | None) -> float:
        """Mean loss over all predicted tokens of all ranks. Each rank must give the
        same number of batches. Collective."""
        total = 0.0
        predicted = 0
        for batch in batches:
            nll, tokens = self.nll(batch, domain)
            total += nll
            predicted += tokens
        return self.sum(total) / max(self.sum(predicted), 1.0)

    def replica_nll(self, batch: Batch, domain: str | None) -> float:
        """Mean loss of a batch that all replicas have. Collective."""
        nll, predicted = self.nll(batch, domain)
        if self.ranks_per_replica > 1:
            nll = self.sum(nll)
            predicted = int(self.sum(predicted))
        return nll / max(predicted, 1)
