"""The processes that compute the same rows together (a replica), and what one process contributes to a loss.

world = replicas x processes_per_replica; the processes of a replica have consecutive ranks and are given the same rows
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.common.errors import RunError
from mora_ds.data import IGNORED
from mora_ds.engine import zero
from mora_ds.models.loss import token_nll
from mora_ds.parallel.ulysses import SequenceParallel


class NotFinite(RunError):
    """A loss or norm is NaN or infinite after training has begun; whoever knows the last checkpoint adds it."""


def require_finite(value: float, what: str, step: int) -> None:
    """Raise `NotFinite` with the message `what`, or `RunError` where `step` is 0, if `value` is NaN or infinite."""
    if math.isfinite(value):
        return
    if step == 0:
        raise RunError(f"{what}, before any training: the model itself is broken, or needs another dtype")
    raise NotFinite(what)


@dataclass
class Replica:
    """The replica that this process belongs to: its number, its rows of a batch, and sums over all processes."""

    engine: zero.Engine
    processes_per_replica: int = 1
    sequence: SequenceParallel | None = None
    """What gives this process its tokens of the replica's rows (--sequence_parallel_size); None: it computes all."""

    def __post_init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.index = self.rank // self.processes_per_replica
        self.count = self.world // self.processes_per_replica
        self._rows_checked = False

    def rows(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """This process's part of a training batch of its replica, on the CPU as the batch.

        The first batch is compared with those of the other processes of the replica (collective): `RunError` if they
        differ.
        """
        batch = dict(batch)
        if self.processes_per_replica > 1 and not self._rows_checked:
            check_same_rows(batch, self.processes_per_replica, self.engine.device)
            self._rows_checked = True
        return self._part_of(batch)

    def _part_of(self, rows: dict[str, Any]) -> dict[str, Any]:
        return rows if self.sequence is None else self.sequence.split(rows)

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch on the engine's device; where it is pinned, the host does not wait for the copy."""
        device = self.engine.device
        return {name: part.to(device, non_blocking=True) for name, part in batch.items()}

    def sum(self, value: float) -> float:
        """The sum of `value` over all processes. Collective."""
        total = torch.tensor(value, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(total)
        return total.item()

    @torch.no_grad()
    def nll(self, batch: Mapping[str, Any]) -> tuple[float, int]:
        """(summed loss, number of predicted tokens) of this process's part of a batch. Collective under ZeRO-3."""
        local_batch = self._part_of(dict(batch))
        predicted = int((local_batch["labels"] != IGNORED).sum())
        self.engine.eval()
        nll = token_nll(self.engine, self.on_device(local_batch)).item()
        self.engine.train()
        return nll, predicted

    def mean_nll(self, batches: Iterable[Mapping[str, Any]]) -> float:
        """Mean loss over all predicted tokens of all processes, which bring equally many batches. Collective."""
        total = 0.0
        predicted = 0
        for batch in batches:
            nll, tokens = self.nll(batch)
            total = total + nll
            predicted = predicted + tokens
        return self.sum(total) / max(self.sum(predicted), 1.0)

    def replica_nll(self, batch: Mapping[str, Any]) -> float:
        """Mean loss of a batch that is the same in every replica. Collective."""
        nll, predicted = self.nll(batch)
        if self.processes_per_replica > 1:
            nll = self.sum(nll)
            predicted = int(self.sum(predicted))
        return nll / max(predicted, 1)


def check_same_rows(batch: Mapping[str, Any], processes_per_replica: int, device: torch.device | str) -> None:
    """Raise `RunError` where the processes of a replica hold different batches. Collective; sends a hash each, from
    `device`."""
    digest = hashlib.sha256()
    for name, tensor in batch.items():
        if not isinstance(tensor, Tensor):
            continue  # its documents, which follow from the positions
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.numpy().tobytes())
    mine = torch.tensor(list(digest.digest()), dtype=torch.int64, device=device)
    digests = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(digests, mine)
    for rank, rank_digest in enumerate(digests):
        first = rank - rank % processes_per_replica
        if not torch.equal(rank_digest, digests[first]):
            raise RunError(f"ranks {first} and {rank} compute the same rows together, but were given different ones")
