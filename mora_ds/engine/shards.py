"""The shards of a checkpoint: taken from an engine, written, read, and restored into
one by any number of processes.

    shard_of        the tensors that this process writes of an engine, and what lies where in them
    write_shard     its file
    EngineShards    the files of all ranks as one: any range of a complete parameter, its fp32 master or its moments
    restore         masters, low-precision copies, optimizer state and counters of this process

    engine/layouts.safetensors    written by rank 0: which extent of which parameter lies where in all ranks' files
    engine/rank-*.safetensors     "<number>.master", "<number>.<key>": each flat fp32 master, and what the optimizer
                                  keeps for it: moments of its length, counts without a dimension

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

1,024 ranks with 224 matrices under ZeRO-3 have 229,376 extents: they stay rows of an
array, which is sorted, checked and searched as a whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
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
    require_format,
)
from mora_ds.common.nested import different_keys
from mora_ds.common.tensor_files import (
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
from mora_ds.parallel.topology import share_of

INDEX_FILE = "layouts.safetensors"

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
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> complete shape, in the order of the table."""
        return {
            name: tuple(shape) for group in self.groups for name, shape in group.items()
        }


NAME, START, NUMEL, RANK, FLAT, OFFSET = range(6)
"""Columns of the table: index of the parameter's name; first element and number of
elements; the rank that wrote the extent; the flat tensor in its file, and the offset in
that."""


class RankShard(NamedTuple):
    """Where the extents of one rank lie in its file."""

    rank: int
    file: str
    extents: np.ndarray
    """(P, 6) int64"""
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
    ) -> RankShard:
        """`flats`: the extents in each flat tensor. `settings`: of the optimizer's
        groups, its learning rates among them."""
        number_of = {name: number for number, name in enumerate(layout.shapes)}
        rows = [
            (
                number_of[extent.name],
                extent.start,
                extent.numel,
                rank,
                flat,
                extent.offset,
            )
            for flat, extents in enumerate(flats)
            for extent in extents
        ]
        digest = json_digest([asdict(layout), *settings])
        return cls(rank, file, np.array(rows, np.int64).reshape(-1, 6), digest)


State = tuple[list[str], dict[str, Tensor]]
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
    extents: np.ndarray
    """(P, 6) int64 rows, by name and then by start."""
    _shards: dict[int, _Shard] = field(init=False, default_factory=dict)
    """The files that were read, by the ranks that wrote them."""

    @classmethod
    def of(cls, folder: Path, layout: Layout, shards: list[RankShard]) -> EngineShards:
        """From the shards of all ranks, in their order."""
        rows = np.concatenate([shard.extents for shard in shards])
        in_order = rows[np.lexsort((rows[:, START], rows[:, NAME]))]
        return cls(folder, layout, [shard.file for shard in shards], in_order)

    @classmethod
    def open(cls, folder: Path) -> EngineShards:
        """Read the table of an engine folder. Raises `UserError` naming the file that
        is missing or damaged, or the parameter that has holes."""
        path = folder / INDEX_FILE
        handle = open_safetensors(path)
        with malformed(path):
            content = plain_json((handle.metadata() or {})["layout"], path)
            require_format(path, content)
            content.pop("format")
            files = typed(list[FileName], content.pop("files"), f"{path}: files")
            layout: Layout = typed(Layout, content, path)
            table = handle.get_tensor("extents")
        if table.dtype != torch.int64 or table.dim() != 2 or table.shape[1] != 6:
            raise UserError(
                f"{path} is damaged: its table has the shape {tuple(table.shape)} and is {table.dtype}"
            )
        if len(files) != layout.world_size:
            raise UserError(
                f"{path}: it lists {len(files)} files of {layout.world_size} ranks"
            )
        shards = cls(folder, layout, files, table.numpy())
        with malformed(path):
            shards._check_whole()
        return shards

    def write_table(self) -> None:
        """Write layouts.safetensors atomically. Raises `RunError` on a full disk."""
        content = {"format": FORMAT, **asdict(self.layout), "files": self.files}
        table = {"extents": torch.from_numpy(self.extents)}
        write_safetensors_atomic(
            self.folder / INDEX_FILE, table, {"layout": json.dumps(content)}
        )

    def state(self, name: str, start: int = 0, numel: int | None = None) -> State:
        """What the optimizer keeps of elements of a parameter: the keys of values for
        every element, such as exp_avg, and the other values by their keys, such as
        step. Raises `UserError` where shards differ."""
        first: State | None = None
        for row in self._rows_with(name, start, numel):
            shard = self._shard(int(row[RANK]))
            state = shard.state(int(row[FLAT]))
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
        end = math.prod(self.layout.shapes[name]) if numel is None else start + numel
        rows = self._rows_with(name, start, numel).tolist()
        pieces = []
        for _, begin, size, rank, flat, offset in rows:
            first = offset + max(start - begin, 0)
            stop = offset + min(end - begin, size)
            pieces.append(self._shard(rank).read(flat, key, first, stop))
        return torch.cat(pieces)

    def whole(self, name: str, key: str) -> Tensor:
        """A complete master or moment in the parameter's shape."""
        return self.read(name, key).view(self.layout.shapes[name])

    def _shard(self, rank: int) -> _Shard:
        if rank not in self._shards:
            self._shards[rank] = _Shard(self.folder / self.files[rank])
        return self._shards[rank]

    def _rows_with(self, name: str, start: int, numel: int | None) -> np.ndarray:
        """The rows that hold any of `numel` elements from `start` on
        (of 0, the first)."""
        rows = self._rows[name]
        # They follow one another without a hole
        first = np.searchsorted(rows[:, START], start, side="right") - 1
        if numel is None:
            return rows[first:]
        return rows[first : np.searchsorted(rows[:, START], start + max(numel, 1))]

    @cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        """Parameter name -> its rows of the table."""
        names = self.layout.shapes
        first_rows = np.searchsorted(self.extents[:, NAME], np.arange(1, len(names)))
        return dict(zip(names, np.split(self.extents, first_rows), strict=True))

    def _check_whole(self) -> None:
        """Raises `UserError` unless the shards hold every element of each parameter, in
        order."""
        shapes = self.layout.shapes
        sizes = [math.prod(shape) for shape in shapes.values()]
        names = self.extents[:, NAME]
        if len(names) and not 0 <= names.min() <= names.max() < len(sizes):
            raise UserError(
                f"{self.folder}: a shard holds a parameter that no parameter group lists"
            )
        faulty = _first_hole(self.extents, np.array(sizes, np.int64), len(self.files))
        if faulty is not None:
            raise UserError(
                f"{self.folder}: the shards do not hold all of {list(shapes)[faulty]}, and each element once"
            )


def _first_hole(rows: np.ndarray, sizes: np.ndarray, ranks: int) -> int | None:
    """The index of the first parameter that has a hole or an element twice, or None."""
    name = rows[:, NAME]
    numel = rows[:, NUMEL]
    # Sizes first, as the sums below might overflow
    wrong = (numel < 1) | (numel > sizes[name])
    start = rows[:, START]
    # An extent must not reach into the next parameter
    wrong |= (start < 0) | (start > sizes[name] - numel)
    wrong |= (rows[:, RANK] >= ranks) | (rows[:, [RANK, FLAT, OFFSET]] < 0).any(axis=1)
    if wrong.any():
        return int(name[wrong.argmax()])
    # All parameters one after the other are one range, which the rows, in order, must
    # tile.
    ends = np.cumsum(sizes)
    first = (ends - sizes)[name] + start
    begins = np.append(first, sizes.sum())
    wanted = np.append(0, first + numel)
    if np.array_equal(begins, wanted):
        return None
    faulty = (begins != wanted).argmax()
    # The element that is missing, or held twice
    element = min(begins[faulty], wanted[faulty])
    return min(int(np.searchsorted(ends, element, side="right")), len(sizes) - 1)


class _Shard:
    """The file of one rank."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = open_safetensors(path)
        self._shapes: dict[int, dict[str, list[int]]] = {}
        """Number of a flat tensor -> key of its master and of its state -> shape."""
        for name in self._handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
            with malformed(path):
                number, _, key = name.partition(".")
                typed(FileName, key, "a key of the optimizer's state")
                shape = self._handle.get_slice(name).get_shape()
                self._shapes.setdefault(int(number), {})[key] = shape

    def state(self, flat: int) -> State:
        """As `EngineShards.state`, of a flat tensor."""
        moments = []
        counts = {}
        for key, shape in self._shapes.get(flat, {}).items():
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
        shape = self._shapes.get(flat, {}).get(key, [])
        if len(shape) != 1 or shape[0] < stop:
            raise UserError(
                f"{self.path} is incomplete: it does not hold the elements {start} to {stop} of {name}"
            )
        return self._handle.get_slice(name)[start:stop]


def _tensor_name(flat: int, key: str) -> str:
    """The name in a rank's file of a flat tensor's master or state `key`."""
    return f"{flat}.{key}"


# -- the parameters of an engine -------------------------------------------------------


class _Parameter(NamedTuple):
    """A complete parameter of the model, whatever this process holds of it."""

    name: str
    shape: tuple[int, ...]
    first: int = 0
    """The element with which this process's tensor-parallel share begins."""
    is_saved: bool = True
    """Whether this process saves it, and not another one of its group."""


def _parameters(engine: zero.Engine) -> dict[int, _Parameter]:
    """id of every parameter of an engine's model -> what is known of it."""
    is_first = engine.mpu is None or engine.mpu.get_tensor_model_parallel_rank() == 0
    parameters = {}
    for name, parameter in engine.module.named_parameters():
        share = share_of(parameter)
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
    return layout, RankShard.of(layout, rank, file, extents, settings), tensors


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
