"""The shards of a checkpoint: the file of each rank, and a table that says which extent of
which parameter lies where in all of them.

    RankShard       where the extents of one rank lie in its file
    EngineShards    the files of all ranks as one: any range of a complete parameter, its fp32 master or its moments

    engine/layouts.safetensors    written by rank 0: the table
    engine/rank-*.safetensors     "<number>.master", "<number>.<key>": each flat fp32 master, and what the optimizer
                                  keeps for it: moments of its length, counts without a dimension.
                                  "rng.<kind>": the rank's random states

The files hold each element once. Engines give and take the tensors (`engine.shards`).

Not used: DeepSpeed's own `save_checkpoint`, which writes pickles that serve the same
number of processes only; and torch.distributed.checkpoint (tried with torch 2.13). With
a planner of its own that restores the shards of 2 ranks on 3 to the bit, but its table
is a pickle with a Python object for each extent: for 256 ranks with 224 matrices rank 0
took 10 s to plan it, and every rank 16 s to read it, where the table here took 0.1 s.
It records no hashes.

4,096 ranks with 224 matrices under ZeRO-3 have 917,504 extents. The table has runs in
place of them: extents of one length that follow one another in a parameter and from
rank to rank. A matrix is then about two rows, whatever the number of ranks: its equal
shares, and the last one, which is shorter. Each rank counts its own extents back to
where the first rank would hold them, so that ranks of the same runs send rank 0 the
same bytes.
"""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mora_ds.common.errors import RunError, UserError
from mora_ds.common.files import (
    FORMAT,
    JsonObject,
    json_digest,
    malformed,
    pop_format,
)
from mora_ds.common.tensor_files import (
    Tensors,
    open_safetensors,
    write_safetensors,
)
from mora_ds.common.untrusted import FileName, plain_json, shown, typed
from mora_ds.engine.shards import MASTER, Extent, Layout, Partitions, State

INDEX_FILE = "layouts.safetensors"
RNG = "rng"
"""Before the kinds of random states in a rank's file: "rng.cpu"."""


def rank_file(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


NAME, START, NUMEL, RANK, FLAT, OFFSET, STRIDE, COUNT = range(8)
"""Columns of the table. A row is a run of COUNT extents, one after the other in a
parameter, of which the ranks RANK, RANK + STRIDE, ... hold one each: index of the
parameter's name; first element of the run and number of elements of each extent; the
flat tensor in each rank's file, and the offset in that."""
COLUMNS = 8
MAX_ORIGINS = 64 * 1_000_000
"""The most bytes that the origins of a rank are unpacked to, which another process sends."""


def _moved(runs: np.ndarray, steps: int | np.ndarray) -> np.ndarray:
    """Runs (P, 8) that begin this number of extents and of ranks further on."""
    moved = runs.copy()
    moved[:, START] += steps * runs[:, NUMEL]
    moved[:, RANK] += steps * runs[:, STRIDE]
    return moved


class RankShard(NamedTuple):
    """Where the extents of one rank lie in its file."""

    rank: int
    file: str
    stride: int
    """The distance to the rank that holds the following elements: the size of a
    tensor-parallel group, else 1."""
    origins: bytes
    """Compressed rows (P, 8) int64, a run of one extent each: those of this rank,
    counted back to where the first rank would hold them if they continued its own."""
    layout: str
    """A digest of what must be the same on all ranks."""

    @classmethod
    def of(
        cls,
        layout: Layout,
        rank: int,
        file: str,
        flats: list[list[Extent]],
        settings: Sequence[JsonObject] = (),
        stride: int = 1,
    ) -> RankShard:
        """`flats`: the extents in each flat tensor. `settings`, `stride`: as in
        `Partitions`."""
        number_of = {name: number for number, name in enumerate(layout.shapes)}
        place = rank // stride
        rows = [
            (
                number_of[extent.name],
                extent.start - place * extent.numel,
                extent.numel,
                rank - place * stride,
                flat,
                extent.offset,
                stride,
                1,
            )
            for flat, extents in enumerate(flats)
            for extent in extents
        ]
        origins = zlib.compress(np.array(rows, np.int64).tobytes(), level=1)
        digest = json_digest([asdict(layout), *settings])
        return cls(rank, file, stride, origins, digest)

    @classmethod
    def of_engine(cls, rank: int, held: Partitions) -> RankShard:
        """Where a rank's file has what the rank holds of an engine."""
        flats = [partition.extents for partition in held.partitions]
        file = rank_file(rank)
        return cls.of(held.layout, rank, file, flats, held.settings, held.stride)

    def run(self, count: int) -> np.ndarray:
        """Runs (P, 8) of this rank and those after it that have the same origins,
        `count` ranks in all."""
        unpacker = zlib.decompressobj()
        unpacked = unpacker.decompress(self.origins, MAX_ORIGINS)
        if unpacker.unconsumed_tail:
            raise RunError(
                f"{self.file} is said to have more than {MAX_ORIGINS // 64:,} extents"
            )
        origins = np.frombuffer(unpacked, np.int64)
        runs = _moved(origins.reshape(-1, COLUMNS), self.rank // self.stride)
        runs[:, COUNT] = count
        return runs


# -- the shards of all ranks -----------------------------------------------------------


@dataclass(eq=False)
class EngineShards:
    """All shards of a checkpoint as one. Make it with `open`, or `of` to write its
    table."""

    folder: Path
    layout: Layout
    files: list[str]
    """The file of every rank."""
    runs: np.ndarray
    """(P, 8) int64 rows, by name and then by start."""
    local: Callable[[Path], Path] = field(default=Path)
    """The file on this machine that has the content of one in `folder`."""
    _shards: dict[int, _Shard] = field(init=False, default_factory=dict)
    """The files that were read, by the ranks that wrote them."""

    @classmethod
    def of(cls, folder: Path, layout: Layout, shards: list[RankShard]) -> EngineShards:
        """From the shards of all ranks, in their order."""
        # Tensor-parallel ranks of one index hold following extents
        by_index = sorted(shards, key=lambda shard: shard.rank % shard.stride)
        groups = itertools.groupby(by_index, attrgetter("origins"))
        alike = [list(group) for _, group in groups]
        runs = np.concatenate([ranks[0].run(len(ranks)) for ranks in alike])
        in_order = runs[np.lexsort((runs[:, START], runs[:, NAME]))]
        return cls(folder, layout, [shard.file for shard in shards], _joined(in_order))

    @classmethod
    def open(cls, folder: Path) -> EngineShards:
        """Read the table of an engine folder. Raises `UserError` naming the file that
        is missing or damaged, or the parameter that has holes."""
        path = folder / INDEX_FILE
        handle = open_safetensors(path)
        with malformed(path):
            content = plain_json((handle.metadata() or {})["layout"], path)
            pop_format(path, content)
            files = typed(list[FileName], content.pop("files"), f"{path}: files")
            layout: Layout = typed(Layout, content, path)
            runs = handle.get_tensor("extents").long().numpy()
            if len(files) != layout.world_size:
                raise UserError(
                    f"{path}: it lists {len(files)} files of {layout.world_size} ranks"
                )
            shards = cls(folder, layout, files, runs)
            shards._check_complete()
        return shards

    @property
    def where(self) -> Path:
        """The file of the table."""
        return self.folder / INDEX_FILE

    def write_table(self, path: Path) -> None:
        """Write the table to a file."""
        content = {"format": FORMAT, **asdict(self.layout), "files": self.files}
        table = {"extents": torch.from_numpy(self.runs)}
        write_safetensors(path, table, {"layout": json.dumps(content)})

    def state(self, name: str, start: int = 0, numel: int | None = None) -> State:
        """What the optimizer keeps of elements of a parameter: the keys of values for
        every element, such as exp_avg, and the other values by their keys, such as
        step. Raises `UserError` where shards differ."""
        first: State | None = None
        for rank, flat, *_ in self._pieces(name, start, numel):
            shard = self._shard(rank)
            state = shard.state(flat)
            if first is not None and state != first:
                raise UserError(
                    f"{shard.path}: {name} has {shown(state)}, another rank's shard {shown(first)}"
                )
            first = state
        assert first is not None, "every parameter has an extent"
        return first

    def read(
        self, name: str, key: str, start: int = 0, numel: int | None = None
    ) -> Tensor:
        """(numel,) elements of a flattened parameter's master or moment, on the CPU,
        assembled from all shards. Raises `UserError` where the shards do not hold
        them."""
        pieces = [
            self._shard(rank).read(flat, key, first, stop)
            for rank, flat, first, stop in self._pieces(name, start, numel)
        ]
        return torch.cat(pieces)

    def full(self, name: str, key: str) -> Tensor:
        """A complete master or moment in the parameter's shape."""
        return self.read(name, key).view(self.layout.shapes[name])

    def random_states(self, rank: int) -> Tensors:
        """Kind -> uint8 (bytes,), of a rank that wrote the checkpoint."""
        return self._shard(rank).random_states()

    def _shard(self, rank: int) -> _Shard:
        if rank not in self._shards:
            self._shards[rank] = _Shard(self.local(self.folder / self.files[rank]))
        return self._shards[rank]

    def _pieces(
        self, name: str, start: int, numel: int | None
    ) -> Iterator[tuple[int, int, int, int]]:
        """(rank, flat tensor in its file, first element there, end) of each part of
        the `numel` elements from `start` on, in order; of 0, an empty part."""
        end = math.prod(self.layout.shapes[name]) if numel is None else start + numel
        for row in self._runs_of[name]:
            _, run_start, length, rank, flat, offset, stride, count = row
            skipped = max(start - run_start, 0) // length
            for number in range(skipped, count):
                extent_start = run_start + number * length
                if extent_start >= max(end, start + 1):
                    return
                first = offset + max(start - extent_start, 0)
                stop = offset + min(end - extent_start, length)
                yield rank + number * stride, flat, first, stop

    @cached_property
    def _runs_of(self) -> dict[str, list[list[int]]]:
        """Parameter name -> its rows of the table, which follow one another without a
        hole."""
        names = self.layout.shapes
        first_rows = np.searchsorted(self.runs[:, NAME], np.arange(1, len(names)))
        tables = np.split(self.runs, first_rows)
        return {name: rows.tolist() for name, rows in zip(names, tables, strict=True)}

    def _check_complete(self) -> None:
        """Raises `UserError` unless the shards hold every element of each parameter, in
        order."""
        for number, (name, shape) in enumerate(self.layout.shapes.items()):
            runs = self._runs_of[name]
            if not _tile(runs, number, math.prod(shape), len(self.files)):
                raise UserError(
                    f"{self.folder}: the shards do not hold all of {name}, and each element once"
                )


def _tile(runs: list[list[int]], parameter: int, size: int, ranks: int) -> bool:
    """Whether rows of the table, in order, hold each of the `size` elements of the
    parameter with this number once. In numbers of Python, which do not overflow."""
    end = 0
    for row in runs:
        number, start, length, rank, flat, offset, stride, count = row
        last_rank = rank + (count - 1) * stride
        if (number, start) != (parameter, end) or last_rank >= ranks:
            return False
        if min(rank, flat, offset) < 0 or min(length, stride, count) < 1:
            return False
        end += length * count
    return end == size


def _joined(runs: np.ndarray) -> np.ndarray:
    """The same extents in fewer rows: each run takes in those that continue it.
    `runs`: (P, 8), in order."""
    continued = _moved(runs[:-1], runs[:-1, COUNT])
    is_other = (continued[:, :COUNT] != runs[1:, :COUNT]).any(axis=1)
    first_rows = np.flatnonzero(np.append(True, is_other))
    joined = runs[first_rows]
    joined[:, COUNT] = np.add.reduceat(runs[:, COUNT], first_rows)
    return joined


class _Shard:
    """The file of one rank."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = open_safetensors(path)
        self._shapes: dict[str, dict[str, list[int]]] = {}
        """Number of a flat tensor -> key of its master and of its state -> shape;
        RNG -> kind -> shape."""
        for name in self._handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
            with malformed(path):
                number, _, key = name.partition(".")
                typed(FileName, key, "a key of the optimizer's state")
                shape = self._handle.get_slice(name).get_shape()
                self._shapes.setdefault(number, {})[key] = shape

    def random_states(self) -> Tensors:
        """Kind -> uint8 (bytes,)."""
        return {
            kind: self._handle.get_tensor(_tensor_name(RNG, kind))
            for kind in self._shapes.get(RNG, {})
        }

    def state(self, flat: int) -> State:
        """What the optimizer keeps for a flat tensor, as `EngineShards.state`."""
        moments = []
        counts = {}
        for key, shape in self._shapes.get(str(flat), {}).items():
            if not shape:
                # A copy: an optimizer counts on in it, and must not in the mapped file
                counts[key] = self._handle.get_tensor(_tensor_name(flat, key)).clone()
            elif key != MASTER:
                moments.append(key)
        return moments, counts

    def read(self, flat: int, key: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a master or moment. Raises `UserError` where the
        file does not hold them."""
        name = _tensor_name(flat, key)
        shape = self._shapes.get(str(flat), {}).get(key, [])
        if len(shape) != 1 or shape[0] < stop:
            raise UserError(
                f"{self.path} is incomplete: it does not hold the elements {start} to {stop} of {name}"
            )
        return self._handle.get_slice(name)[start:stop]


def rank_tensors(held: Partitions) -> Tensors:
    """What a rank holds of an engine, by the names in its file."""
    return {
        _tensor_name(number, key): tensor
        for number, partition in enumerate(held.partitions)
        for key, tensor in partition.tensors.items()
    }


def _tensor_name(flat: int | str, key: str) -> str:
    """The name in a rank's file of a flat tensor's master or state `key`."""
    return f"{flat}.{key}"
