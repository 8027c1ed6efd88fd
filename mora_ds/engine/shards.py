"""The shards of a checkpoint: taken from an engine, written, read, and restored into
one by any number of processes.

    shard_of        the tensors that this process writes of an engine, and what lies where in them
    write_shard     its file
    EngineShards    the files of all ranks as one: any range of a complete parameter, its fp32 master or its moments
    restore         masters, low-precision copies, optimizer state and counters of this process

    engine/layouts.safetensors    written by rank 0: which extent of which parameter lies where in all ranks' files
    engine/rank-*.safetensors     "<number>.master", "<number>.<key>": each flat fp32 master, and what the optimizer
                                  keeps for it: moments of its length, counts without a dimension.
                                  "rng.<kind>": the rank's random states, which restore leaves alone

Masters and moments go by `OptimizerView.flats`: which extent of which parameter lies
where in the tensors that the optimizer steps on. The files hold each element once.
Written against DeepSpeed 0.19.8; tests/checkpoint/test_elastic.py fails where an
upgrade lays something out in another way.

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
where the first rank would hold them, so that ranks of the same runs bring rank 0 the
same bytes.
"""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.common.errors import Bounds, UserError
from mora_ds.common.files import (
    FORMAT,
    JsonObject,
    json_digest,
    malformed,
    pop_format,
)
from mora_ds.common.nested import different_keys
from mora_ds.common.tensor_files import (
    Shape,
    Tensors,
    open_safetensors,
    write_safetensors_atomic,
)
from mora_ds.common.untrusted import (
    MAX_SIDE,
    FileName,
    Processes,
    plain_json,
    shown,
    typed,
)
from mora_ds.engine import zero
from mora_ds.engine.zero import Flat, Span, view_of
from mora_ds.parallel.topology import shard_info

INDEX_FILE = "layouts.safetensors"
RNG = "rng"
"""Before the kinds of random states in a rank's file: "rng.cpu"."""
RNG_FILE = "rng.safetensors"
"""Beside the engine's folder, in checkpoints of earlier versions: the random states of
all ranks, for each kind a tensor uint8 (ranks, bytes)."""

MASTER = "master"
"""The key of a parameter's fp32 master; the optimizer's state has all others."""
COUNTERS = ("global_steps", "global_samples", "skipped_steps")
"""Attributes that the engine's own checkpoints restore (engine.py,
`_load_checkpoint`)."""
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What changes in a loss scaler (fp16/loss_scaler.py)."""

Length = Annotated[int, Bounds(least=1, most=2 * MAX_SIDE)]
"""Of one dimension of a parameter; LoRA's factors are as long as both sides of a
layer."""


# -- what lies where -------------------------------------------------------------------


@dataclass(frozen=True)
class Extent:
    """Elements [start, start + numel) of a parameter, at `offset` in a flat tensor."""

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
    counters: dict[str, int]
    scaler: dict[str, int | float]
    """State of fp16's loss scaler."""

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Parameter name -> complete shape, in the order of the table."""
        return {
            name: tuple(shape) for group in self.groups for name, shape in group.items()
        }


NAME, START, NUMEL, RANK, FLAT, OFFSET, STRIDE, COUNT = range(8)
"""Columns of the table. A row is a run of COUNT extents, one after the other in a
parameter, of which the ranks RANK, RANK + STRIDE, ... hold one each: index of the
parameter's name; first element of the run and number of elements of each extent; the
flat tensor in each rank's file, and the offset in that."""
COLUMNS = 8


def _moved(runs: np.ndarray, steps: int | np.ndarray) -> np.ndarray:
    """Runs (P, 8) that begin so many extents, and as many ranks, further on."""
    moved = runs.copy()
    moved[:, START] += steps * runs[:, NUMEL]
    moved[:, RANK] += steps * runs[:, STRIDE]
    return moved


class RankShard(NamedTuple):
    """Where the extents of one rank lie in its file."""

    rank: int
    file: str
    stride: int
    """What this rank holds goes on with the rank so much higher: 1, or the size of a
    tensor-parallel group."""
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
        """`flats`: the extents in each flat tensor. `settings`: of the optimizer's
        groups, its learning rates among them."""
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

    def run(self, count: int) -> np.ndarray:
        """Runs (P, 8) of this rank and those after it that have the same origins,
        `count` ranks in all."""
        origins = np.frombuffer(zlib.decompress(self.origins), np.int64)
        runs = _moved(origins.reshape(-1, COLUMNS), self.rank // self.stride)
        runs[:, COUNT] = count
        return runs


State = tuple[list[str], Tensors]
"""(keys of what an optimizer keeps for every element, such as exp_avg; its other values
by their keys, such as step)"""

# -- the shards of all ranks -----------------------------------------------------------


@dataclass(eq=False)
class EngineShards:
    """All shards of a checkpoint as one. Make it with `open`, or `of` to write its
    table.

    It can be pickled until the first shard is read: rank 0 reads the table for all.
    """

    folder: Path
    layout: Layout
    files: list[str]
    """The file of every rank."""
    runs: np.ndarray
    """(P, 8) int64 rows, by name and then by start."""
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
            if runs.shape[1] == STRIDE:
                # Of an earlier version: without the last columns, a row for each extent
                runs = _joined(np.pad(runs, [(0, 0), (0, 2)], constant_values=1))
            if len(files) != layout.world_size:
                raise UserError(
                    f"{path}: it lists {len(files)} files of {layout.world_size} ranks"
                )
            shards = cls(folder, layout, files, runs)
            shards._check_whole()
        return shards

    def write_table(self) -> None:
        """Write layouts.safetensors atomically. Raises `RunError` on a full disk."""
        content = {"format": FORMAT, **asdict(self.layout), "files": self.files}
        table = {"extents": torch.from_numpy(self.runs)}
        write_safetensors_atomic(
            self.folder / INDEX_FILE, table, {"layout": json.dumps(content)}
        )

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

    def whole(self, name: str, key: str) -> Tensor:
        """A complete master or moment in the parameter's shape."""
        return self.read(name, key).view(self.layout.shapes[name])

    def random_states(self, rank: int) -> Tensors:
        """Kind -> uint8 (bytes,), of a rank that wrote the checkpoint."""
        of_all = self.folder.parent / RNG_FILE
        if of_all.is_file():
            handle = open_safetensors(of_all)
            with malformed(of_all):
                return {kind: handle.get_slice(kind)[rank] for kind in handle.keys()}  # noqa: SIM118  (no mapping)
        return self._shard(rank).random_states()

    def _shard(self, rank: int) -> _Shard:
        if rank not in self._shards:
            self._shards[rank] = _Shard(self.folder / self.files[rank])
        return self._shards[rank]

    def _pieces(
        self, name: str, start: int, numel: int | None
    ) -> Iterator[tuple[int, int, int, int]]:
        """(rank, flat tensor in its file, first element there, end) of each piece of
        the `numel` elements from `start` on, in order; of 0, an empty piece."""
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

    def _check_whole(self) -> None:
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


def _tensor_name(flat: int | str, key: str) -> str:
    """The name in a rank's file of a flat tensor's master or state `key`."""
    return f"{flat}.{key}"


# -- the parameters of an engine -------------------------------------------------------


class _Parameter(NamedTuple):
    """A complete parameter of the model, whatever this process holds of it."""

    name: str
    shape: Shape
    first: int = 0
    """The element with which this process's tensor-parallel share begins."""
    is_saved: bool = True
    """Whether this process saves it, and not another one of its group."""


def _parameters(engine: zero.Engine) -> dict[int, _Parameter]:
    """id of every parameter of an engine's model -> what is known of it."""
    is_first = engine.mpu is None or engine.mpu.get_tensor_model_parallel_rank() == 0
    parameters = {}
    for name, parameter in engine.module.named_parameters():
        share = shard_info(parameter)
        if share is None:
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            parameters[id(parameter)] = _Parameter(name, shape, is_saved=is_first)
        else:
            shape = (share.r_hat, share.r_hat)
            parameters[id(parameter)] = _Parameter(
                name, shape, share.start * share.r_hat
            )
    return parameters


def _extents(spans: list[Span], parameters: dict[int, _Parameter]) -> list[Extent]:
    """The spans of these `parameters`, counted in the complete ones."""
    extents = []
    for span in spans:
        parameter = parameters.get(id(span.parameter))
        if parameter is not None and span.numel:
            start = parameter.first + span.start
            extents.append(Extent(parameter.name, start, span.numel, span.offset))
    return extents


def _layout(engine: zero.Engine) -> Layout:
    view = view_of(engine)
    scaler = view.loss_scaler
    parameters = _parameters(engine)
    groups = []
    for group in view.groups():
        members = [parameters[id(parameter)] for parameter in group]
        groups.append({member.name: list(member.shape) for member in members})
    return Layout(
        world_size=dist.get_world_size(),
        stage=int(engine.zero_optimization_stage()),
        optimizer=type(engine.basic_optimizer).__name__,
        groups=groups,
        counters={name: int(getattr(engine, name)) for name in COUNTERS},
        scaler={
            name: getattr(scaler, name) for name in SCALER if hasattr(scaler, name)
        },
    )


# -- saving ----------------------------------------------------------------------------


def shard_of(engine: zero.Engine) -> tuple[Layout, RankShard, Tensors]:
    """(what all ranks have in common, where the extents of this rank lie in its file,
    that file's tensors). The tensors are the engine's own, but for Muon's momentum."""
    layout = _layout(engine)
    flats = list(view_of(engine).flats())
    tensors: Tensors = {}
    for number, flat in enumerate(flats):
        tensors[_tensor_name(number, MASTER)] = flat.master.detach().view(-1)
        # Sorted, so that the same state is the same file, whatever order it was set in
        for key in sorted(flat.state):
            tensors[_tensor_name(number, key)] = _as_saved(flat, flat.state[key])
    parameters = _parameters(engine).items()
    saved = {key: parameter for key, parameter in parameters if parameter.is_saved}
    extents = [_extents(flat.spans, saved) for flat in flats]
    rank = dist.get_rank()
    file = f"rank-{rank:05d}.safetensors"
    settings = [_plain(group) for group in engine.basic_optimizer.param_groups]
    mpu = engine.mpu
    stride = 1 if mpu is None else mpu.get_tensor_model_parallel_world_size()
    shard = RankShard.of(layout, rank, file, extents, settings, stride)
    return layout, shard, tensors


def _plain(group: JsonObject) -> JsonObject:
    """The settings of a parameter group that JSON can hold: not its parameters."""
    plain = (int, float, str, tuple)
    return {key: value for key, value in group.items() if isinstance(value, plain)}


def _as_saved(flat: Flat, value: Tensor) -> Tensor:
    """A tensor of the optimizer's state, as the file has it: moments flat and as long
    as the master, step counts without a dimension."""
    if not value.dim():
        return value.detach()
    if flat.state_spans is flat.spans:
        return value.detach().view(-1)
    # Muon's momentum holds its matrices whole: other ranks save what they have of them
    # in their masters.
    moments = value.new_zeros(flat.master.numel())
    for whole, span in zip(flat.state_spans, flat.spans, strict=True):
        first = whole.offset + span.start
        moments_here = value[first : first + span.numel]
        moments[span.offset : span.offset + span.numel] = moments_here
    return moments


def write_shard(path: Path, tensors: Tensors) -> None:
    """Write the file of one rank, atomically. Raises `RunError` on a full disk."""
    path.parent.mkdir(exist_ok=True)
    write_safetensors_atomic(path, tensors, {})


# -- restoring -------------------------------------------------------------------------


@torch.no_grad()
def restore(engine: zero.Engine, shards: EngineShards) -> None:
    """Set everything that training changes from the shards of a checkpoint. Collective.
    With the number of processes that wrote them each one opens its own file alone.

    Raises `UserError` when the shards hold other parameters than the model, or another
    optimizer's state.
    """
    parameters = _parameters(engine)
    _check(engine, parameters, shards)
    view = view_of(engine)
    groups = engine.basic_optimizer.param_groups
    for flat in view.flats():
        is_fused = groups[flat.group].get("fused")
        counts_device = flat.master.device if is_fused else "cpu"
        _restore_flat(flat, parameters, shards, counts_device)
    view.write_copies()
    with malformed(shards.folder / INDEX_FILE):
        for name in COUNTERS:
            setattr(engine, name, shards.layout.counters[name])
    for name, number in shards.layout.scaler.items():
        if name in SCALER and hasattr(view.loss_scaler, name):
            setattr(view.loss_scaler, name, number)


def _check(
    engine: zero.Engine, parameters: dict[int, _Parameter], shards: EngineShards
) -> None:
    here = {parameter.name: parameter.shape for parameter in parameters.values()}
    there = shards.layout.shapes
    different = different_keys(here, there)
    if different:
        name = different[0]
        raise UserError(
            f"{shards.folder} does not fit this model in {len(different)} parameters, e.g. {name}: "
            f"{there.get(name, 'none')} there, {here.get(name, 'none')} here"
        )
    mine = type(engine.basic_optimizer).__name__
    theirs = shards.layout.optimizer
    if mine != theirs:
        raise UserError(
            f"{shards.folder} holds the state of {theirs}, this run's optimizer is {mine} (--deepspeed)"
        )


def _restore_flat(
    flat: Flat,
    parameters: dict[int, _Parameter],
    shards: EngineShards,
    device: torch.device | str,
) -> None:
    """Set a master and its state. Padding, which no gradient reaches, becomes zero as
    in a fresh engine. `device`: where the optimizer wants its counts: torch's fused
    Adam beside the master."""
    extents = _extents(flat.spans, parameters)
    state_extents = _extents(flat.state_spans, parameters)

    def fill(target: Tensor, key: str, sources: list[Extent]) -> None:
        values = target.detach().view(-1)
        values.zero_()
        for extent in sources:
            stored = shards.read(extent.name, key, extent.start, extent.numel)
            values.narrow(0, extent.offset, extent.numel).copy_(stored)

    fill(flat.master, MASTER, extents)
    # A tensor of padding alone steps as often as the others of its group, so that it
    # gets the counts of the group's first parameter
    sources = extents
    if not sources:
        with malformed(shards.folder / INDEX_FILE):
            of_group = list(shards.layout.groups[flat.group])
            sources = [Extent(of_group[0], 0, 0, 0)]
    first = sources[0]
    states = [
        shards.state(extent.name, extent.start, extent.numel) for extent in sources
    ]
    keys, counts = states[0]
    for extent, state in zip(sources, states, strict=True):
        if state != states[0]:
            raise UserError(
                f"{shards.folder}: {first.name} and {extent.name} are one tensor here, with different state there"
            )
    for key in set(flat.state) - {*keys, *counts}:
        del flat.state[key]
    for key, count in counts.items():
        flat.state[key] = count.to(device)
    for key in keys:
        if key not in flat.state:
            dtype = shards.read(first.name, key, first.start, 0).dtype
            moments = torch.zeros_like(flat.master, dtype=dtype, requires_grad=False)
            if state_extents != extents:
                length = sum(extent.numel for extent in state_extents)
                moments = moments.new_zeros(length)
            flat.state[key] = moments
        fill(flat.state[key], key, state_extents)
