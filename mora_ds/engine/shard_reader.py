"""Reads the shards of a checkpoint, whatever the number of processes that wrote them. Needs no DeepSpeed.

    engine/layouts.safetensors    which part of which parameter lies where in the shards of all ranks (`shard_index`)
    engine/*_optim_states.pt      fp32 masters and optimizer state, flat (DeepSpeed's, a pickle)

`EngineShards.read(name, key, start, numel)` assembles any range of a complete parameter: its fp32 master, or any tensor
of its optimizer state. The files are memory-mapped, so that only what is asked for is read, and are read as plain data
(`pickled`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mora_ds.common.errors import UserError
from mora_ds.common.files import malformed
from mora_ds.common.untrusted import FileName, shown, typed
from mora_ds.engine.pickled import load_pickled
from mora_ds.engine.shard_index import FLAT, NAME, NUMEL, OFFSET, RANK, START, ShardIndex

MASTER = "master"
"""The key of a parameter's fp32 master; all other keys are those of the optimizer's state."""


class _Shard:
    """The file of one rank, opened when it is first read."""

    def __init__(self, folder: Path, index: ShardIndex, rank: int) -> None:
        self.path, self.layout = folder / index.files[rank], index.layout
        self._parts = index.parts[index.parts[:, RANK] == rank]
        self._moments = index.moments[index.moments[:, RANK] == rank]
        self._names = list(index.shapes)

    @cached_property
    def _content(self) -> Any:
        return load_pickled(self.path)

    def _at(self, keys: list[str]) -> Any:
        value = self._content
        with malformed(self.path):
            for key in keys:
                value = value[key]
        return value

    def _name(self, flat: int) -> str:
        """The name of the first parameter in a flat tensor."""
        with malformed(self.path):
            return self._names[self._parts[self._parts[:, FLAT] == flat][0, NAME]]

    def master(self, flat: int) -> Tensor:
        """A complete flat tensor, one-dimensional."""
        masters = self._at(self.layout.masters)
        with malformed(self.path):
            if isinstance(masters, dict):  # without ZeRO in fp32: the module's own parameters, by name
                master = masters[self._name(flat)]
            else:
                master = list(_flattened(masters))[flat]
        if not isinstance(master, Tensor):
            raise UserError(f"{self.path}: master {flat} must be a tensor, got {shown(master)}")
        return master.reshape(-1)

    def state(self, flat: int) -> dict[str, Any]:
        """Everything that the optimizer keeps for a flat tensor. Raises `UserError` naming the file."""
        state = self._at(self.layout.state)
        with malformed(self.path):
            states = state if isinstance(state, list) else state["state"]
            values = states[flat] if flat in range(len(states)) else {}
        for key, value in typed(dict[FileName, Any], values, f"{self.path}: state").items():
            if not isinstance(value, (Tensor, int, float)):
                raise UserError(f"{self.path}: {key} of the optimizer's state is {shown(value)}")
        return values

    def moments(self, flat: int) -> dict[str, Tensor]:
        """The part of the state that has a value for every element, one-dimensional."""
        rows = self._moments[self._moments[:, FLAT] == flat]
        least = int((rows[:, OFFSET] + rows[:, NUMEL]).max()) if len(rows) else 1
        return {
            key: value.reshape(-1)
            for key, value in self.state(flat).items()
            if isinstance(value, Tensor) and value.dim() > 0 and value.numel() >= least
        }


def _flattened(tensors: Any) -> Iterator[Tensor]:
    for each in tensors:
        if isinstance(each, (list, tuple)):
            yield from _flattened(each)
        else:
            yield each


class EngineShards:
    """All shards of a checkpoint as one. Make it with `EngineShards.open`."""

    def __init__(self, folder: Path, index: ShardIndex, rank: int = 0) -> None:
        """`rank`: the writer whose file is read first, where several hold the same elements."""
        self.folder = folder
        self.layout = index.layout
        self.shapes = index.shapes
        """Parameter name -> complete shape."""
        self._index, self._rank = index, rank
        self._number = {name: number for number, name in enumerate(self.shapes)}
        self._begins = [  # of each parameter's rows, in the table of the masters and in that of the state
            np.searchsorted(table[:, NAME], np.arange(len(self.shapes) + 1)) for table in (index.parts, index.moments)
        ]
        self._shards: dict[int, _Shard] = {}

    @classmethod
    def open(cls, folder: Path) -> EngineShards:
        """Reads the table of an engine folder. Raises `UserError` when one is missing or a parameter has holes."""
        return cls(folder, ShardIndex.read(folder))

    @property
    def files(self) -> list[Path]:
        return [self.folder / file for file in self._index.files]

    def _shard(self, rank: int) -> _Shard:
        if rank not in self._shards:
            self._shards[rank] = _Shard(self.folder, self._index, rank)
        return self._shards[rank]

    def _rows(self, name: str, is_master: bool, start: int = 0, numel: int | None = None) -> np.ndarray:
        """The rows of the table that hold any of `numel` elements from `start` on (of none: that hold the first one),
        those of the preferred rank first."""
        number, begins = self._number[name], self._begins[0 if is_master else 1]
        rows = (self._index.parts if is_master else self._index.moments)[begins[number] : begins[number + 1]]
        end = math.prod(self.shapes[name]) if numel is None else start + max(numel, 1)
        rows = rows[(rows[:, START] < end) & (rows[:, START] + rows[:, NUMEL] > start)]
        return rows[np.argsort(rows[:, RANK] != self._rank, kind="stable")]

    def keys(self, name: str, start: int = 0, numel: int | None = None) -> list[str]:
        """Keys of the optimizer state that has a value for every element of a parameter, such as exp_avg; as the shards
        of these elements have them."""
        row = self._rows(name, False, start, numel)[0]
        return list(self._shard(int(row[RANK])).moments(int(row[FLAT])))

    def scalars(self, name: str, start: int = 0, numel: int | None = None) -> dict[str, Any]:
        """The rest of the state of a parameter, such as step: one value each. Raises `UserError` if the shards of these
        elements differ."""
        first: dict[str, Any] | None = None
        for row in self._rows(name, True, start, numel):
            shard, index = self._shard(int(row[RANK])), int(row[FLAT])
            moments = shard.moments(index)
            values = {key: value for key, value in shard.state(index).items() if key not in moments}
            with malformed(shard.path):
                is_same = first is None or _equal(values, first)
            if not is_same:
                raise UserError(f"{shard.path}: {name} has {shown(values)}, another rank's shard {shown(first)}")
            first = values
        return {key: value.clone() if isinstance(value, Tensor) else value for key, value in (first or {}).items()}

    def group_step(self, group: int) -> int | None:
        """The step count of optimizers that keep it with the parameter group (DeepSpeed's FusedAdam)."""
        step = self.layout.settings[group].get("step") if group < len(self.layout.settings) else None
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
            source = shard.master(flat) if key == MASTER else shard.moments(flat).get(key)
            if source is None:
                raise UserError(f"{shard.path} has no {key} of {name}")
            if source.numel() < offset + size:
                raise UserError(f"{shard.path} is incomplete: {key} of {name}")
            if whole is None:
                whole = torch.empty(end - start, dtype=source.dtype)
            first, last = max(start, begin), min(end, begin + size)
            if first < last:
                whole[first - start : last - start] = source.narrow(0, offset + first - begin, last - first)
        assert whole is not None, "every parameter has a part"
        return whole

    def whole(self, name: str, key: str) -> Tensor:
        """A complete master or moment in the parameter's shape."""
        return self.read(name, key).view(self.shapes[name])


def _equal(values: dict[str, Any], others: dict[str, Any]) -> bool:
    return values.keys() == others.keys() and all(
        bool(torch.as_tensor(values[key] == others[key]).all()) for key in values
    )
