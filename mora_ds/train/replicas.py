"""The ranks that compute the same rows together, and what one rank does of that.

world = replicas x ranks_per_replica; ranks of a replica are consecutive, and are given the same rows
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.data import IGNORED
from mora_ds.engine import zero
from mora_ds.errors import RunError
from mora_ds.models.loss import token_nll


@dataclass
class Share:
    """This rank's."""

    engine: zero.Engine
    ranks_per_replica: int = 1
    split: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda batch: batch
    """What this rank computes of its replica's rows."""

    def __post_init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.replica, self.replicas = self.rank // self.ranks_per_replica, self.world // self.ranks_per_replica
        self._rows_checked = False

    def rows(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a batch to train on. The first one is held against that of the replica's other ranks: `RunError`."""
        batch = self._moved(batch)
        if self.ranks_per_replica > 1 and not self._rows_checked:
            check_same_rows(batch, self.ranks_per_replica)
            self._rows_checked = True
        return self.split(batch)

    def sum(self, value: float) -> float:
        """Over all ranks. Collective."""
        total = torch.tensor(value, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(total)
        return total.item()

    @torch.no_grad()
    def nll(self, batch: Mapping[str, Tensor]) -> tuple[float, int]:
        """This rank's part of a batch's loss, summed over tokens, and the number of those. Collective under ZeRO-3."""
        own = self.split(self._moved(batch))
        self.engine.eval()
        nll = token_nll(self.engine, own).item()
        self.engine.train()
        return nll, int((own["labels"] != IGNORED).sum())

    def mean_nll(self, batches: Iterable[Mapping[str, Tensor]]) -> float:
        """Over all tokens of all ranks, each of which brings as many batches. Collective."""
        total, predicted = 0.0, 0
        for batch in batches:
            nll, tokens = self.nll(batch)
            total, predicted = total + nll, predicted + tokens
        return self.sum(total) / max(self.sum(predicted), 1.0)

    def replica_nll(self, batch: Mapping[str, Tensor]) -> float:
        """The mean loss of a batch that all replicas have alike. Collective."""
        nll, predicted = self.nll(batch)
        if self.ranks_per_replica > 1:
            nll, predicted = self.sum(nll), int(self.sum(predicted))
        return nll / max(predicted, 1)

    def _moved(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.engine.device) for name, tensor in batch.items()}


def check_same_rows(batch: Mapping[str, Tensor], ranks_per_replica: int) -> None:
    """Raises `RunError` where the consecutive ranks of a replica hold different batches. Collective: 32 numbers."""
    digest = hashlib.sha256()
    for name, tensor in batch.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.cpu().numpy().tobytes())
    mine = torch.tensor(list(digest.digest()), dtype=torch.int64, device=next(iter(batch.values())).device)
    everyone = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    for rank, found in enumerate(everyone):
        first = rank - rank % ranks_per_replica
        if not torch.equal(found, everyone[first]):
            raise RunError(f"ranks {first} and {rank} compute the same rows together, but were given different ones")
