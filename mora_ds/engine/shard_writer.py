"""The shards of a checkpoint: taken from an engine, written, and restored into one.

    take            the tensors that this process writes of an engine, and what lies where in them
    write_shard     its file
    restore         masters, low-precision copies, optimizer state and counters of this process, from shards that any
                    number of processes have written at any ZeRO stage (`shard_reader.EngineShards`)

All go by `OptimizerView.flats`: which part of which parameter lies where in the tensors that the optimizer steps on.
DeepSpeed's own `save_checkpoint` is not used: it writes pickles, which serve the same number of processes only. Written
against DeepSpeed 0.19.8; tests/checkpoint/test_elastic.py fails where an upgrade lays something out in another way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mora_ds.common.errors import UserError
from mora_ds.common.files import malformed
from mora_ds.engine import zero
from mora_ds.engine.optimizer_view import Flat, Span, view_of
from mora_ds.engine.shard_index import INDEX_FILE, Layout, Part, RankShard
from mora_ds.engine.shard_reader import MASTER, NUMBERS, EngineShards, tensor_name
from mora_ds.models.tensor_files import write_safetensors_atomic
from mora_ds.parallel.topology import share_of

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
"""Attributes of the engine that its own checkpoints restore (engine.py, `_load_checkpoint`)."""
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What changes in a loss scaler (fp16/loss_scaler.py)."""


# -- what lies where ---------------------------------------------------------------------------------------------------


Names = dict[int, str]
"""id of a parameter -> its name in the model."""


def _names(engine: zero.Engine) -> Names:
    return {id(parameter): name for name, parameter in engine.module.named_parameters()}


def _parts(spans: list[Span], names: Names) -> list[Part]:
    """The spans by the names of their parameters, counted in the complete parameter."""
    parts = []
    for span in spans:
        if span.numel:
            share = share_of(span.parameter)
            begin = 0 if share is None else share.start * share.r_hat  # of this process's tensor-parallel share
            parts.append(Part(names[id(span.parameter)], begin + span.start, span.numel, span.offset))
    return parts


def _shapes(engine: zero.Engine) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every complete parameter, also where ZeRO-3 or tensor parallelism splits it."""
    shapes = {}
    for name, parameter in engine.module.named_parameters():
        share = share_of(parameter)
        shapes[name] = tuple(getattr(parameter, "ds_shape", parameter.shape)) if share is None else (share.r_hat,) * 2
    return shapes


def _transposed(engine: zero.Engine) -> set[str]:
    """The MoRA matrices whose tensor-parallel shares are rows of the transpose."""
    shares = {name: share_of(parameter) for name, parameter in engine.module.named_parameters()}
    return {name for name, share in shares.items() if share is not None and share.transposed}


def duplicates(engine: zero.Engine) -> set[str]:
    """The parameters that another process of this one's tensor-parallel group holds as well, and saves."""
    if engine.mpu is None or engine.mpu.get_tensor_model_parallel_rank() == 0:
        return set()
    return {name for name, parameter in engine.module.named_parameters() if share_of(parameter) is None}


def _layout(engine: zero.Engine) -> Layout:
    view = view_of(engine)
    names = _names(engine)
    shapes = _shapes(engine)
    return Layout(
        world_size=dist.get_world_size(),
        stage=int(engine.zero_optimization_stage()),
        optimizer=type(engine.basic_optimizer).__name__,
        groups=[{names[id(p)]: list(shapes[names[id(p)]]) for p in group} for group in view.groups()],
        settings=[_plain(group) for group in engine.basic_optimizer.param_groups],
        counters={name: int(getattr(engine, name)) for name in COUNTERS},
        scaler={name: getattr(view.loss_scaler, name) for name in SCALER if hasattr(view.loss_scaler, name)},
        transposed=sorted(_transposed(engine)),
    )


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """The settings of a parameter group that JSON can hold."""
    values = {
        key: value.item() if isinstance(value, Tensor) and not value.dim() else value for key, value in group.items()
    }
    return {key: value for key, value in values.items() if isinstance(value, (int, float, str, tuple, type(None)))}


# -- saving ------------------------------------------------------------------------------------------------------------


def take(engine: zero.Engine) -> tuple[Layout, RankShard, dict[str, Tensor]]:
    """(what all ranks have in common, where the parts of this rank lie in its file, that file's tensors). The tensors
    are the engine's own, not copies."""
    layout = _layout(engine)
    flats = list(view_of(engine).flats())
    tensors: dict[str, Tensor] = {}
    for number, flat in enumerate(flats):
        tensors[tensor_name(number, MASTER)] = flat.master.detach().view(-1)
        for key in sorted(flat.state):  # whatever order they were set in: the same state is the same file
            tensors[tensor_name(number, key)] = _as_tensor(flat.state[key])
    names = _names(engine)
    skipped = duplicates(engine)

    def written(spans: list[Span]) -> list[Part]:
        return [part for part in _parts(spans, names) if part.name not in skipped]

    masters = [written(flat.spans) for flat in flats]
    moments = [written(flat.state_spans) for flat in flats]
    file = f"rank-{dist.get_rank():05d}.safetensors"
    return layout, RankShard.of(layout, dist.get_rank(), file, masters, moments), tensors


def _as_tensor(value: Any) -> Tensor:
    """Moments flat, step counts without a dimension; plain numbers in a dtype by which a reader knows them."""
    if isinstance(value, Tensor):
        return value.detach().view(-1) if value.dim() else value.detach()
    whole, fraction = NUMBERS
    return torch.tensor(value, dtype=whole if isinstance(value, int) else fraction)


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the file of one rank, atomically. Raises `RunError` on a full disk."""
    path.parent.mkdir(exist_ok=True)
    write_safetensors_atomic(path, tensors, {})


# -- restoring ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def restore(engine: zero.Engine, shards: EngineShards) -> None:
    """Set everything that training changes from the shards of a checkpoint. Collective. With the number of processes
    that wrote them each one opens its own file alone.

    Raises `UserError` when the shards hold other parameters than the model, or another optimizer's state.
    """
    _check(engine, shards)
    view = view_of(engine)
    names = _names(engine)
    transposed = _transposed(engine)
    groups = engine.basic_optimizer.param_groups
    for flat in view.flats():
        is_fused = groups[flat.group].get("fused")
        _restore_flat(flat, names, shards, transposed, flat.master.device if is_fused else "cpu")
    view.write_copies()
    for group in range(len(groups)):
        step = shards.group_step(group)
        if step is not None:
            view.set_step(group, step)
    with malformed(shards.folder / INDEX_FILE):
        for name in COUNTERS:
            setattr(engine, name, shards.layout.counters[name])
    for name, number in shards.layout.scaler.items():
        if name in SCALER and hasattr(view.loss_scaler, name):
            setattr(view.loss_scaler, name, number)


def _check(engine: zero.Engine, shards: EngineShards) -> None:
    here = _shapes(engine)
    different = sorted(name for name in {*here, *shards.shapes} if here.get(name) != shards.shapes.get(name))
    if different:
        name = different[0]
        raise UserError(
            f"{shards.folder} does not fit this model in {len(different)} parameters, e.g. {name}: "
            f"{shards.shapes.get(name, 'none')} there, {here.get(name, 'none')} here"
        )
    mine = type(engine.basic_optimizer).__name__
    theirs = shards.layout.optimizer
    if mine != theirs:
        raise UserError(f"{shards.folder} holds the state of {theirs}, this run's optimizer is {mine} (--deepspeed)")


def _restore_flat(
    flat: Flat, names: Names, shards: EngineShards, transposed: set[str], device: torch.device | str
) -> None:
    """Set a master and its state. Padding, which no gradient reaches, becomes zero as in a fresh engine. `device`:
    where the optimizer wants counts that are tensors, as torch's fused Adam does."""
    parts = _parts(flat.spans, names)
    state_parts = _parts(flat.state_spans, names)
    _fill(flat.master, MASTER, parts, shards, transposed)
    # A tensor of padding alone steps as often as the others of its group: it gets the counts of the group's first one.
    sources = parts
    if not sources:
        with malformed(shards.folder / INDEX_FILE):
            of_group = list(shards.layout.groups[flat.group])
            sources = [Part(of_group[0], 0, 0, 0)]
    first = sources[0]
    keys = shards.keys(first.name, first.start, first.numel)
    counts = shards.scalars(first.name, first.start, first.numel)
    for part in sources[1:]:
        same_keys = shards.keys(part.name, part.start, part.numel) == keys
        if not same_keys or shards.scalars(part.name, part.start, part.numel) != counts:
            raise UserError(
                f"{shards.folder}: {first.name} and {part.name} are one tensor here, with different state there"
            )
    for key in set(flat.state) - {*keys, *counts}:
        del flat.state[key]
    for key, value in counts.items():
        old = flat.state.get(key)
        if isinstance(value, Tensor):
            value = value.item() if isinstance(old, int) else value.to(getattr(old, "device", device))
        flat.state[key] = value
    for key in keys:
        if not isinstance(flat.state.get(key), Tensor):
            dtype = shards.read(first.name, key, first.start, 0).dtype
            flat.state[key] = torch.zeros_like(flat.master, dtype=dtype, requires_grad=False)
            if state_parts != parts:
                flat.state[key] = flat.state[key].new_zeros(sum(state_part.numel for state_part in state_parts))
        _fill(flat.state[key], key, state_parts, shards, transposed)


def _fill(target: Tensor, key: str, parts: list[Part], shards: EngineShards, transposed: set[str]) -> None:
    flat = target.detach().view(-1)
    flat.zero_()
    for part in parts:
        values = shards.read(part.name, key, part.start, part.numel, part.name in transposed)
        flat.narrow(0, part.offset, part.numel).copy_(values)
