"""What the rest of mora_ds asks a DeepSpeed engine: masters, optimizer state, learning
rate, gradient norm.

`view_of(engine)` chooses by the engine's optimizer; nothing else in mora_ds asks which
one it has. What Muon needs besides is in `muon`. The frozen base never appears here: it
is made of buffers, which ZeRO does not see.

    class          DeepSpeed's optimizer           used for
    Stage3View     DeepSpeedZeroOptimizer_Stage3   ZeRO-3
    ZeroView       DeepSpeedZeroOptimizer          ZeRO-1 and ZeRO-2
    BF16View       BF16_Optimizer                  ZeRO-1 in bf16

Written against DeepSpeed 0.19.8. Where an upgrade moves something,
tests/engine/test_precision.py and tests/checkpoint/test_elastic.py fail;
test_zero_contract.py has what runs on a CPU do not show.
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
    """Let gloo start without compiling, and DeepSpeed log little; to be called first.

    On a CPU, DeepSpeed's backend compiles `deepspeed_shm_comm` at start (77 s, needs
    g++, and waits for ever on the lock of a killed build): deepspeed/comm/torch.py,
    `build_shm_op`. gloo does the same work without it.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed_logger.setLevel(logging.WARNING)


def whole_parameter(
    engine: Engine, parameter: nn.Parameter
) -> AbstractContextManager[None]:
    """A trained parameter is unsharded inside, on every process. Collective."""
    return deepspeed.zero.GatheredParameters([parameter], enabled=is_stage3(engine))


def is_stage3(engine: Engine) -> bool:
    return engine.zero_optimization_stage() == 3


def at_accumulation_boundary(engine: Engine) -> bool:
    """Whether the last `step()` was an optimizer step.

    `engine.is_gradient_accumulation_boundary()` already speaks of the next micro-batch
    after `step()`: engine.py counts `micro_steps` up at its end. Where the caller sets
    the boundary, as accelerate does, `step()` is called once for all micro-batches, and
    what was set for the last one holds (engine.py,
    `set_gradient_accumulation_boundary`).
    """
    boundary: bool | None = engine._is_gradient_accumulation_boundary
    if boundary is not None:
        return boundary
    return engine.micro_steps % engine.gradient_accumulation_steps() == 0


def full_fp32(parameter: nn.Parameter) -> Tensor:
    """The unsharded fp32 master of a trained parameter, on every process. Collective:
    call it in the same order on all processes."""
    master = safe_get_full_fp32_param(parameter)
    return master.view(getattr(parameter, "ds_shape", parameter.shape))


@torch.no_grad()
def set_fp32(engine: Engine, values: Mapping[nn.Parameter, Tensor]) -> None:
    """Set trained parameters to these values (unsharded, the same on every process):
    their fp32 masters and every low-precision copy. Their optimizer state stays.
    Collective."""
    view = view_of(engine)
    for flat in view.flats():
        for span in flat.spans:
            if span.parameter in values:
                elements = values[span.parameter].flatten()[span.start :][: span.numel]
                flat.master.narrow(0, span.offset, span.numel).copy_(elements)
    view.write_copies()


@torch.no_grad()
def reset_group(engine: Engine, group: int) -> None:
    """Zero a group's fp32 masters, low-precision copies and optimizer state.
    Collective.

    All copies must go: a master that is left brings the old value back at the next
    step, a low-precision copy that is left acts for one step more. So must the step
    counts: with the old one Adam's first update would be 2.94 times too large.
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
    """Set the learning rate of the next optimizer step: `learning_rate` for group 0,
    the MoRA matrices, and `factor` times it for the other trained parameters. With
    Muon, DeepSpeed marks the groups by the key `use_muon`."""
    for index, group in enumerate(engine.optimizer.param_groups):
        is_of_matrices = group.get("use_muon", index == 0)
        group["lr"] = learning_rate * (1.0 if is_of_matrices else factor)


def gradient_norm(engine: Engine) -> float:
    """Global norm of the last step's gradients before clipping; NaN before one."""
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)


# -- where each optimizer keeps its fp32 masters, their state and the loss scale -------


class Span(NamedTuple):
    """Elements [start, start + numel) of a parameter, at `offset` in a flat tensor."""

    parameter: Any
    start: int
    numel: int
    offset: int


Groups: TypeAlias = list[list[nn.Parameter]]
"""The parameters of each parameter group."""

Masters: TypeAlias = Iterator[tuple[int, Tensor, list[Span]]]
"""(index of the parameter group, flat fp32 master, which elements of which parameters
lie in it)"""


class Flat(NamedTuple):
    """One tensor of fp32 masters that the optimizer of this process steps on."""

    group: int
    """Index of its parameter group."""
    master: Tensor
    """The fp32 numbers, flat."""
    state: Tensors
    """What the optimizer keeps for them, such as moments and step counts."""
    spans: list[Span]
    """Which elements of which parameters lie in the master."""
    state_spans: list[Span]
    """The same of moments: other spans only in Muon's momentum under ZeRO-1 and 2."""


class OptimizerView:
    """What mora_ds asks of DeepSpeed's optimizers, of which each keeps it elsewhere."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer

    def groups(self) -> Groups:
        """The parameters of each parameter group."""
        raise NotImplementedError

    def flats(self, group: int | None = None) -> Iterator[Flat]:
        """The masters of this process, of one parameter group or of all."""
        for index, master, spans in self._masters():
            if group in (None, index):
                state = self.engine.basic_optimizer.state[master]
                yield Flat(index, master, state, spans, self._state_spans(index, spans))

    def _masters(self) -> Masters:
        """The masters of this process."""
        raise NotImplementedError

    def _state_spans(self, group: int, spans: list[Span]) -> list[Span]:
        return spans

    def write_copies(self) -> None:
        """Set what forward reads from the masters, rounded as by a step. Collective."""
        raise NotImplementedError

    @property
    def loss_scaler(self) -> Any:
        """The object that holds fp16's loss scale; None where there is none."""
        return getattr(self.optimizer, "loss_scaler", None)

    def repair(self) -> None:
        """Make up for faults of DeepSpeed 0.19.8, once, after its `initialize`."""


class Stage3View(OptimizerView):
    """ZeRO-3, deepspeed/runtime/zero/stage3.py.

    A sub-group holds the shards of its parameters one after the other, every one padded
    to the same size on all processes (`_create_fp16_partitions_with_defragmentation`;
    partition_parameters.py, `_partition_param`).
    """

    def groups(self) -> Groups:
        groups: Groups = [[] for _ in self.optimizer.param_groups]
        for index, parameters in enumerate(self.optimizer.fp16_groups):
            groups[self.optimizer.sub_group_to_group_id[index]] += parameters
        return groups

    def _masters(self) -> Masters:
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
                    f"ZeRO-3 has laid out sub-group {index} in another way than mora_ds knows"
                )
            yield optimizer.sub_group_to_group_id[index], master, spans

    def _span(self, parameter: Any, offset: int) -> Span:
        size = parameter.ds_tensor.ds_numel
        rank = self.optimizer._get_param_partition_rank(parameter)
        start = min(rank * size, parameter.ds_numel)
        return Span(parameter, start, min(size, parameter.ds_numel - start), offset)

    def write_copies(self) -> None:
        # Shards what is still gathered
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
        """Zero what stage 3 leaves in the last master where the number of processes
        does not divide a parameter, which is whatever was in that memory
        (`torch.empty`), so that equal runs write equal files. Let the device wait for
        reductions in place of the host."""
        self._order_reductions()
        for flat in self.flats():
            is_padding = torch.ones_like(flat.master, dtype=torch.bool)
            for span in flat.spans:
                is_padding[span.offset : span.offset + span.numel] = False
            flat.master.masked_fill_(is_padding, 0)

    def _order_reductions(self) -> None:
        """Replace what makes the host wait for a GPU in every backward pass: at its end
        stage 3 calls `reduce_and_partition_stream.synchronize()` (stage3.py,
        `independent_gradient_partition_epilogue`).

        All that reads the reduced gradients afterwards is queued on the current stream,
        which therefore waits; their memory is not reused before (`partition_grads`,
        `record_stream`). Offloaded gradients are read by the host."""
        # None on a CPU
        stream = self.optimizer.reduce_and_partition_stream
        if stream is not None and not self.optimizer.offload_optimizer:
            stream.synchronize = lambda: (
                get_accelerator().current_stream().wait_stream(stream)
            )


class _MappedView(OptimizerView):
    """Optimizers that note their fragments on parameters (utils/tensor_fragment.py)."""

    masters_name: ClassVar[str]

    def _masters(self) -> Masters:
        masters = getattr(self.optimizer, self.masters_name)
        groups = zip(self.groups(), masters, strict=True)
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

    masters_name = "single_partition_of_fp32_groups"

    def groups(self) -> Groups:
        return self.optimizer.bit16_groups

    def _state_spans(self, group: int, spans: list[Span]) -> list[Span]:
        """Muon's momentum has complete matrices, even where this process steps on a
        part of one only."""
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

    masters_name = "fp32_groups_flat_partition"

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
