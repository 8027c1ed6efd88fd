"""Where documents begin in packed rows: read by attention in place of a mask."""

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
    """The documents of rows (B, T), laid one row after the other. Every row begins with
    a document, and another one begins at each position that does not follow the one
    before."""

    bounds: Tensor
    """(documents + 1,) int32: the token with which each begins, then the number B T."""
    lengths: tuple[int, ...]
    """Tokens of each document, known on the host, so that no device has to be asked."""
    windows: set[int | None] = field(default_factory=set)
    """The sliding windows with which attention has been asked for them; None for
    none."""

    @classmethod
    def of(cls, positions: Tensor) -> Documents:
        """The documents of rows with these positions, (B, T) on the CPU."""
        rows = positions.numpy()
        begins = np.ones(rows.shape, dtype=bool)
        begins[:, 1:] = np.diff(rows, axis=1) != 1
        bounds = np.append(np.flatnonzero(begins), rows.size).astype(np.int32)
        return cls(torch.from_numpy(bounds), tuple(np.diff(bounds).tolist()))

    @classmethod
    def one_per_sequence(
        cls, rows: int, length: int, device: torch.device | None = None
    ) -> Documents:
        """One document a row."""
        stop = rows * length + 1
        bounds = torch.arange(0, stop, length, dtype=torch.int32, device=device)
        return cls(bounds, (length,) * rows)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    @cached_property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(self.lengths)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Documents:
        """The same with `bounds` on a device, as a batch's tensors are moved."""
        return replace(self, bounds=self.bounds.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Documents:
        """The same with `bounds` in pinned memory."""
        return replace(self, bounds=self.bounds.pin_memory())
