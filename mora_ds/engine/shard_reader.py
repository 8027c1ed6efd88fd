"""Reads the shards of a checkpoint, whatever the number of processes that wrote them. Needs no DeepSpeed.

    engine/layout-00000.json      which part of which parameter lies where in the shard of that rank (ours)
    engine/*_optim_states.pt      fp32 masters and optimizer state, flat (DeepSpeed's, a pickle)

`EngineShards.read(name, key, start, numel)` assembles any range of a complete parameter: its fp32 master, or any tensor
of its optimizer state. The files are memory-mapped, so that only what is asked for is read, and are read as plain data
(`pickled`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
from torch import Tensor

from mora_ds.engine.pickled import load_pickled
from mora_ds.errors import Bounds, UserError
from mora_ds.files import atomic_path, malformed, read_json, require_format, write_json_atomic
from mora_ds.models.tensor_files import SafetensorsWriter, open_safetensors
from mora_ds.untrusted import MAX_SIDE, Count, FileName, entry, shown, typed

MASTER = "master"
"""The key of a parameter's fp32 master; all other keys are those of the optimizer's state."""
LAYOUT_FORMAT = 1
WHOLE_FILE = "whole.safetensors"


def layout_path(folder: Path, rank: int) -> Path:
    return folder / f"layout-{rank:05d}.json"


Processes = Annotated[int, Bounds(least=1, most=1 << 20)]
Length = Annotated[int, Bounds(least=0, most=2 * MAX_SIDE)]
"""Of one dimension of a parameter; LoRA's factors are as long as both sides of a layer."""


@dataclass(frozen=True)
class Part:
    """Elements [start, start + numel) of a flattened parameter, which lie from `offset` on in a flat tensor."""

    name: FileName
    start: Count
    numel: Count
    offset: Count


@dataclass(frozen=True)
class Layout:
    """layout-N.json: what rank N has written."""

    rank: Count
    world_size: Processes
    writers: Processes
    """Number of ranks that wrote a shard: all, or only the first without ZeRO."""
    stage: int
    optimizer: str
    """Class name of the torch optimizer, such as AdamW."""
    file: FileName
    masters: list[str]
    """Keys that lead to the flat fp32 masters within the file."""
    state: list[str]
    """Keys that lead to the optimizer's `state_dict`."""
    flats: list[list[Part]]
    """For each flat tensor, the parts in it."""
    moments: list[list[Part]]
    """For each flat tensor, the parts in its optimizer state: not always the same (see `optimizer_view.Flat`)."""
    groups: list[dict[FileName, list[Length]]]
    """For each parameter group, its parameters and their complete shapes."""
    swapped: bool = False
    """Whether masters and state were on NVMe: then they are in files that only DeepSpeed reads."""
    settings: list[dict[str, Any]] = field(default_factory=list)
    """For each parameter group: learning rate, betas and so on; for some optimizers the step count."""
    counters: dict[str, int] = field(default_factory=dict)
    scaler: dict[str, float | None] = field(default_factory=dict)
    """State of fp16's loss scaler."""
    transposed: list[str] = field(default_factory=list)
    """MoRA matrices of which the shards hold the transpose (tensor parallelism with an aligned grouping)."""

    def to_dict(self) -> dict[str, Any]:
        return {"format": LAYOUT_FORMAT, **vars(self), "flats": _plain(self.flats), "moments": _plain(self.moments)}

    @classmethod
    def read(cls, folder: Path, rank: int) -> Layout:
        """Raises `UserError` naming the file."""
        path = layout_path(folder, rank)
        content = read_json(path)
        require_format(path, content, LAYOUT_FORMAT)
        content.pop("format")
        for key in ("flats", "moments"):
            listed = entry(content, key, list[list[tuple[Any, Any, Any, Any]]], path)
            content[key] = [[dict(zip(_PART, part, strict=True)) for part in flat] for flat in listed]
        layout: Layout = typed(cls, content, f"{path} is damaged")
        if layout.rank != rank or layout.rank >= layout.writers:
            raise UserError(f"{path}: it is the layout of rank {layout.rank} of {layout.writers}, not of {rank}")
        return layout


_PART = ("name", "start", "numel", "offset")


def _plain(flats: list[list[Part]]) -> list[list[list[str | int]]]:
    return [[[part.name, part.start, part.numel, part.offset] for part in flat] for flat in flats]


class _Shard:
    """The file of one rank, opened when it is first read."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.path, self.layout = folder / layout.file, layout
        self._content: Any = None

    @property
    def _opened(self) -> Any:
        if self._content is None:
            self._content = load_pickled(self.path)
        return self._content

    def _at(self, keys: list[str]) -> Any:
        value = self._opened
        with malformed(self.path):
            for key in keys:
                value = value[key]
        return value

    def master(self, flat: int) -> Tensor:
        """A complete flat tensor, one-dimensional."""
        masters = self._at(self.layout.masters)
        with malformed(self.path):
            if isinstance(masters, dict):  # without ZeRO in fp32: the module's own parameters, by name
                tensor = masters[self.layout.flats[flat][0].name]
            else:
                tensor = list(_flattened(masters))[flat]
            return typed_tensor(tensor, f"{self.path}: master {flat}").reshape(-1)

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
        least = max((part.offset + part.numel for part in self.layout.moments[flat]), default=1)
        return {
            key: value.reshape(-1)
            for key, value in self.state(flat).items()
            if isinstance(value, Tensor) and value.dim() > 0 and value.numel() >= least
        }


class _WholeFile(_Shard):
    """A file of ours in place of shards: every tensor complete, under "key/parameter name"."""

    @property
    def _handle(self) -> Any:
        if self._content is None:
            self._content = open_safetensors(self.path)
        return self._content

    def _name(self, flat: int) -> str:
        with malformed(self.path):
            return self.layout.flats[flat][0].name

    def master(self, flat: int) -> Tensor:
        name = f"{MASTER}/{self._name(flat)}"
        if name not in self._handle.keys():  # noqa: SIM118  (no mapping)
            raise UserError(f"{self.path} holds no {name}")
        return self._handle.get_tensor(name).reshape(-1)

    def state(self, flat: int) -> dict[str, Any]:
        split = [name.partition("/") for name in self._handle.keys()]  # noqa: SIM118  (no mapping)
        keys = [key for key, _, name in split if name == self._name(flat) and key != MASTER]
        tensors = {key: self._handle.get_tensor(f"{key}/{self._name(flat)}") for key in keys}
        with malformed(self.path):
            counts = (torch.int64,)  # a Python number once
            return {key: tensor.item() if tensor.dtype in counts else tensor for key, tensor in tensors.items()}


def write_whole(folder: Path, shards: EngineShards, world_size: int) -> None:
    """Write the same content as one safetensors file with a layout, which `EngineShards.open` reads like any shards."""
    layout = {}
    for name, shape in shards.shapes.items():
        for key in (MASTER, *shards.keys(name)):
            layout[f"{key}/{name}"] = (tuple(shape), shards.read(name, key, 0, 0).dtype)
        for key, value in shards.scalars(name).items():
            layout[f"{key}/{name}"] = ((), torch.as_tensor(value).dtype)
    with atomic_path(folder / WHOLE_FILE) as beside, SafetensorsWriter(beside, layout, {}) as writer:
        for name in shards.shapes:
            for key in (MASTER, *shards.keys(name)):
                writer.write(f"{key}/{name}", shards.whole(name, key))
            for key, value in shards.scalars(name).items():
                writer.write(f"{key}/{name}", torch.as_tensor(value))
    flats = [[Part(name, 0, math.prod(shape), 0)] for name, shape in shards.shapes.items()]
    whole = replace(shards.first, rank=0, world_size=world_size, writers=1, file=WHOLE_FILE, masters=[], state=[])
    whole = replace(whole, flats=flats, moments=flats, transposed=[])
    write_json_atomic(layout_path(folder, 0), whole.to_dict(), indent=None)


def _flattened(tensors: Any) -> Iterator[Tensor]:
    for each in tensors:
        if isinstance(each, (list, tuple)):
            yield from _flattened(each)
        else:
            yield each


def typed_tensor(value: Any, where: str) -> Tensor:
    """`value`, if it is a tensor. Raises `UserError` otherwise."""
    if not isinstance(value, Tensor):
        raise UserError(f"{where} must be a tensor, got {shown(value)}")
    return value


Places: TypeAlias = dict[str, list[tuple[_Shard, int, Part]]]
"""Parameter name -> its parts: (shard, index of the flat tensor in it, part)."""


class EngineShards:
    """All shards of a checkpoint as one. Make it with `EngineShards.open`."""

    def __init__(self, folder: Path, layouts: list[Layout]) -> None:
        self.folder = folder
        self.first = layouts[0]
        self.shapes = {name: tuple(shape) for group in self.first.groups for name, shape in group.items()}
        """Parameter name -> complete shape."""
        self._shards = [(_WholeFile if layout.file == WHOLE_FILE else _Shard)(folder, layout) for layout in layouts]
        self._parts = self._places([layout.flats for layout in layouts])
        self._moments = self._places([layout.moments for layout in layouts])

    @classmethod
    def open(cls, folder: Path) -> EngineShards:
        """Reads the layouts of an engine folder. Raises `UserError` when one is missing or a parameter has holes."""
        first = Layout.read(folder, 0)
        layouts = [first, *(Layout.read(folder, rank) for rank in range(1, first.writers))]
        shards = cls(folder, layouts)
        if not first.swapped:
            shards._check_whole()
        return shards

    def _places(self, flats_of: list[list[list[Part]]]) -> Places:
        places: Places = {name: [] for name in self.shapes}
        for shard, flats in zip(self._shards, flats_of, strict=True):
            for index, flat in enumerate(flats):
                for part in flat:
                    places.setdefault(part.name, []).append((shard, index, part))
        return places

    @property
    def files(self) -> list[Path]:
        return [shard.path for shard in self._shards]

    def keys(self, name: str) -> list[str]:
        """Keys of the optimizer state that has a value for every element of a parameter, such as exp_avg."""
        shard, index, _ = self._moments[name][0]
        return list(shard.moments(index))

    def scalars(self, name: str) -> dict[str, Any]:
        """The rest of the state of a parameter, such as step: one value each. Raises `UserError` if shards differ."""
        first: dict[str, Any] | None = None
        for shard, index, _ in self._parts[name]:
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
        step = self.first.settings[group].get("step") if group < len(self.first.settings) else None
        return None if step is None else int(step)

    def read(self, name: str, key: str, start: int = 0, numel: int | None = None, transposed: bool = False) -> Tensor:
        """(numel,) elements of a flattened parameter's master or moment, on the CPU, assembled from all shards.
        `transposed`: those of its transpose. Raises `UserError` where the shards do not hold them."""
        if name not in self.shapes:
            raise UserError(f"{self.folder}: the shards do not hold {name}")
        if (name in self.first.transposed) is transposed:
            return self._read(name, key, start, numel)
        whole = self._read(name, key, 0, None).view(self.shapes[name]).T.flatten()
        return whole[start : None if numel is None else start + numel].clone()

    def _read(self, name: str, key: str, start: int, numel: int | None) -> Tensor:
        """The same, transposed or not as in the shards."""
        size = math.prod(self.shapes[name])
        end = size if numel is None else start + numel
        whole: Tensor | None = None
        for shard, index, part in (self._parts if key == MASTER else self._moments)[name]:
            first, last = max(start, part.start), min(end, part.start + part.numel)
            if first >= last and whole is not None:
                continue
            source = shard.master(index) if key == MASTER else shard.moments(index).get(key)
            if source is None:
                raise UserError(f"{shard.path} has no {key} of {name}")
            if source.numel() < part.offset + part.numel:
                raise UserError(f"{shard.path} is incomplete: {key} of {name}")
            if whole is None:
                whole = torch.empty(end - start, dtype=source.dtype)
            if first < last:
                whole[first - start : last - start] = source.narrow(0, part.offset + first - part.start, last - first)
        assert whole is not None, "every parameter has a part"
        return whole

    def whole(self, name: str, key: str) -> Tensor:
        """A complete master or moment in the parameter's shape."""
        return self.read(name, key).view(self.shapes[name])

    def _check_whole(self) -> None:
        nbytes = sum(file.stat().st_size for file in self.files if file.is_file())
        if sum(math.prod(shape) for shape in self.shapes.values()) > nbytes:
            raise UserError(
                f"{layout_path(self.folder, 0)} lists parameters of more elements than the shards have bytes"
            )
        for what, places_of in (("", self._parts), ("the optimizer's state of ", self._moments)):
            for name, places in places_of.items():
                if name not in self.shapes:
                    raise UserError(f"{self.folder}: a shard holds {name}, which no parameter group lists")
                if not _cover([part for _, _, part in places], math.prod(self.shapes[name]), once=not what):
                    once = "" if what else ", and each element once"
                    raise UserError(f"{self.folder}: the shards do not hold all of {what}{name}{once}")


def _cover(parts: list[Part], numel: int, once: bool) -> bool:
    end = 0
    for part in sorted(parts, key=lambda part: part.start):
        if part.start > end or (once and part.start < end):
            return False
        end = max(end, part.start + part.numel)
    return bool(parts) and end == numel


def _equal(values: dict[str, Any], others: dict[str, Any]) -> bool:
    return values.keys() == others.keys() and all(
        bool(torch.as_tensor(values[key] == others[key]).all()) for key in values
    )
