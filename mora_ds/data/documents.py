"""Boundaries of the documents in packed sequences, used by attention instead of a
mask."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Batch: TypeAlias = dict[str, Any]
"""input_ids, labels, position_ids, each int64 (B, T), and their `documents`."""


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a batch (B, T), flattened to B T tokens. A document starts with
    each sequence, and at each position that is not the previous one plus 1."""

    bounds: Tensor
    """(documents + 1,) int32: the first token of each document, then B T. This is
    `cu_seqlens` of FlashAttention."""
    lengths: tuple[int, ...]
    """Tokens of each document. On the host, to avoid waiting for the device."""
    windows: set[int | None] = field(default_factory=set)
    """The sliding windows that attention was called with; None for no window."""

    @classmethod
    def of(cls, positions: Tensor) -> Documents:
        """The documents of a batch with these position ids, (B, T) on the CPU."""
        position_ids = positions.numpy()
        starts = np.ones(position_ids.shape, dtype=bool)
        starts[:, 1:] = np.diff(position_ids, axis=1) != 1
        bounds = np.append(np.flatnonzero(starts), starts.size).astype(np.int32)
        return cls(torch.from_numpy(bounds), tuple(np.diff(bounds).tolist()))

    @classmethod
    def one_per_sequence(
        cls, batch_size: int, length: int, device: torch.device | None = None
    ) -> Documents:
        """One document per sequence."""
        stop = batch_size * length + 1
        bounds = torch.arange(0, stop, length, dtype=torch.int32, device=device)
        return cls(bounds, (length,) * batch_size)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    @cached_property
    def tokens(self) -> int:
        """Tokens of all sequences: B T."""
        return sum(self.lengths)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Documents:
        """A copy with `bounds` on a device, like `Tensor.to`."""
        return replace(self, bounds=self.bounds.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Documents:
        """A copy with `bounds` in pinned memory, like `Tensor.pin_memory`."""
        return replace(self, bounds=self.bounds.pin_memory())
