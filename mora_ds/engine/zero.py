"""Access to a DeepSpeed engine's fp32 master weights, optimizer state, learning rate and
gradient norm.

`view_of(engine)` selects the view of the engine's optimizer; no other code in mora_ds
depends on the type of the optimizer. Workarounds for Muon are in `muon`. The frozen base
consists of buffers, which ZeRO ignores, so it does not occur here.

    class          DeepSpeed's optimizer           used for
    Stage3View     DeepSpeedZeroOptimizer_Stage3   ZeRO-3
    ZeroView       DeepSpeedZeroOptimizer          ZeRO-1 and ZeRO-2
    BF16View       BF16_Optimizer                  ZeRO-1 in bf16

Written against DeepSpeed 0.19.8. If an upgrade moves a symbol,
tests/engine/test_precision.py and tests/checkpoint/test_elastic.py fail;
test_zero_contract.py covers symbols that are not used on a CPU.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple, TypeAlias

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from mora_ds.common.errors import RunError
from mora_ds.common.tensor_files import Tensors

Engine: TypeAlias = DeepSpeedEngine


def prepare_backend() -> None:
    """Disable a compilation of DeepSpeed's gloo backend, and reduce its logs. Call
    first.

    On a CPU, the backend compiles `deepspeed_shm_comm` at start (77 s, needs g++, and
    waits forever for the lock of a killed build): deepspeed/comm/torch.py,
    `build_shm_op`. gloo works without it.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed_logger.setLevel(logging.WARNING)


def gathered_parameter(
    engine: Engine, parameter: nn.Parameter
) -> AbstractContextManager[None]:
    """A context in which a trained parameter is unsharded on every rank. Collective."""
    return deepspeed.zero.GatheredParameters([parameter], enabled=is_stage3(engine))


def is_stage3(engine: Engine) -> bool:
    return engine.zero_optimization_stage() == 3


def at_accumulation_boundary(engine: Engine) -> bool:
    """Whether the last `step()` was an optimizer step.

    After `step()`, `engine.is_gradient_accumulation_boundary()` is about the next
    micro-batch, because `step` increments `micro_steps`. If the caller sets the
    boundary, as accelerate does, the value set for the last micro-batch is valid
    (engine.py, `set_gradient_accumulation_boundary`).
    """
    boundary: bool | None = engine._is_gradient_accumulation_boundary
    if boundary is not None:
        return boundary
    return engine.micro_steps % engine.gradient_accumulation_steps() == 0


def full_fp32(parameter: nn.Parameter) -> Tensor:
    """The unsharded fp32 master weight of a trained parameter, on every rank.
    Collective: call it in the same order on all ranks."""
    master = safe_get_full_fp32_param(parameter)
    return master.view(getattr(parameter, "ds_shape", parameter.shape))


@torch.no_grad()
def set_fp32(engine: Engine, values: Mapping[nn.Parameter, Tensor]) -> None:
    """Set trained parameters to these values (unsharded, equal on all ranks), in the
    fp32 master weights and the model weights. Keeps the optimizer state. Collective."""
    view = view_of(engine)
    for flat in view.flats():
        for span in flat.spans:
            if span.parameter in values:
                elements = values[span.parameter].flatten()[span.start :][: span.numel]
                flat.master.narrow(0, span.offset, span.numel).copy_(elements)
    view.write_copies()


@torch.no_grad()
def reset_group(engine: Engine, group: int) -> None:
    """Zero a group's fp32 master weights, model weights and optimizer state.
    Collective.

    All of them are necessary: the next step would restore a parameter from a master
    weight, and the next forward would use an old model weight. With an old step count
    Adam's first update would be 2.94 times too large.
    """
    view = view_of(engine)
    for flat in view.flats(group):
        flat.master.zero_()
        for value in flat.state.values():
            value.zero_()
    view.write_copies()


def set_learning_rate(
    engine: Engine, learning_rate: float, factor: float = 1.0
) -> None:
    """Set the learning rate of the next optimizer step: `learning_rate` for the MoRA
    matrices (group 0, or with Muon the groups with `use_muon`), and `factor` times it
    for the other trained parameters."""
    for index, group in enumerate(engine.optimizer.param_groups):
        has_matrices = group.get("use_muon", index == 0)
        group["lr"] = learning_rate * (1.0 if has_matrices else factor)


def gradient_norm(engine: Engine) -> float:
    """Global norm of the last step's gradients before clipping; NaN before the first
    step."""
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)


# -- views of optimizers: fp32 master weights, their state and the loss scale ----------


class Span(NamedTuple):
    """Elements [start, start + numel) of a parameter, at `offset` in a flat tensor."""

    parameter: Any
    start: int
    numel: int
    offset: int


Groups: TypeAlias = list[list[nn.Parameter]]
"""The parameters of each parameter group."""

MasterWeights: TypeAlias = Iterator[tuple[int, Tensor, list[Span]]]
"""(index of the parameter group, flat fp32 master weights, their spans)"""


class Flat(NamedTuple):
    """A flat tensor of fp32 master weights that this rank's optimizer updates."""

    group: int
    """Index of its parameter group."""
    master: Tensor
    """The fp32 master weights, flat."""
    state: Tensors
    """The optimizer state, such as moments and step counts."""
    spans: list[Span]
    """The elements of parameters in `master`."""
    state_spans: list[Span]
    """The elements of parameters in `state`. Different from `spans` only for Muon's
    momentum under ZeRO-1 and 2."""


class OptimizerView:
    """A common interface to DeepSpeed's optimizers, which store these tensors
    differently."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer

    def groups(self) -> Groups:
        """The parameters of each parameter group."""
        raise NotImplementedError

    def flats(self, group: int | None = None) -> Iterator[Flat]:
        """The master weights of this rank, of one parameter group or of all."""
        for index, master, spans in self._master_weights():
            if group in (None, index):
                state = self.engine.basic_optimizer.state[master]
                yield Flat(index, master, state, spans, self._state_spans(index, spans))

    def _master_weights(self) -> MasterWeights:
        """The master weights of this rank."""
        raise NotImplementedError

    def _state_spans(self, group: int, spans: list[Span]) -> list[Span]:
        return spans

    def write_copies(self) -> None:
        """Update the model weights from the master weights, as a step does.
        Collective."""
        raise NotImplementedError

    @property
    def loss_scaler(self) -> Any:
        """fp16's loss scaler; None if there is none."""
        return getattr(self.optimizer, "loss_scaler", None)

    def repair(self) -> None:
        """Work around bugs of DeepSpeed 0.19.8. Call once after its `initialize`."""


class Stage3View(OptimizerView):
    """ZeRO-3, deepspeed/runtime/zero/stage3.py.

    A sub-group is the concatenation of the shards of its parameters. Shards of a
    parameter are padded to the same size on all ranks
    (`_create_fp16_partitions_with_defragmentation`; partition_parameters.py,
    `_partition_param`).
    """

    def groups(self) -> Groups:
        groups: Groups = [[] for _ in self.optimizer.param_groups]
        for index, parameters in enumerate(self.optimizer.fp16_groups):
            groups[self.optimizer.sub_group_to_group_id[index]] += parameters
        return groups

    def _master_weights(self) -> MasterWeights:
        optimizer = self.optimizer
        for index, parameters in enumerate(optimizer.fp16_groups):
            sizes = [parameter.ds_tensor.ds_numel for parameter in parameters]
            offsets = accumulate(sizes, initial=0)
            spans = [
                self._span(parameter, offset)
                for parameter, offset in zip(parameters, offsets, strict=False)
            ]
            master = optimizer.fp32_partitioned_groups_flat[index]
            if sum(sizes) != master.numel():
                raise RunError(
                    f"ZeRO-3 uses an unknown layout of sub-group {index}: mora_ds does not support this DeepSpeed"
                )
            yield optimizer.sub_group_to_group_id[index], master, spans

    def _span(self, parameter: Any, offset: int) -> Span:
        size = parameter.ds_tensor.ds_numel
        rank = self.optimizer._get_param_partition_rank(parameter)
        start = min(rank * size, parameter.ds_numel)
        return Span(parameter, start, min(size, parameter.ds_numel - start), offset)

    def write_copies(self) -> None:
        # Shards parameters that are still gathered
        self.optimizer.checkpoint_event_prologue()
        for flat in self.flats():
            for span in flat.spans:
                shard = span.parameter.ds_tensor.data.view(-1)
                shard[: span.numel].copy_(
                    flat.master.narrow(0, span.offset, span.numel)
                )
        # Gathers the persistent parameters again
        self.optimizer.checkpoint_event_epilogue()

    @torch.no_grad()
    def repair(self) -> None:
        """Zero the padding of master weights, which stage 3 leaves uninitialized
        (`torch.empty`), so that equal runs write equal files. Make the device wait for
        reductions instead of the host."""
        self._order_reductions()
        for flat in self.flats():
            is_padding = torch.ones_like(flat.master, dtype=torch.bool)
            for span in flat.spans:
                is_padding[span.offset : span.offset + span.numel] = False
            flat.master.masked_fill_(is_padding, 0)

    def _order_reductions(self) -> None:
        """Avoid that the host waits for the GPU in every backward pass: at its end stage
        3 calls `reduce_and_partition_stream.synchronize()` (stage3.py,
        `independent_gradient_partition_epilogue`).

        Instead the current stream waits, because all later uses of the reduced
        gradients are queued there; their memory is not reused before
        (`partition_grads`, `record_stream`). Offloaded gradients are read by the host,
        so they are excluded."""
        # None on a CPU
        stream = self.optimizer.reduce_and_partition_stream
        if stream is not None and not self.optimizer.offload_optimizer:
            stream.synchronize = lambda: (
                get_accelerator().current_stream().wait_stream(stream)
            )


class _MappedView(OptimizerView):
    """Optimizers that store their fragments as attributes of parameters
    (utils/tensor_fragment.py)."""

    master_weights_name: ClassVar[str]

    def _master_weights(self) -> MasterWeights:
        master_weights = getattr(self.optimizer, self.master_weights_name)
        groups = zip(self.groups(), master_weights, strict=True)
        for index, (parameters, master) in enumerate(groups):
            spans = []
            for parameter in parameters:
                if mapping := getattr(parameter, "_hp_mapping", None):
                    source = mapping.lp_fragment_address
                    start = mapping.hp_fragment_address.start
                    spans.append(Span(parameter, source.start, source.numel, start))
            yield index, master, spans

    def write_copies(self) -> None:
        self.optimizer.update_lp_params()


class ZeroView(_MappedView):
    """ZeRO-1 and ZeRO-2, deepspeed/runtime/zero/stage_1_and_2.py."""

    master_weights_name = "single_partition_of_fp32_groups"

    def groups(self) -> Groups:
        return self.optimizer.bit16_groups

    def _state_spans(self, group: int, spans: list[Span]) -> list[Span]:
        """Muon's momentum has unsharded matrices, even if this rank updates only a part
        of one."""
        matrices = self.optimizer.params_in_partition[group]
        if not (matrices and self.optimizer._is_muon_group(matrices)):
            return spans
        offsets = accumulate((matrix.numel() for matrix in matrices), initial=0)
        return [
            Span(matrix, 0, matrix.numel(), offset)
            for matrix, offset in zip(matrices, offsets, strict=False)
        ]


class BF16View(_MappedView):
    """ZeRO-1 in bf16, deepspeed/runtime/bf16_optimizer.py."""

    master_weights_name = "fp32_groups_flat_partition"

    def groups(self) -> Groups:
        return self.optimizer.bf16_groups


_VIEWS: dict[type, type[OptimizerView]] = {
    DeepSpeedZeroOptimizer_Stage3: Stage3View,
    DeepSpeedZeroOptimizer: ZeroView,
    BF16_Optimizer: BF16View,
}


def view_of(engine: DeepSpeedEngine) -> OptimizerView:
    """The view of an engine's optimizer."""
    views = (
        view for kind, view in _VIEWS.items() if isinstance(engine.optimizer, kind)
    )
    return next(views)(engine)
