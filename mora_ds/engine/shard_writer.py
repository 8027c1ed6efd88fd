"""The shards of a checkpoint: written through DeepSpeed's `save_checkpoint`, and restored into an engine.

    save_shards     DeepSpeed's own files, through a checkpoint engine of ours; returns what lies where in them
    restore         masters, low-precision copies, optimizer state and counters of this process, from shards that any
                    number of processes have written at any ZeRO stage (`shard_reader.EngineShards`)

Both go by `OptimizerView.flats`: which part of which parameter lies where in the tensors that the optimizer steps on.
DeepSpeed's own `load_checkpoint` unpickles without limits, and serves the same number of processes only; it is used for
a state that lies on NVMe alone, and gets its files through `ShardWriter.load`. Written against DeepSpeed 0.19.8;
tests/checkpoint/test_elastic.py fails where an upgrade lays something out in another way.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from mora_ds.common.errors import UserError
from mora_ds.engine import zero
from mora_ds.engine.ds_keys import masked
from mora_ds.engine.optimizer_view import Flat, Span, view_of
from mora_ds.engine.pickled import load_pickled
from mora_ds.engine.shard_index import Layout, Part, RankShard
from mora_ds.engine.shard_reader import MASTER, EngineShards
from mora_ds.parallel.topology import share_of

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
"""Attributes of the engine that its own checkpoints restore (engine.py, `_load_checkpoint`)."""
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What changes in a loss scaler (fp16/loss_scaler.py); LossScaleConfig of runs without ZeRO has the same names."""


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
        writers=dist.get_world_size() if engine.save_zero_checkpoint else 1,
        stage=int(engine.zero_optimization_stage()),
        optimizer=type(engine.basic_optimizer).__name__,
        masters=list(view.masters_path),
        state=list(view.state_path),
        groups=[{names[id(p)]: list(shapes[names[id(p)]]) for p in group} for group in view.groups()],
        swapped=bool(engine.zero_nvme_offload_optimizer()),
        settings=[_plain(group) for group in engine.basic_optimizer.param_groups],
        counters={name: int(getattr(engine, name)) for name in COUNTERS},
        scaler={name: getattr(view.loss_scaler, name) for name in SCALER if hasattr(view.loss_scaler, name)},
        transposed=sorted(_transposed(engine)),
    )


def _shard(engine: zero.Engine, layout: Layout) -> RankShard | None:
    """What this process has written; None on those that write no shard."""
    if dist.get_rank() >= layout.writers:
        return None
    names = _names(engine)
    skipped = duplicates(engine)

    def own(spans: list[Span]) -> list[Part]:
        return [part for part in _parts(spans, names) if part.name not in skipped]

    flats = [] if layout.swapped else list(view_of(engine).flats())
    name = engine._get_zero_ckpt_name("", "") if engine.save_zero_checkpoint else engine._get_ckpt_name("", "")
    masters = [own(flat.spans) for flat in flats]
    moments = [own(flat.state_spans) for flat in flats]
    return RankShard.of(layout, dist.get_rank(), Path(name).name, masters, moments)


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """The settings of a parameter group that JSON can hold."""
    values = {
        key: value.item() if isinstance(value, Tensor) and not value.dim() else value for key, value in group.items()
    }
    return {key: value for key, value in values.items() if isinstance(value, (int, float, str, tuple, type(None)))}


# -- saving ------------------------------------------------------------------------------------------------------------


_MODEL_FILE = "_model_states.pt"
"""The end of the name that engine.py, `_get_ckpt_name`, gives to the file of the module."""


class ShardWriter(CheckpointEngine):
    """What DeepSpeed's `save_checkpoint` hands its files to (runtime/checkpoint_engine/checkpoint_engine.py).

    Parameters that follow from the optimizer's masters are left out: 2 to 4 bytes an element that nobody reads. So is
    the second file of each rank under ZeRO-3, in which nothing else is left (engine.py, `_save_checkpoint`), but for a
    state on NVMe, with which DeepSpeed reads it again. `write` gets a path and what is to be in it, which it may keep:
    tensors are DeepSpeed's own, not copies.
    """

    def __init__(self, engine: zero.Engine, write: Callable[[Path, Any], None]) -> None:
        super().__init__()
        has_masters = engine.optimizer is not engine.basic_optimizer
        self._left_out = {name for name, _ in engine.module.named_parameters()} if has_masters else set()
        self._unread = None if engine.zero_nvme_offload_optimizer() or not engine.save_zero_checkpoint else _MODEL_FILE
        self._write = write

    def create(self, info: CheckpointCommitInfo) -> None:
        del info

    def save(self, state_dict: Any, path: str) -> None:
        if self._unread is not None and path.endswith(self._unread):
            return
        module = state_dict.get("module")
        if module is not None:
            kept = {name: tensor for name, tensor in module.items() if name not in self._left_out}
            state_dict = {**state_dict, "module": kept}
        if "ds_config" in state_dict:  # nobody reads it, and a checkpoint is passed on
            state_dict = {**state_dict, "ds_config": masked(state_dict["ds_config"])}
        self._write(Path(path), state_dict)

    def load(self, path: str, map_location: Any = None) -> Any:
        """For a state on NVMe: DeepSpeed gets its own classes back, and nothing else that could run."""
        del map_location
        return load_pickled(Path(path), [fragment_address, LossScaler, DynamicLossScaler, ZeroStageEnum])

    def commit(self, info: CheckpointCommitInfo) -> bool:
        del info
        return True


def write_now(path: Path, content: Any) -> None:
    """Write a file of DeepSpeed's before the call returns."""
    torch.save(content, path)


def save_shards(
    engine: zero.Engine, folder: Path, tag: str, write: Callable[[Path, Any], None] = write_now
) -> tuple[Layout, RankShard | None]:
    """Save DeepSpeed's files in `folder/tag`, each through `write`. Collective. Returns what goes into the table of all
    ranks (`shard_index.ShardIndex`) in the same folder; without a shard on a process that writes none."""
    own = engine.checkpoint_engine
    engine.checkpoint_engine = ShardWriter(engine, write)
    try:
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    finally:
        engine.checkpoint_engine = own
    if dist.get_rank() == 0:
        for script in folder.glob("zero_to_*.py"):  # DeepSpeed's, for models whose weights are in the shards
            script.unlink()
    layout = _layout(engine)
    return layout, _shard(engine, layout)


# -- restoring ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def restore(engine: zero.Engine, shards: EngineShards) -> None:
    """Set everything that training changes from the shards of a checkpoint. Collective. With the number of processes
    that wrote them each one opens its own file alone.

    Raises `UserError` when the shards hold other parameters than the model, or another optimizer's state.
    """
    _check(engine, shards)
    if shards.layout.swapped:
        _restore_swapped(engine, shards)
        return
    view, names, transposed = view_of(engine), _names(engine), _transposed(engine)
    with view.unsharded_writes():
        for flat in view.flats():
            _restore_flat(flat, names, shards, transposed)
        if not view.gather_copies():
            for _, parameter in engine.module.named_parameters():
                copy, span = view.compute_copy(parameter)  # rounded from the master, as a step rounds it
                _fill(copy, MASTER, _parts([span], names), shards, transposed)
    for group in range(len(engine.basic_optimizer.param_groups)):
        step = shards.group_step(group)
        if step is not None:
            view.set_step(group, step)
    for name, value in shards.layout.counters.items():
        setattr(engine, name, value)
    for name, number in shards.layout.scaler.items():
        if hasattr(view.loss_scaler, name):
            setattr(view.loss_scaler, name, number)


def _restore_swapped(engine: zero.Engine, shards: EngineShards) -> None:
    """DeepSpeed has saved files of its own for a state on NVMe (engine.py, `save_checkpoint`) and loads them itself."""
    if shards.layout.world_size != dist.get_world_size():
        raise UserError(
            f"{shards.folder}: a run with its optimizer on NVMe (offload_optimizer in --deepspeed) can only be resumed "
            f"with as many processes as saved it: {shards.layout.world_size}"
        )
    own = engine.checkpoint_engine
    engine.checkpoint_engine = ShardWriter(engine, write_now)
    try:
        engine.load_checkpoint(str(shards.folder.parent), tag=shards.folder.name, load_module_strict=False)
    finally:
        engine.checkpoint_engine = own


def _check(engine: zero.Engine, shards: EngineShards) -> None:
    here = _shapes(engine)
    different = sorted(name for name in {*here, *shards.shapes} if here.get(name) != shards.shapes.get(name))
    if different:
        name = different[0]
        raise UserError(
            f"{shards.folder} does not fit this model in {len(different)} parameters, e.g. {name}: "
            f"{shards.shapes.get(name, 'none')} there, {here.get(name, 'none')} here"
        )
    mine, theirs = type(engine.basic_optimizer).__name__, shards.layout.optimizer
    if mine != theirs:
        raise UserError(f"{shards.folder} holds the state of {theirs}, this run's optimizer is {mine} (--deepspeed)")


def _restore_flat(flat: Flat, names: Names, shards: EngineShards, transposed: set[str]) -> None:
    """Set a master and its state. Padding, which no gradient reaches, becomes zero as in a fresh engine."""
    parts, state_parts = _parts(flat.spans, names), _parts(flat.state_spans, names)
    _fill(flat.master, MASTER, parts, shards, transposed)
    own = parts or [Part(next(iter(shards.layout.groups[flat.group])), 0, 0, 0)]
    state_of = [(shards.keys(p.name, p.start, p.numel), shards.scalars(p.name, p.start, p.numel)) for p in own]
    keys, scalars = state_of[0]
    for part, state in zip(own, state_of, strict=True):
        if state != (keys, scalars):
            raise UserError(
                f"{shards.folder}: {own[0].name} and {part.name} are one tensor here, with different state there"
            )
    for key in set(flat.state) - {*keys, *scalars}:
        del flat.state[key]
    for key, value in scalars.items():  # before the moments, as torch.optim.AdamW orders them: the same file again
        old = flat.state.get(key)
        if isinstance(value, Tensor):
            value = value.item() if isinstance(old, int) else value.to(old.device if isinstance(old, Tensor) else "cpu")
        flat.state[key] = value
    for key in keys:
        if not isinstance(flat.state.get(key), Tensor):
            dtype = shards.read(own[0].name, key, own[0].start, 0).dtype
            flat.state[key] = torch.zeros_like(flat.master, dtype=dtype, requires_grad=False)
            if state_parts != parts:
                flat.state[key] = flat.state[key].new_zeros(sum(part.numel for part in state_parts))
        _fill(flat.state[key], key, state_parts, shards, transposed)


def _fill(target: Tensor, key: str, parts: list[Part], shards: EngineShards, transposed: set[str]) -> None:
    flat = target.detach().view(-1)
    flat.zero_()
    for part in parts:
        values = shards.read(part.name, key, part.start, part.numel, part.name in transposed)
        flat.narrow(0, part.offset, part.numel).copy_(values)
