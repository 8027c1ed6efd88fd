"""Reads the shards of a checkpoint, whatever the number of processes that wrote them. Needs no DeepSpeed.

    engine/layouts.safetensors    which part of which parameter lies where in the shards of all ranks (`shard_index`)
    engine/rank-*.safetensors     "<number>.master", "<number>.<key>": each flat fp32 master, and what the optimizer
                                  keeps for it: moments of its length, counts without a dimension

`EngineShards.read(name, key, start, numel)` assembles any range of a complete parameter: its fp32 master, or any tensor
of its optimizer state. Only what is asked for is read from a file.
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mora_ds.common.errors import UserError
from mora_ds.common.files import malformed
from mora_ds.common.untrusted import FileName, shown, typed
from mora_ds.engine.shard_index import FLAT, INDEX_FILE, NAME, NUMEL, RANK, START, ShardIndex
from mora_ds.models.tensor_files import open_safetensors

MASTER = "master"
"""The key of a parameter's fp32 master; all other keys are those of the optimizer's state."""

NUMBERS = (torch.int64, torch.float64)
"""Dtypes of values without a dimension that were plain numbers, and no tensors, when they were written."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""Safetensors' names of the dtypes that masters and moments may have."""


def tensor_name(flat: int, key: str) -> str:
    """What the master of flat tensor number `flat`, or its optimizer state `key`, is called in a rank's file."""
    return f"{flat}.{key}"


class _Shard:
    """The file of one rank, opened when it is first read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _handle(self) -> Any:
        return open_safetensors(self.path)

    @cached_property
    def _shapes(self) -> dict[int, dict[str, list[int]]]:
        """Number of a flat tensor -> key of its master and of its state -> shape."""
        shapes: dict[int, dict[str, list[int]]] = {}
        for name in self._handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
            with malformed(self.path):
                number, _, key = name.partition(".")
                typed(FileName, key, "a key of the optimizer's state")
                tensor = self._handle.get_slice(name)
                shape = tensor.get_shape()
                if shape and tensor.get_dtype() not in FLOATS:
                    raise UserError(f"{name} has dtype {tensor.get_dtype()}, which is none of {', '.join(FLOATS)}")
                shapes.setdefault(int(number), {})[key] = shape
        return shapes

    def moments(self, flat: int) -> list[str]:
        """Keys of the state that has a value for every element."""
        return [key for key, shape in self._shapes.get(flat, {}).items() if shape and key != MASTER]

    def counts(self, flat: int) -> dict[str, Any]:
        """The rest of the state, such as the step count: a tensor, or the number that it was when it was written."""
        counts = {}
        for key, shape in self._shapes.get(flat, {}).items():
            if not shape:
                value = self._handle.get_tensor(tensor_name(flat, key))
                counts[key] = value.item() if value.dtype in NUMBERS else value.clone()  # the file is mapped once
        return counts

    def read(self, flat: int, key: str, start: int, stop: int) -> Tensor | None:
        """Elements [start, stop) of a master or moment; fewer where it ends earlier, None where there is none."""
        if len(self._shapes.get(flat, {}).get(key, ())) != 1:
            return None
        return self._handle.get_slice(tensor_name(flat, key))[start:stop]


class EngineShards:
    """All shards of a checkpoint as one. Make it with `EngineShards.open`."""

    def __init__(self, folder: Path, index: ShardIndex, rank: int = 0) -> None:
        """`rank`: the writer whose file is read first, where several hold the same elements."""
        self.folder = folder
        self.layout = index.layout
        self.shapes = index.shapes
        """Parameter name -> complete shape."""
        self._index = index
        self._rank = rank
        self._number = {name: number for number, name in enumerate(self.shapes)}
        self._begins = [  # of each parameter's rows, in the table of the masters and in that of the state
            np.searchsorted(table[:, NAME], np.arange(len(self.shapes) + 1)) for table in (index.parts, index.moments)
        ]
        self._shards: dict[int, _Shard] = {}

    @classmethod
    def open(cls, folder: Path) -> EngineShards:
        """Reads the table of an engine folder. Raises `UserError` when it is missing or damaged, or a parameter has
        holes."""
        return cls(folder, ShardIndex.read(folder))

    @property
    def files(self) -> list[Path]:
        return [self.folder / file for file in self._index.files]

    def _shard(self, rank: int) -> _Shard:
        if rank not in self._shards:
            self._shards[rank] = _Shard(self.folder / self._index.files[rank])
        return self._shards[rank]

    def _rows(self, name: str, is_master: bool, start: int = 0, numel: int | None = None) -> np.ndarray:
        """The rows of the table that hold any of `numel` elements from `start` on (of none: that hold the first one),
        those of the preferred rank first."""
        number = self._number[name]
        begins = self._begins[0 if is_master else 1]
        rows = (self._index.parts if is_master else self._index.moments)[begins[number] : begins[number + 1]]
        end = math.prod(self.shapes[name]) if numel is None else start + max(numel, 1)
        rows = rows[(rows[:, START] < end) & (rows[:, START] + rows[:, NUMEL] > start)]
        return rows[np.argsort(rows[:, RANK] != self._rank, kind="stable")]

    def keys(self, name: str, start: int = 0, numel: int | None = None) -> list[str]:
        """Keys of the optimizer state that has a value for every element of a parameter, such as exp_avg; as the shards
        of these elements have them."""
        row = self._rows(name, False, start, numel)[0]
        return self._shard(int(row[RANK])).moments(int(row[FLAT]))

    def scalars(self, name: str, start: int = 0, numel: int | None = None) -> dict[str, Any]:
        """The rest of the state of a parameter, such as step: one value each. Raises `UserError` if the shards of these
        elements differ."""
        first: dict[str, Any] | None = None
        for row in self._rows(name, True, start, numel):
            shard = self._shard(int(row[RANK]))
            counts = shard.counts(int(row[FLAT]))
            if first is not None and counts != first:
                raise UserError(f"{shard.path}: {name} has {shown(counts)}, another rank's shard {shown(first)}")
            first = counts
        return first or {}

    def group_step(self, group: int) -> int | None:
        """The step count in a parameter group, with which FusedAdam starts the state of a new master; others have none.
        Raises `UserError` for one that is no number."""
        step = self.layout.settings[group].get("step") if group < len(self.layout.settings) else None
        with malformed(self.folder / INDEX_FILE):
            return None if step is None else int(step)

    def read(self, name: str, key: str, start: int = 0, numel: int | None = None, transposed: bool = False) -> Tensor:
        """(numel,) elements of a flattened parameter's master or moment, on the CPU, assembled from all shards.
        `transposed`: those of its transpose. Raises `UserError` where the shards do not hold them."""
        if name not in self.shapes:
            raise UserError(f"{self.folder}: the shards do not hold {name}")
        if (name in self.layout.transposed) is transposed:
            return self._read(name, key, start, numel)
        whole = self._read(name, key, 0, None).view(self.shapes[name]).T.flatten()
        return whole[start : None if numel is None else start + numel].clone()

    def _read(self, name: str, key: str, start: int, numel: int | None) -> Tensor:
        """The same, transposed or not as in the shards. No file is opened that is not needed."""
        end = math.prod(self.shapes[name]) if numel is None else start + numel
        rows = self._rows(name, key == MASTER, start, numel)
        complete = rows[(rows[:, START] <= start) & (rows[:, START] + rows[:, NUMEL] >= end)]
        whole: Tensor | None = None
        for _, begin, size, rank, flat, offset in (complete[:1] if len(complete) else rows).tolist():
            shard = self._shard(rank)
            first = max(start, begin)
            last = max(first, min(end, begin + size))
            values = shard.read(flat, key, offset + first - begin, offset + last - begin)
            if values is None:
                raise UserError(f"{shard.path} has no {key} of {name}")
            if len(values) < last - first:
                raise UserError(f"{shard.path} is incomplete: {key} of {name}")
            if whole is None:
                whole = torch.empty(end - start, dtype=values.dtype)
            whole[first - start : last - start] = values
        assert whole is not None, "every parameter has a part"
        return whole

    def whole(self, name: str, key: str) -> Tensor:
        """A complete master or moment in the parameter's shape."""
        return self.read(name, key).view(self.shapes[name])
