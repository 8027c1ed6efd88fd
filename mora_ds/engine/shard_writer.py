"""The second room that touches DeepSpeed's internals: its optimizers' partitions, written to shards and set from them.

    save_shards     DeepSpeed's own files, through a checkpoint engine of ours, and beside them what is where in them
    restore         masters, low-precision copies, optimizer state, counters of this rank, from shards of any number
                    of ranks and any ZeRO stage (`shards.EngineShards`)

Both go by `pieces`: for every flat tensor that the optimizer works on, which part of which parameter lies where in it.
DeepSpeed's own `load_checkpoint` unpickles without limits, and serves the same number of ranks only; it is used for a
state that lies on NVMe alone, and gets its files through `ShardWriter.load`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from mora_ds.engine import zero
from mora_ds.engine.shard_layout import (
    Piece,
    duplicates,
    first_element,
    groups_of,
    pieces,
    scaler_of,
    shape_of,
    transposed_names,
)
from mora_ds.engine.shard_reader import MASTER, EngineShards, Layout, Part, layout_path, load_pickled
from mora_ds.errors import UserError
from mora_ds.files import write_json_atomic

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
"""Attributes of the engine that its own checkpoints restore (engine.py, `_load_checkpoint`)."""
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What changes in a loss scaler (fp16/loss_scaler.py); LossScaleConfig of runs without ZeRO has the same names."""


# -- saving ------------------------------------------------------------------------------------------------------------


class ShardWriter(CheckpointEngine):
    """What DeepSpeed's `save_checkpoint` hands its files to (runtime/checkpoint_engine/checkpoint_engine.py).

    Parameters that follow from the optimizer's masters are left out: 2 to 4 bytes each that nobody reads. `write`
    gets a path and what is to be in it, which it may keep: tensors are DeepSpeed's own, not copies.
    """

    def __init__(self, engine: zero.Engine, write: Callable[[Path, Any], None]) -> None:
        super().__init__()
        has_masters = engine.optimizer is not engine.basic_optimizer
        self._left_out = {name for name, _ in engine.module.named_parameters()} if has_masters else set()
        self._write = write

    def create(self, info: CheckpointCommitInfo) -> None:
        del info

    def save(self, state_dict: Any, path: str) -> None:
        module = state_dict.get("module")
        if module is not None:
            kept = {name: tensor for name, tensor in module.items() if name not in self._left_out}
            state_dict = {**state_dict, "module": kept}
        self._write(Path(path), state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        """For a state on NVMe: DeepSpeed gets its own classes back, and nothing else that could run."""
        del map_location
        return load_pickled(Path(path), [fragment_address, LossScaler, DynamicLossScaler, ZeroStageEnum])

    def commit(self, info: CheckpointCommitInfo) -> bool:
        del info
        return True


def write_now(path: Path, content: Any) -> None:
    """The file, at once."""
    torch.save(content, path)


def save_shards(engine: zero.Engine, folder: Path, tag: str, write: Callable[[Path, Any], None] = write_now) -> Layout:
    """DeepSpeed's files in `folder/tag`, each through `write`. Collective. Returns this rank's layout, which
    `write_layout` puts beside them."""
    own = engine.checkpoint_engine
    engine.checkpoint_engine = ShardWriter(engine, write)
    try:
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    finally:
        engine.checkpoint_engine = own
    if dist.get_rank() == 0:
        for script in folder.glob("zero_to_*.py"):  # DeepSpeed's, for models whose weights are in the shards
            script.unlink()
    return _layout(engine)


def write_layout(folder: Path, layout: Layout) -> None:
    if layout.rank < layout.writers:
        write_json_atomic(layout_path(folder, layout.rank), layout.to_dict(), indent=None)


_INNER = "optimizer_state_dict"
_PLACES: tuple[tuple[type, list[str], list[str]], ...] = (
    (DeepSpeedZeroOptimizer_Stage3, [_INNER, "fp32_flat_groups"], [_INNER, _INNER]),
    (DeepSpeedZeroOptimizer, [_INNER, "single_partition_of_fp32_groups"], [_INNER, "base_optimizer_state"]),
    (BF16_Optimizer, [_INNER, "single_partition_of_fp32_groups"], [_INNER, "base_optimizer_state"]),
    (FP16_UnfusedOptimizer, ["optimizer", "fp32_groups"], ["optimizer", _INNER]),
    (FP16_Optimizer, ["optimizer", "fp32_groups_flat"], ["optimizer", _INNER]),
    (object, ["module"], ["optimizer"]),
)
"""Where each optimizer's `state_dict` has masters and state, within the file that DeepSpeed makes of it."""


def _layout(engine: zero.Engine) -> Layout:
    optimizer, rank = engine.optimizer, dist.get_rank()
    masters, state = next((masters, state) for kind, masters, state in _PLACES if isinstance(optimizer, kind))
    sharded = engine.save_zero_checkpoint  # not the same as a stage: BF16_Optimizer shards as well
    name = engine._get_zero_ckpt_name("", "") if sharded else engine._get_ckpt_name("", "")
    found = [] if engine.zero_nvme_offload_optimizer() else list(pieces(engine))
    held_elsewhere = duplicates(engine)

    def own(parts: list[Part]) -> list[Part]:
        return [part for part in parts if part.name not in held_elsewhere]

    return Layout(
        rank=rank,
        world_size=dist.get_world_size(),
        writers=dist.get_world_size() if sharded else 1,
        stage=int(engine.zero_optimization_stage()),
        optimizer=type(engine.basic_optimizer).__name__,
        file=Path(name).name,
        masters=masters,
        state=state,
        flats=[own(piece.parts) for piece in found],
        moments=[own(piece.moments) for piece in found],
        groups=groups_of(engine) if rank == 0 else [],
        settings=[_plain(group) for group in engine.basic_optimizer.param_groups],
        swapped=bool(engine.zero_nvme_offload_optimizer()),
        counters={name: int(getattr(engine, name)) for name in COUNTERS},
        scaler={name: getattr(scaler_of(engine), name) for name in SCALER if hasattr(scaler_of(engine), name)},
        transposed=sorted(transposed_names(engine)),
    )


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """What of a group's settings JSON can hold."""
    values = {
        key: value.item() if isinstance(value, Tensor) and not value.dim() else value for key, value in group.items()
    }
    return {key: value for key, value in values.items() if isinstance(value, (int, float, str, tuple, type(None)))}


# -- restoring ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def restore(engine: zero.Engine, shards: EngineShards) -> None:
    """Set everything that training changes from whole tensors. Collective under ZeRO-3.

    Raises `UserError` when the shards hold other parameters than the model, or another optimizer's state.
    """
    _check(engine, shards)
    if shards.first.swapped:
        _restore_swapped(engine, shards)
        return
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.checkpoint_event_prologue()  # stage3.py: partition what is still gathered
    transposed = transposed_names(engine)
    for piece in pieces(engine):
        _fill(piece, shards, transposed)
    for name, parameter in engine.module.named_parameters():
        _fill_copies(name, parameter, shards, name in transposed)
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.checkpoint_event_epilogue()  # gather the persistent ones again
    for group, settings in enumerate(engine.basic_optimizer.param_groups):
        step = shards.group_step(group)
        if step is not None:
            settings["step"] = (
                torch.full_like(settings["step"], step) if isinstance(settings.get("step"), Tensor) else step
            )
    for name, value in shards.first.counters.items():
        setattr(engine, name, value)
    for name, number in shards.first.scaler.items():
        if hasattr(scaler_of(engine), name):
            setattr(scaler_of(engine), name, number)


def _restore_swapped(engine: zero.Engine, shards: EngineShards) -> None:
    """DeepSpeed has saved files of its own for a state on NVMe (engine.py, `save_checkpoint`) and loads them itself."""
    if shards.first.world_size != dist.get_world_size():
        raise UserError(
            f"{shards.folder}: an optimizer on NVMe (offload_optimizer) goes on at the number of ranks that saved it, "
            f"{shards.first.world_size}, only"
        )
    own = engine.checkpoint_engine
    engine.checkpoint_engine = ShardWriter(engine, write_now)
    try:
        engine.load_checkpoint(str(shards.folder.parent), tag=shards.folder.name, load_module_strict=False)
    finally:
        engine.checkpoint_engine = own


def _check(engine: zero.Engine, shards: EngineShards) -> None:
    here = {name: tuple(shape_of(parameter)) for name, parameter in engine.module.named_parameters()}
    different = sorted(name for name in {*here, *shards.shapes} if here.get(name) != shards.shapes.get(name))
    if different:
        name = different[0]
        raise UserError(
            f"{shards.folder} does not fit this model in {len(different)} parameters, e.g. {name}: "
            f"{shards.shapes.get(name, 'none')} there, {here.get(name, 'none')} here"
        )
    mine, theirs = type(engine.basic_optimizer).__name__, shards.first.optimizer
    if mine != theirs:
        raise UserError(f"{shards.folder} holds the state of {theirs}, this run's optimizer is {mine} (--deepspeed)")


def _fill(piece: Piece, shards: EngineShards, transposed: set[str]) -> None:
    """Padding, which no gradient reaches, is zero as in a fresh engine."""
    names = [part.name for part in piece.parts] or list(shards.first.groups[piece.group])[:1]
    _copy(piece.master, MASTER, piece.parts, shards, transposed)
    keys, scalars = shards.keys(names[0]), shards.scalars(names[0])
    for name in names[1:]:
        if (shards.keys(name), shards.scalars(name)) != (keys, scalars):
            raise UserError(f"{shards.folder}: {names[0]} and {name} are one tensor here, with different state there")
    for key in set(piece.state) - {*keys, *scalars}:
        del piece.state[key]
    for key, value in scalars.items():  # before the moments, as torch.optim.AdamW orders them: the same file again
        old = piece.state.get(key)
        if isinstance(value, Tensor):
            value = value.item() if isinstance(old, int) else value.to(old.device if isinstance(old, Tensor) else "cpu")
        piece.state[key] = value
    for key in keys:
        if not isinstance(piece.state.get(key), Tensor):
            dtype = shards.read(names[0], key, 0, 0).dtype
            piece.state[key] = torch.zeros_like(piece.master, dtype=dtype, requires_grad=False)
            if piece.moments != piece.parts:
                piece.state[key] = piece.state[key].new_zeros(sum(part.numel for part in piece.moments))
        _copy(piece.state[key], key, piece.moments, shards, transposed)


def _copy(flat: Tensor, key: str, parts: list[Part], shards: EngineShards, transposed: set[str]) -> None:
    target = flat.detach().view(-1)
    target.zero_()
    for part in parts:
        values = shards.read(part.name, key, part.start, part.numel, part.name in transposed)
        target.narrow(0, part.offset, part.numel).copy_(values)


def _fill_copies(name: str, parameter: nn.Parameter, shards: EngineShards, transposed: bool) -> None:
    """The copy that forward reads, in the compute dtype: rounded from the master as a step rounds it."""
    shard: Any = getattr(parameter, "ds_tensor", None)
    if shard is None:
        parameter.data.copy_(shards.whole(name, MASTER))
        return
    size, whole = shard.ds_numel, parameter.ds_numel  # type: ignore[attr-defined]
    start = min(dist.get_rank(group=parameter.ds_process_group) * size, whole)  # type: ignore[attr-defined]
    mine = shards.read(name, MASTER, first_element(parameter) + start, min(size, whole - start), transposed)
    shard.data.view(-1).zero_()
    shard.data.view(-1).narrow(0, 0, mine.numel()).copy_(mine)
