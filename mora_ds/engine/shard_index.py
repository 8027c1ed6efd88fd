"""Which part of which parameter lies where in the shards of a checkpoint: one table for the shards of all ranks.

    engine/layouts.safetensors    that table, written by rank 0: one row a part, and what all ranks have in common

1,024 ranks with 224 matrices under ZeRO-3 have 229,376 parts: they stay rows of an array, which is sorted, checked and
searched as a whole. Needs no DeepSpeed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch

from mora_ds.common.errors import Bounds, UserError
from mora_ds.common.files import FORMAT, malformed, require_format
from mora_ds.common.untrusted import MAX_SIDE, FileName, Processes, plain_json, typed
from mora_ds.models.tensor_files import open_safetensors, write_safetensors_atomic

INDEX_FILE = "layouts.safetensors"

Length = Annotated[int, Bounds(least=1, most=2 * MAX_SIDE)]
"""Of one dimension of a parameter; LoRA's factors are as long as both sides of a layer."""


@dataclass(frozen=True)
class Part:
    """Elements [start, start + numel) of a flattened parameter, which lie from `offset` on in a flat tensor."""

    name: str
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """What all ranks of a run have in common."""

    world_size: Processes
    stage: int
    optimizer: str
    """Class name of the torch optimizer, such as AdamW."""
    groups: list[dict[FileName, list[Length]]]
    """For each parameter group, its parameters and their complete shapes."""
    settings: list[dict[str, Any]]
    """For each parameter group: learning rate, betas and so on; for some optimizers the step count."""
    counters: dict[str, int]
    scaler: dict[str, float]
    """State of fp16's loss scaler."""
    transposed: list[str]
    """MoRA matrices of which the shards hold the transpose (tensor parallelism with an aligned grouping)."""

    @property
    def names(self) -> list[str]:
        """All parameters, in the order in which the table counts them."""
        return [name for group in self.groups for name in group]


NAME, START, NUMEL, RANK, FLAT, OFFSET = range(6)
"""Columns of the table: index of the parameter's name; first element and number of elements; the rank that wrote the
part; the flat tensor in its file, and the offset in that."""


class RankShard(NamedTuple):
    """Where the parts of one rank lie in its file."""

    rank: int
    file: str
    parts: np.ndarray
    """(P, 6) int64"""
    moments: np.ndarray | None
    """(Q, 6) int64 of the optimizer's state; None: as `parts`."""
    layout: str
    """A digest of the rank's `Layout`, which must be that of all."""

    @classmethod
    def of(cls, layout: Layout, rank: int, file: str, flats: list[list[Part]], moments: list[list[Part]]) -> RankShard:
        """`flats`: the parts in each flat tensor; `moments`: those in its optimizer state, which are not always the
        same (see `optimizer_view.Flat`)."""
        number = {name: index for index, name in enumerate(layout.names)}
        state_rows = None if moments == flats else _rows(moments, rank, number)
        digest = hashlib.sha256(json.dumps(asdict(layout), sort_keys=True).encode()).hexdigest()
        return cls(rank, file, _rows(flats, rank, number), state_rows, digest)


def _rows(flats: list[list[Part]], rank: int, number: dict[str, int]) -> np.ndarray:
    rows = [
        (number[part.name], part.start, part.numel, rank, index, part.offset)
        for index, flat in enumerate(flats)
        for part in flat
    ]
    return np.array(rows, np.int64).reshape(-1, 6)


@dataclass(frozen=True)
class ShardIndex:
    """The table of all shards. Make it with `read` or `of`. It can be pickled: rank 0 reads it for all."""

    layout: Layout
    files: list[str]
    """The file of every rank."""
    parts: np.ndarray
    """(P, 6) int64 rows of the masters, by name and then by start."""
    moments: np.ndarray
    """(Q, 6) int64 rows of the optimizer's state; `parts` itself where they are the same."""

    @classmethod
    def of(cls, layout: Layout, shards: list[RankShard]) -> ShardIndex:
        """From the shards of all ranks, in their order."""
        parts = _sorted(np.concatenate([shard.parts for shard in shards]))
        if all(shard.moments is None for shard in shards):
            moments = parts
        else:
            state_rows = [shard.parts if shard.moments is None else shard.moments for shard in shards]
            moments = _sorted(np.concatenate(state_rows))
        return cls(layout, [shard.file for shard in shards], parts, moments)

    @classmethod
    def read(cls, folder: Path) -> ShardIndex:
        """Raises `UserError` naming the file that is missing or damaged, or the parameter that has holes."""
        path = folder / INDEX_FILE
        handle = open_safetensors(path)
        with malformed(path):
            content = plain_json((handle.metadata() or {})["layout"], path)
            require_format(path, content)
            content.pop("format")
            files = typed(list[FileName], content.pop("files"), f"{path}: files")
            layout: Layout = typed(Layout, content, path)
            tables = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (no mapping)
            parts = _table(tables["parts"])
            moments = _table(tables["moments"]) if "moments" in tables else parts
        if len(files) != layout.world_size:
            raise UserError(f"{path}: it lists {len(files)} files of {layout.world_size} ranks")
        index = cls(layout, files, parts, moments)
        index._check_whole(folder)
        return index

    def write(self, folder: Path) -> None:
        """Write layouts.safetensors atomically. Raises `RunError` on a full disk."""
        content = {"format": FORMAT, **asdict(self.layout), "files": self.files}
        tables = {"parts": torch.from_numpy(self.parts)}
        if self.moments is not self.parts:
            tables["moments"] = torch.from_numpy(self.moments)
        write_safetensors_atomic(folder / INDEX_FILE, tables, {"layout": json.dumps(content)})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> complete shape."""
        return {name: tuple(shape) for group in self.layout.groups for name, shape in group.items()}

    def _check_whole(self, folder: Path) -> None:
        """Raises `UserError` unless the files are large enough for the parameters, and hold every element of each."""
        listed = set(self.files)
        nbytes = sum(entry.stat().st_size for entry in os.scandir(folder) if entry.name in listed and entry.is_file())
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        if sum(sizes) > nbytes:
            raise UserError(f"{folder / INDEX_FILE} lists parameters of more elements than the shards have bytes")
        tables = [("", self.parts)]
        if self.moments is not self.parts:
            tables.append(("the optimizer's state of ", self.moments))
        for what, rows in tables:
            names = rows[:, NAME]
            if len(names) and not 0 <= names.min() <= names.max() < len(sizes):
                raise UserError(f"{folder}: a shard holds a parameter that no parameter group lists")
            if (faulty := _first_hole(rows, np.array(sizes, np.int64), len(self.files), once=not what)) is not None:
                once = "" if what else ", and each element once"
                raise UserError(f"{folder}: the shards do not hold all of {what}{self.layout.names[faulty]}{once}")


def _sorted(rows: np.ndarray) -> np.ndarray:
    """By name, then by start, then by rank."""
    return rows[np.lexsort((rows[:, RANK], rows[:, START], rows[:, NAME]))]


def _table(tensor: torch.Tensor) -> np.ndarray:
    """Raises ValueError for another shape, dtype or order than `write` gives it."""
    if tensor.dtype != torch.int64 or tensor.dim() != 2 or tensor.shape[1] != 6:
        raise ValueError(f"a table of shape {tuple(tensor.shape)} {tensor.dtype}")
    return _sorted(tensor.numpy())


def _first_hole(rows: np.ndarray, sizes: np.ndarray, ranks: int, once: bool) -> int | None:
    """The index of the first parameter of which a part is missing, out of bounds or (`once`) held twice; else None."""
    name = rows[:, NAME]
    start = rows[:, START]
    numel = rows[:, NUMEL]
    wrong = (start < 0) | (numel < 1) | (numel > sizes[name]) | (start > sizes[name] - numel)
    wrong |= (rows[:, RANK] < 0) | (rows[:, RANK] >= ranks) | (rows[:, FLAT] < 0) | (rows[:, OFFSET] < 0)
    if wrong.any():
        return int(name[wrong.argmax()])
    # All parameters one after the other are one range, which the rows, in order, must cover.
    begins = np.concatenate([[0], np.cumsum(sizes)])
    first = begins[name] + start
    reached = np.concatenate([[0], np.maximum.accumulate(first + numel)])
    first = np.concatenate([first, [begins[-1]]])
    holes = reached != first if once else reached < first
    if not holes.any():
        return None
    where = holes.argmax()
    at = int(min(reached[where], first[where]))  # the element that is missing, or held twice
    return min(int(np.searchsorted(begins, at, side="right")) - 1, len(sizes) - 1)
