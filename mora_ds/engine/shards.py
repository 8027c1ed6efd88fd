"""Gets all that training changes from an engine as tensors, and restores it in any
number of processes. `checkpoint.shard_table` has the files.

    partitions_of   what this process holds: master weights, optimizer state, which extents of which parameters they are
    restore         master weights, low-precision copies, optimizer state and counters, from what a `SavedState` holds

Master weights and moments go by `OptimizerView.flats`: which extent of which parameter lies
where in the tensors that the optimizer steps on. Written against DeepSpeed 0.19.8;
tests/checkpoint/test_elastic.py fails where an upgrade lays something out in another
way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.common.errors import Bounds, UserError
from mora_ds.common.files import JsonObject, malformed
from mora_ds.common.nested import different_keys
from mora_ds.common.tensor_files import Shape, Tensors
from mora_ds.common.untrusted import MAX_SIDE, FileName, Processes
from mora_ds.engine import zero
from mora_ds.engine.zero import Flat, Span, view_of
from mora_ds.parallel.topology import shard_info

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


class Partition(NamedTuple):
    """A tensor of master weights that this process steps on, with its optimizer state."""

    extents: list[Extent]
    """What this process saves of it."""
    tensors: Tensors
    """`MASTER` and the keys of the state; moments (numel,), counts without a
    dimension."""


class Partitions(NamedTuple):
    """What one process of a run holds of all that training changes."""

    layout: Layout
    partitions: list[Partition]
    settings: list[JsonObject]
    """Of the optimizer's groups, its learning rates among them."""
    stride: int
    """The distance of the ranks that hold consecutive extents: the size of a
    tensor-parallel group, else 1."""


State = tuple[list[str], Tensors]
"""(keys of what an optimizer keeps for every element, such as exp_avg; its other values
by their keys, such as step)"""


class SavedState(Protocol):
    """What `restore` reads: any range of a complete parameter, as one or more processes
    have saved it."""

    layout: Layout

    @property
    def where(self) -> Path:
        """What messages name."""

    def read(
        self, name: str, key: str, start: int = 0, numel: int | None = None
    ) -> Tensor:
        """(numel,) elements of a flattened parameter's master or moment."""

    def state(self, name: str, start: int = 0, numel: int | None = None) -> State:
        """What the optimizer keeps of these elements."""


# -- the parameters of an engine -------------------------------------------------------


class _Parameter(NamedTuple):
    """A complete parameter of the model, whatever this process holds of it."""

    name: str
    shape: Shape
    first: int = 0
    """The element with which this process's tensor-parallel shard begins."""
    is_saved: bool = True
    """Whether this process saves it, and not another one of its group."""


def _parameters(engine: zero.Engine) -> dict[int, _Parameter]:
    """id of every parameter of an engine's model -> what is known of it."""
    is_rank0 = engine.mpu is None or engine.mpu.get_tensor_model_parallel_rank() == 0
    parameters = {}
    for name, parameter in engine.module.named_parameters():
        info = shard_info(parameter)
        if info is None:
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            parameters[id(parameter)] = _Parameter(name, shape, is_saved=is_rank0)
        else:
            shape = (info.r_hat, info.r_hat)
            parameters[id(parameter)] = _Parameter(name, shape, info.start * info.r_hat)
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


def layout_of(engine: zero.Engine) -> Layout:
    """What all processes of an engine have in common."""
    view = view_of(engine)
    scaler = view.loss_scaler
    parameters = _parameters(engine)
    groups = [[parameters[id(weight)] for weight in group] for group in view.groups()]
    return Layout(
        world_size=dist.get_world_size(),
        stage=int(engine.zero_optimization_stage()),
        optimizer=type(engine.basic_optimizer).__name__,
        groups=[
            {weight.name: list(weight.shape) for weight in group} for group in groups
        ],
        counters={name: int(getattr(engine, name)) for name in COUNTERS},
        scaler={
            name: getattr(scaler, name) for name in SCALER if hasattr(scaler, name)
        },
    )


# -- taking ----------------------------------------------------------------------------


def partitions_of(engine: zero.Engine) -> Partitions:
    """What this process saves of an engine. The tensors are the engine's own, but for
    Muon's momentum."""
    parameters = _parameters(engine).items()
    saved = {key: parameter for key, parameter in parameters if parameter.is_saved}
    partitions = []
    for flat in view_of(engine).flats():
        tensors = {MASTER: flat.master.detach().view(-1)}
        # Sorted, so that the same state is the same file, whatever order it was set in
        for key in sorted(flat.state):
            tensors[key] = _as_saved(flat, flat.state[key])
        partitions.append(Partition(_extents(flat.spans, saved), tensors))
    settings = [_plain(group) for group in engine.basic_optimizer.param_groups]
    mpu = engine.mpu
    stride = 1 if mpu is None else mpu.get_tensor_model_parallel_world_size()
    return Partitions(layout_of(engine), partitions, settings, stride)


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
    # Muon's momentum has unsharded matrices: each rank saves the elements that it has
    # in its master weights.
    moments = value.new_zeros(flat.master.numel())
    for full, span in zip(flat.state_spans, flat.spans, strict=True):
        first = full.offset + span.start
        moments_here = value[first : first + span.numel]
        moments[span.offset : span.offset + span.numel] = moments_here
    return moments


# -- restoring -------------------------------------------------------------------------


@torch.no_grad()
def restore(engine: zero.Engine, saved: SavedState) -> None:
    """Set everything that training changes from a saved state. Collective. With the
    number of processes that saved it each one reads what it has saved itself.

    Raises `UserError` when it holds other parameters than the model, or another
    optimizer's state.
    """
    parameters = _parameters(engine)
    _check(engine, parameters, saved)
    view = view_of(engine)
    groups = engine.basic_optimizer.param_groups
    for flat in view.flats():
        is_fused = groups[flat.group].get("fused")
        counts_device = flat.master.device if is_fused else "cpu"
        _restore_flat(flat, parameters, saved, counts_device)
    view.write_copies()
    with malformed(saved.where):
        for name in COUNTERS:
            setattr(engine, name, saved.layout.counters[name])
    for name, number in saved.layout.scaler.items():
        if name in SCALER and hasattr(view.loss_scaler, name):
            setattr(view.loss_scaler, name, number)


def _check(
    engine: zero.Engine, parameters: dict[int, _Parameter], saved: SavedState
) -> None:
    here = {parameter.name: parameter.shape for parameter in parameters.values()}
    there = saved.layout.shapes
    different = different_keys(here, there)
    if different:
        name = different[0]
        raise UserError(
            f"{saved.where} does not fit this model in {len(different)} parameters, e.g. {name}: "
            f"{there.get(name, 'none')} there, {here.get(name, 'none')} here"
        )
    mine = type(engine.basic_optimizer).__name__
    theirs = saved.layout.optimizer
    if mine != theirs:
        raise UserError(
            f"{saved.where} holds the state of {theirs}, this run's optimizer is {mine} (--deepspeed)"
        )


def _restore_flat(
    flat: Flat,
    parameters: dict[int, _Parameter],
    saved: SavedState,
    device: torch.device | str,
) -> None:
    """Set a master and its state. Padding, which no gradient reaches, becomes zero as
    in a fresh engine. `device`: where the optimizer wants its counts: torch's fused
    Adam next to the master weights."""
    extents = _extents(flat.spans, parameters)
    state_extents = _extents(flat.state_spans, parameters)

    def fill(target: Tensor, key: str, sources: list[Extent]) -> None:
        values = target.detach().view(-1)
        values.zero_()
        for extent in sources:
            stored = saved.read(extent.name, key, extent.start, extent.numel)
            values.narrow(0, extent.offset, extent.numel).copy_(stored)

    fill(flat.master, MASTER, extents)
    # A tensor of padding alone steps as often as the others of its group, so that it
    # gets the counts of the group's first parameter
    sources = extents
    if not sources:
        with malformed(saved.where):
            of_group = list(saved.layout.groups[flat.group])
            sources = [Extent(of_group[0], 0, 0, 0)]
    first = sources[0]
    states = [
        saved.state(extent.name, extent.start, extent.numel) for extent in sources
    ]
    keys, counts = states[0]
    for extent, state in zip(sources, states, strict=True):
        if state != states[0]:
            raise UserError(
                f"{saved.where}: {first.name} and {extent.name} are one tensor here, with different state there"
            )
    for key in set(flat.state) - {*keys, *counts}:
        del flat.state[key]
    for key, count in counts.items():
        flat.state[key] = count.to(device)
    for key in keys:
        if key not in flat.state:
            dtype = saved.read(first.name, key, first.start, 0).dtype
            moments = torch.zeros_like(flat.master, dtype=dtype, requires_grad=False)
            if state_extents != extents:
                length = sum(extent.numel for extent in state_extents)
                moments = moments.new_zeros(length)
            flat.state[key] = moments
        fill(flat.state[key], key, state_extents)
