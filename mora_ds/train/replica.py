"""A replica: consecutive ranks that compute the same sequences, and sums over all ranks.

world = replicas x ranks_per_replica
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.common.errors import RunError
from mora_ds.data import IGNORED, Mixture
from mora_ds.data.documents import Batch
from mora_ds.data.packing import stack
from mora_ds.engine import zero
from mora_ds.models.loss import token_nll
from mora_ds.parallel.ulysses import SequenceParallel
from mora_ds.train.non_fatal import eval_mode


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

    def slices(self, size: int, micro_batches: int) -> list[slice]:
        """The slices of a global batch that are this replica's micro-batches of `size`
        sequences."""
        firsts = [
            (index * self.count + self.index) * size for index in range(micro_batches)
        ]
        return [slice(first, first + size) for first in firsts]

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
