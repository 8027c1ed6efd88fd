"""DeepSpeed's optimizers seen as flat tensors: which part of which parameter lies where in what a rank's step works on.

One of the rooms that touch DeepSpeed's internals (0.19.8); `partitions` saves and restores by it, and
tests/checkpoint/test_elastic.py fails loudly where an upgrade lays something out in another way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from mora_ds.engine import zero
from mora_ds.engine.shard_reader import Part
from mora_ds.errors import RunError
from mora_ds.parallel.topology import share_of


@dataclass(frozen=True)
class Piece:
    """One flat tensor of this rank's optimizer."""

    group: int
    master: Tensor
    """fp32."""
    state: dict[str, Any]
    parts: list[Part]
    moments: list[Part]
    """The parts of the state's tensors. Those of `parts`, but for Muon's momentum under ZeRO 1 and 2: there it holds
    every square of which any part is this rank's, whole."""


Names = dict[int, str]
"""id of a parameter -> its name in the model."""


def pieces(engine: zero.Engine) -> Iterator[Piece]:
    """Every flat tensor of this rank, in the order in which DeepSpeed saves them."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        found = _stage3(optimizer, names)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        found = _mapped(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, names)
    elif isinstance(optimizer, BF16_Optimizer):
        found = _mapped(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, names)
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        found = _one_by_one(optimizer.fp16_groups, optimizer.fp32_groups, names)
    elif isinstance(optimizer, FP16_Optimizer):
        found = _joined(optimizer.fp16_groups, optimizer.fp32_groups_flat, names)
    else:
        groups = [group["params"] for group in optimizer.param_groups]
        found = _one_by_one(groups, groups, names)
    for group, master, parts in found:
        moments = _moments(optimizer, group, parts, names)
        yield Piece(group, master, engine.basic_optimizer.state[master], parts, moments)


def _moments(optimizer: Any, group: int, parts: list[Part], names: Names) -> list[Part]:
    """stage_1_and_2.py, `_muon_momentum_buffer`; with offload the momentum is cut like the master
    (`_apply_muon_updates_cpu_offload`)."""
    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or optimizer.cpu_offload:
        return parts
    squares = optimizer.params_in_partition[group]
    if not (squares and optimizer._is_muon_group(squares)):
        return parts
    whole, offset = [], 0
    for square in squares:
        whole.append(Part(names[id(square)], 0, square.numel(), offset))
        offset += square.numel()
    return whole


Found = Iterator[tuple[int, Tensor, list[Part]]]
"""(parameter group, flat master, its parts)."""


def _stage3(optimizer: Any, names: Names) -> Found:
    """A sub-group is the shards of its parameters, one behind the other, the last rank's padded (stage3.py,
    `_create_fp16_partitions_with_defragmentation`; partition_parameters.py, `_partition_param`)."""
    rank = dist.get_rank(group=optimizer.dp_process_group)
    for index, parameters in enumerate(optimizer.fp16_groups):
        master, parts, offset = optimizer.fp32_partitioned_groups_flat[index], [], 0
        for parameter in parameters:
            size = parameter.ds_tensor.ds_numel
            start = min(rank * size, parameter.ds_numel)
            numel = min(size, parameter.ds_numel - start)
            if numel:
                parts.append(Part(names[id(parameter)], first_element(parameter) + start, numel, offset))
            offset += size
        if offset != master.numel():
            raise RunError(f"ZeRO-3 has laid out sub-group {index} in another way than this version knows")
        yield optimizer.sub_group_to_group_id[index], master, parts


def _mapped(groups: list[list[Tensor]], masters: list[Tensor], names: Names) -> Found:
    """ZeRO 1 and 2 keep themselves which fragment is whose (utils/tensor_fragment.py)."""
    for index, (parameters, master) in enumerate(zip(groups, masters, strict=True)):
        parts = []
        for parameter in parameters:
            mapping: Any = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                of_parameter, of_flat = mapping.lp_fragment_address, mapping.hp_fragment_address
                parts.append(Part(names[id(parameter)], of_parameter.start, of_parameter.numel, of_flat.start))
        yield index, master, parts


def _one_by_one(groups: list[list[Tensor]], masters: list[list[Tensor]], names: Names) -> Found:
    for index, (parameters, fulls) in enumerate(zip(groups, masters, strict=True)):
        for parameter, full in zip(parameters, fulls, strict=True):
            yield index, full, [Part(names[id(parameter)], 0, parameter.numel(), 0)]


def _joined(groups: list[list[Tensor]], masters: list[Tensor], names: Names) -> Found:
    for index, (parameters, master) in enumerate(zip(groups, masters, strict=True)):
        parts, offset = [], 0
        for parameter in parameters:
            parts.append(Part(names[id(parameter)], 0, parameter.numel(), offset))
            offset += parameter.numel()
        yield index, master, parts


def groups_of(engine: zero.Engine) -> list[dict[str, list[int]]]:
    """Parameters and shapes of each group: masters do not tell, as a rank may have no part of one."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        groups: list[list[Any]] = [[] for _ in optimizer.param_groups]
        for index, parameters in enumerate(optimizer.fp16_groups):
            groups[optimizer.sub_group_to_group_id[index]] += parameters
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        groups = optimizer.bit16_groups
    elif isinstance(optimizer, BF16_Optimizer):
        groups = optimizer.bf16_groups
    elif isinstance(optimizer, (FP16_UnfusedOptimizer, FP16_Optimizer)):
        groups = optimizer.fp16_groups
    else:
        groups = [group["params"] for group in optimizer.param_groups]
    return [{names[id(parameter)]: list(shape_of(parameter)) for parameter in group} for group in groups]


def shape_of(parameter: Any) -> torch.Size:
    """Of the whole, also where this rank holds a share of a square."""
    share = share_of(parameter)
    return getattr(parameter, "ds_shape", parameter.shape) if share is None else torch.Size((share.r_hat, share.r_hat))


def first_element(parameter: Any) -> int:
    """Where what this rank's tensor-parallel place holds begins in the flattened whole."""
    share = share_of(parameter)
    return 0 if share is None else share.start * share.r_hat


def transposed_names(engine: zero.Engine) -> set[str]:
    """Squares whose shares are rows of the transpose."""
    shares = {name: share_of(parameter) for name, parameter in engine.module.named_parameters()}
    return {name for name, share in shares.items() if share is not None and share.transposed}


def duplicates(engine: zero.Engine) -> set[str]:
    """Parameters that this rank holds as another one of its tensor-parallel group does, which saves them."""
    if engine.mpu is None or engine.mpu.get_tensor_model_parallel_rank() == 0:
        return set()
    return {name for name, parameter in engine.module.named_parameters() if share_of(parameter) is None}


def scaler_of(engine: zero.Engine) -> Any:
    return getattr(engine.optimizer, "loss_scaler", getattr(engine.optimizer, "loss_scale_config", None))
