"""The room that touches DeepSpeed's internals (but for its Muon: muon.py). Written against DeepSpeed 0.19.8;
`tests/engine/test_zero_contract.py` fails loudly when an upgrade moves one of the symbols named here.

What the rest of the house needs from it:

    prepare_backend     start gloo without compiling, quieten the logger
    full_fp32           one parameter's fp32 master, gathered (r_hat^2 * 4 bytes)
    set_fp32            its opposite: master and low-precision copies from a whole tensor, without a collective
    reset_group         a parameter group back to zero: master, low-precision copies, moments, step count
    group_energy        summed squares of a group's masters, this rank's share
    mend_stage_0        three faults of runs without ZeRO

The frozen base never appears here: it is made of buffers, which ZeRO does not see.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param
from torch import Tensor, nn

Engine: TypeAlias = DeepSpeedEngine
StateReset = Callable[[str, Tensor], None]
"""Changes one tensor of optimizer state (key, flat partition) in place."""


def prepare_backend(verbose: bool = False) -> None:
    """Call before `deepspeed.init_distributed`.

    On CPU, DeepSpeed's backend compiles `deepspeed_shm_comm` at start (77 s, needs g++, and waits for ever on the
    lock of a killed build): deepspeed/comm/torch.py, `build_shm_op`. gloo does the same work without it.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not verbose:
        deepspeed_logger.setLevel(logging.WARNING)


def whole_parameter(engine: Engine, parameter: nn.Parameter) -> Any:
    """A context in which a trained parameter that ZeRO-3 has sharded is whole on every rank. Collective."""
    return deepspeed.zero.GatheredParameters([parameter], enabled=is_stage3(engine))


def is_stage3(engine: Engine) -> bool:
    return engine.zero_optimization_stage() == 3


def at_accumulation_boundary(engine: Engine) -> bool:
    """Whether the last `step()` was a real optimizer step.

    `engine.is_gradient_accumulation_boundary()` already speaks of the *next* micro-batch after `step()`: engine.py
    counts `micro_steps` up at its end.
    """
    return engine.micro_steps % engine.gradient_accumulation_steps() == 0


def full_fp32(engine: Engine, parameter: nn.Parameter) -> Tensor:
    """The fp32 master of one trainable parameter, whole, on every rank. Collective under ZeRO: call in the same order
    on all ranks."""
    master = safe_get_full_fp32_param(parameter)
    if master is not None:
        return master.view(_full_shape(parameter))
    optimizer = engine.optimizer
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        return _paired(optimizer.fp16_groups, optimizer.fp32_groups, parameter).detach().clone()
    if isinstance(optimizer, FP16_Optimizer):
        return _from_flat(optimizer.fp16_groups, optimizer.fp32_groups_flat, parameter).detach().clone()
    return parameter.detach().float().clone()


@torch.no_grad()
def set_fp32(engine: Engine, parameter: nn.Parameter, whole: Tensor) -> None:
    """Set one trainable parameter to `whole` (its full shape, the same on every rank): its fp32 master and every
    low-precision copy. Its optimizer state stays."""
    whole = whole.to(engine.device, torch.float32)
    optimizer = engine.optimizer
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3: equal shards, the last one padded (partition_parameters.py)
        shard = parameter.ds_tensor
        start = shard.numel() * optimizer._get_param_partition_rank(parameter)
        own = whole.flatten()[start : start + shard.numel()]
        own = nn.functional.pad(own, (0, shard.numel() - own.numel()))
        safe_set_local_fp32_param(parameter, own)
        shard.data.copy_(own)
    elif hasattr(parameter, "_hp_mapping"):
        safe_set_full_fp32_param(parameter, whole)
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        _paired(optimizer.fp16_groups, optimizer.fp32_groups, parameter).copy_(whole)
    elif isinstance(optimizer, FP16_Optimizer):
        _from_flat(optimizer.fp16_groups, optimizer.fp32_groups_flat, parameter).copy_(whole)
    if parameter.numel():  # empty under ZeRO-3, unless still gathered
        parameter.copy_(whole)


def reset_group(engine: Engine, group: int, parameters: Iterable[nn.Parameter], reset_state: StateReset) -> None:
    """Zero a parameter group's fp32 master and every low-precision copy of it; change its optimizer state by
    `reset_state`.

    `parameters` are all parameters of the group. All copies must go: with the master left the square comes back at the
    next step, with a low-precision copy left the old square acts for one step more.
    """
    for master, state in _masters(engine, group):
        master.detach().zero_()
        for key, value in state.items():
            if isinstance(value, Tensor):
                reset_state(key, value)
    _reset_group_step(engine, group, reset_state)
    for parameter in parameters:
        if hasattr(parameter, "ds_tensor"):  # partition_parameters.py: this rank's shard
            parameter.ds_tensor.data.zero_()
        parameter.data.zero_()  # empty under ZeRO-3, unless still gathered


def state_tensors(engine: Engine, group: int) -> Iterator[tuple[str, Tensor]]:
    """(key, flat partition on this rank) of a group's optimizer state, e.g. ("exp_avg", ...)."""
    for _, state in _masters(engine, group):
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield key, value


def group_energy(engine: Engine, group: int) -> float:
    """This rank's share of the summed squares of a group's fp32 masters: add it up over all ranks.

    One pass over the local partition. Where every rank holds whole masters rank 0's count alone. With masters on NVMe
    they are read for it.
    """
    whole = not isinstance(engine.optimizer, (DeepSpeedZeroOptimizer_Stage3, DeepSpeedZeroOptimizer, BF16_Optimizer))
    if whole and engine.global_rank != 0:
        return 0.0
    norms = [torch.linalg.vector_norm(values.detach(), dtype=torch.float64) for values in _unpadded(engine, group)]
    return torch.stack(norms).square().sum().item() if norms else 0.0


def set_learning_rate(engine: Engine, learning_rate: float, others: float = 1.0) -> None:
    """The rate of the next optimizer step: that of group 0, the squares, and `others` times it for whatever else is
    trained. DeepSpeed makes two groups of group 0 where it uses Muon, and tells them apart by a key."""
    for index, group in enumerate(engine.optimizer.param_groups):
        group["lr"] = learning_rate * (1.0 if group.get("use_muon", index == 0) else others)


def state_shard(engine: Engine) -> int:
    """Number of the shard of optimizer state that this rank holds: its rank, or 0 where every rank holds all of it."""
    return deepspeed.comm.get_rank() if engine.zero_optimization() else 0


def gradient_norm(engine: Engine) -> float:
    """Global norm of the last step's gradients before clipping (engine.py, `get_global_grad_norm`)."""
    norm = engine.get_global_grad_norm()
    if norm is None:
        return float("nan")
    scale = engine.optimizer.loss_scale_config.cur_scale if isinstance(engine.optimizer, FP16_UnfusedOptimizer) else 1.0
    return float(norm) / scale  # the unfused optimizer keeps the norm of the scaled gradients


def mend_stage_0(engine: Engine) -> None:
    """Without ZeRO, make up for what 0.19.8 leaves undone; with it there is nothing to do.

    fp16: `backward` does not scale the loss, though the step divides gradients by the loss scale: small ones underflow
    and none is clipped (deepspeedai/DeepSpeed pull request 8393, open).
    fp16, bf16: Adam's state is made by a step on zero gradients, which counts: the first update is 0.74 of what it
    should be.
    fp32: the gradient norm is computed for clipping and thrown away.
    """
    if isinstance(engine.optimizer, (FP16_Optimizer, FP16_UnfusedOptimizer)):
        _scale_loss(engine)
        for group in range(len(engine.optimizer.param_groups)):
            for key, value in state_tensors(engine, group):
                _zero_step(key, value)
            _reset_group_step(engine, group, _zero_step)
    elif not engine.zero_optimization():
        _keep_norm(engine)


def _zero_step(key: str, value: Tensor) -> None:
    if key == "step":
        value.zero_()


def _scale_loss(engine: Engine) -> None:
    optimizer, backward = engine.optimizer, engine.backward

    def scaled_backward(loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scale = optimizer.loss_scale_config.cur_scale
        return backward(loss.float() * scale, *args, **kwargs) / scale

    engine.backward = scaled_backward


def _keep_norm(engine: Engine) -> None:
    def clip() -> None:
        most = engine.gradient_clipping()
        engine._global_grad_norm = nn.utils.clip_grad_norm_(engine.module.parameters(), most).item()

    engine.clip_fp32_gradients = clip


def step_was_skipped(engine: Engine) -> bool:
    """Whether fp16 loss scaling dropped the last optimizer step because of an overflow."""
    return bool(getattr(engine.optimizer, "overflow", False))


# -- where each optimizer of DeepSpeed keeps its masters --------------------------------------------------------------


def _masters(engine: Engine, group: int) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """(fp32 master tensor on this rank, its optimizer state) for each piece of parameter group `group`."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        yield from _stage3_masters(optimizer, group)
        return
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        masters = [optimizer.single_partition_of_fp32_groups[group]]
    elif isinstance(optimizer, BF16_Optimizer):
        masters = [optimizer.fp32_groups_flat_partition[group]]
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        masters = optimizer.fp32_groups[group]
    elif isinstance(optimizer, FP16_Optimizer):
        masters = [optimizer.fp32_groups_flat[group]]
    else:
        masters = optimizer.param_groups[group]["params"]
    for master in masters:
        yield master, engine.basic_optimizer.state[master]


def _stage3_masters(optimizer: Any, group: int) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Sub-groups of ZeRO-3 (stage3.py, `_create_fp16_partitions_with_defragmentation`), read from NVMe and written
    back where they are swapped out."""
    for index, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        if optimizer.sub_group_to_group_id[index] != group:
            continue
        swapped = optimizer._swappable_optimizer_subgroup(index)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(index)
        yield master, optimizer.optimizer.state[master]
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_out(index)


def _unpadded(engine: Engine, group: int) -> Iterator[Tensor]:
    """The values in `_masters`. ZeRO-3 fills up each parameter's last partition with memory as it finds it
    (partition_parameters.py, `_partition_param`), which any sum must leave out; the others fill up with zeros."""
    optimizer = engine.optimizer
    if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        yield from (master for master, _ in _masters(engine, group))
        return
    indices = [index for index, owner in sorted(optimizer.sub_group_to_group_id.items()) if owner == group]
    for index, (master, _) in zip(indices, _stage3_masters(optimizer, group), strict=True):
        for parameter in optimizer.fp16_groups[index]:
            _, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            before = optimizer._get_param_partition_rank(parameter) * size
            yield master.narrow(0, offset, max(0, min(size, parameter.ds_numel - before)))


def _reset_group_step(engine: Engine, group: int, reset_state: StateReset) -> None:
    """FusedAdam counts steps in the parameter group, torch's Adam in the state."""
    settings = engine.basic_optimizer.param_groups[group]
    if "step" in settings:
        step = torch.as_tensor(settings["step"])
        reset_state("step", step)
        settings["step"] = step if isinstance(settings["step"], Tensor) else int(step)


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _paired(half_groups: list[list[Tensor]], masters: list[list[Tensor]], parameter: nn.Parameter) -> Tensor:
    for halves, fulls in zip(half_groups, masters, strict=True):
        for half, full in zip(halves, fulls, strict=True):
            if half is parameter:
                return full
    raise KeyError("the parameter is not in the optimizer")


def _from_flat(half_groups: list[list[Tensor]], flats: list[Tensor], parameter: nn.Parameter) -> Tensor:
    for halves, flat in zip(half_groups, flats, strict=True):
        start = 0
        for half in halves:
            if half is parameter:
                return flat.narrow(0, start, half.numel()).view_as(half)
            start += half.numel()
    raise KeyError("the parameter is not in the optimizer")
