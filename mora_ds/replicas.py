"""Ranks that compute the same rows together: were they given the same?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.errors import RunError


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
