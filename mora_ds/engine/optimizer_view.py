"""DeepSpeed's optimizers behind one interface: where each kind keeps its fp32 masters, their state and the loss scale.

`view_of(engine)` chooses the class; nothing else in mora_ds asks which optimizer an engine has.

    class          DeepSpeed's optimizer           used for
    Stage3View     DeepSpeedZeroOptimizer_Stage3   ZeRO-3
    ZeroView       DeepSpeedZeroOptimizer          ZeRO-1 and ZeRO-2
    BF16View       BF16_Optimizer                  ZeRO-1 in bf16
    UnfusedView    FP16_UnfusedOptimizer           bf16 and fp16 without ZeRO
    FusedView      FP16_Optimizer                  the same with DeepSpeed's FusedAdam
    TorchView      none: the torch optimizer       fp32 without ZeRO

Written against DeepSpeed 0.19.8; tests/engine/test_zero_contract.py names each symbol that an upgrade has moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param
from torch import Tensor, nn

from mora_ds.common.errors import RunError

StateReset = Callable[[str, Tensor], Any]
"""Changes one tensor of optimizer state in place, given its key and this process's flat partition of it."""


class Span(NamedTuple):
    """Elements [start, start + numel) of a flattened parameter, which lie from `offset` on in a flat tensor."""

    parameter: Any
    start: int
    numel: int
    offset: int


class Flat(NamedTuple):
    """One tensor of fp32 masters that the optimizer of this process steps on."""

    group: int
    """Index of its parameter group."""
    master: Tensor
    state: dict[str, Any]
    spans: list[Span]
    """What the master holds."""
    state_spans: list[Span]
    """What the tensors of `state` hold: the same, but for Muon's momentum under ZeRO-1 and ZeRO-2."""


class OptimizerView:
    """The interface, and what holds for most optimizers."""

    sharded: ClassVar[bool] = False
    """Whether each process holds a part of the masters; else each holds all of them."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.engine, self.optimizer = engine, engine.optimizer

    def groups(self) -> list[list[nn.Parameter]]:
        """The parameters of each parameter group."""
        raise NotImplementedError

    def flats(self, group: int | None = None) -> Iterator[Flat]:
        """The masters of this process, of one parameter group or of all."""
        for index, master, spans in self._masters():
            if group in (None, index):
                state = self.engine.basic_optimizer.state[master]
                yield Flat(index, master, state, spans, self._state_spans(index, spans))

    def _masters(self) -> Iterator[tuple[int, Tensor, list[Span]]]:
        """(parameter group, master, what it holds)"""
        raise NotImplementedError

    def _state_spans(self, group: int, spans: list[Span]) -> list[Span]:
        del group
        return spans

    def master_of(self, parameter: nn.Parameter) -> Tensor:
        """A view of one parameter's master, where every process holds all masters. Raises `KeyError`."""
        for flat in self.flats():
            for span in flat.spans:
                if span.parameter is parameter:
                    return flat.master.view(-1).narrow(0, span.offset, span.numel).view_as(parameter)
        raise KeyError("the parameter is not in the optimizer")

    def set_master(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set one parameter's master, and its low-precision shard, to an unsharded fp32 `value`."""
        self.master_of(parameter).copy_(value)

    def compute_copy(self, parameter: nn.Parameter) -> tuple[Tensor, Span]:
        """The flat tensor on this process that forward reads a parameter from, in the compute dtype; and its span."""
        return parameter.data.view(-1), Span(parameter, 0, parameter.numel(), 0)

    def drop_second_copy(self, parameter: nn.Parameter) -> None:
        """Forget what else forward may read a parameter from, as its compute copy is overwritten."""

    def gather_copies(self) -> bool:
        """Set the compute copies of all parameters from the masters, where each process holds a part of the masters and
        complete copies: as a step does, so that no process reads the others' masters. Collective. False, and nothing is
        done, where a process can set its copies by itself."""
        return False

    def unsharded_writes(self) -> AbstractContextManager[None]:
        """A context in which masters and compute copies may be overwritten."""
        return nullcontext()

    def reset_step(self, group: int, reset: StateReset) -> None:
        """Change the step count that FusedAdam keeps in the parameter group; torch's AdamW has it in the state."""
        settings = self.engine.basic_optimizer.param_groups[group]
        if "step" in settings:
            step = torch.as_tensor(settings["step"])
            reset("step", step)
            self.set_step(group, int(step))

    def set_step(self, group: int, step: int) -> None:
        settings = self.engine.basic_optimizer.param_groups[group]
        old = settings.get("step")
        settings["step"] = torch.full_like(old, step) if isinstance(old, Tensor) else step

    @property
    def loss_scaler(self) -> Any:
        """The object that holds fp16's loss scale; None where there is none."""
        return getattr(self.optimizer, "loss_scaler", None)

    def unscaled_norm(self, norm: float) -> float:
        """The gradient norm, from what `engine.get_global_grad_norm` returns."""
        return norm

    def repair(self) -> None:
        """Make up for faults of DeepSpeed 0.19.8, once, right after `deepspeed.initialize`."""


class Stage3View(OptimizerView):
    """ZeRO-3, deepspeed/runtime/zero/stage3.py.

    A sub-group holds the shards of its parameters one after the other, every one padded to the same size on all
    processes (`_create_fp16_partitions_with_defragmentation`; partition_parameters.py, `_partition_param`).
    """

    sharded = True

    def groups(self) -> list[list[nn.Parameter]]:
        groups: list[list[nn.Parameter]] = [[] for _ in self.optimizer.param_groups]
        for index, parameters in enumerate(self.optimizer.fp16_groups):
            groups[self.optimizer.sub_group_to_group_id[index]] += parameters
        return groups

    def _masters(self) -> Iterator[tuple[int, Tensor, list[Span]]]:
        optimizer = self.optimizer
        for index, parameters in enumerate(optimizer.fp16_groups):
            sizes = [parameter.ds_tensor.ds_numel for parameter in parameters]
            offsets = accumulate(sizes, initial=0)
            spans = [self._span(parameter, offset) for parameter, offset in zip(parameters, offsets, strict=False)]
            master = optimizer.fp32_partitioned_groups_flat[index]
            if sum(sizes) != master.numel():
                raise RunError(f"ZeRO-3 has laid out sub-group {index} in another way than mora_ds knows")
            yield optimizer.sub_group_to_group_id[index], master, spans

    def _span(self, parameter: Any, offset: int) -> Span:
        size = parameter.ds_tensor.ds_numel
        start = min(self.optimizer._get_param_partition_rank(parameter) * size, parameter.ds_numel)
        return Span(parameter, start, min(size, parameter.ds_numel - start), offset)

    def set_master(self, parameter: nn.Parameter, value: Tensor) -> None:
        shard, span = self.compute_copy(parameter)
        values = value.flatten()[span.start : span.start + span.numel]
        values = nn.functional.pad(values, (0, shard.numel() - span.numel))
        safe_set_local_fp32_param(parameter, values)
        shard.copy_(values)
        self.drop_second_copy(parameter)

    def compute_copy(self, parameter: Any) -> tuple[Tensor, Span]:
        return parameter.ds_tensor.data.view(-1), self._span(parameter, 0)

    def drop_second_copy(self, parameter: Any) -> None:
        """Under ZeRO++ (zero_hpz_partition_size) a group of processes holds a second copy, from which all-gathers read
        until the next step. Without it they read the shards and make it anew (partition_parameters.py,
        `_partition_param_sec`; stage3.py, `invalidate_secondary_tensor`)."""
        parameter.ds_secondary_tensor = None

    @contextmanager
    def unsharded_writes(self) -> Iterator[None]:
        self.optimizer.checkpoint_event_prologue()  # shards what is still gathered
        yield
        self.optimizer.checkpoint_event_epilogue()  # drops second copies, gathers the persistent parameters again

    @torch.no_grad()
    def repair(self) -> None:
        """Where the number of processes does not divide a parameter, stage 3 leaves in the last master whatever was in
        that memory (`torch.empty`): zero it, so that equal runs write equal files."""
        for flat in self.flats():
            is_padding = torch.ones_like(flat.master, dtype=torch.bool)
            for span in flat.spans:
                is_padding[span.offset : span.offset + span.numel] = False
            flat.master.masked_fill_(is_padding, 0)


class _MappedView(OptimizerView):
    """Optimizers that note on each parameter which fragment of it this process holds (utils/tensor_fragment.py)."""

    sharded = True
    masters_name: ClassVar[str]

    def _masters(self) -> Iterator[tuple[int, Tensor, list[Span]]]:
        masters = getattr(self.optimizer, self.masters_name)
        for index, (parameters, master) in enumerate(zip(self.groups(), masters, strict=True)):
            spans = []
            for parameter in parameters:
                if mapping := getattr(parameter, "_hp_mapping", None):
                    in_parameter = mapping.lp_fragment_address
                    in_master = mapping.hp_fragment_address
                    spans.append(Span(parameter, in_parameter.start, in_parameter.numel, in_master.start))
            yield index, master, spans

    def gather_copies(self) -> bool:
        self.optimizer.update_lp_params()
        return True

    def set_master(self, parameter: nn.Parameter, value: Tensor) -> None:
        safe_set_full_fp32_param(parameter, value)


class ZeroView(_MappedView):
    """ZeRO-1 and ZeRO-2, deepspeed/runtime/zero/stage_1_and_2.py."""

    masters_name = "single_partition_of_fp32_groups"

    def groups(self) -> list[list[nn.Parameter]]:
        return self.optimizer.bit16_groups

    def _state_spans(self, group: int, spans: list[Span]) -> list[Span]:
        """Muon's momentum (`_muon_momentum_buffer`) holds every matrix unsharded of which any part is this process's;
        with offload it is cut like the master (`_apply_muon_updates_cpu_offload`)."""
        matrices = self.optimizer.params_in_partition[group]
        if self.optimizer.cpu_offload or not (matrices and self.optimizer._is_muon_group(matrices)):
            return spans
        return _one_after_the_other(matrices)


class BF16View(_MappedView):
    """ZeRO-1 in bf16, deepspeed/runtime/bf16_optimizer.py."""

    masters_name = "fp32_groups_flat_partition"

    def groups(self) -> list[list[nn.Parameter]]:
        return self.optimizer.bf16_groups


class _HalfView(OptimizerView):
    """Low precision without ZeRO: every process holds all masters."""

    def groups(self) -> list[list[nn.Parameter]]:
        return self.optimizer.fp16_groups

    @property
    def loss_scaler(self) -> Any:
        return self.optimizer.loss_scale_config

    def repair(self) -> None:
        """`engine.backward` does not scale the loss, though the step divides the gradients by the loss scale: small
        gradients underflow and none is clipped (DeepSpeed pull request 8393, open). And the optimizer makes AdamW's
        state by a step on zero gradients, which counts: the first update is 0.74 of what it should be."""
        backward, scaler = self.engine.backward, self.loss_scaler

        def scaled_backward(loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            scale = scaler.cur_scale
            return backward(loss.float() * scale, *args, **kwargs) / scale

        self.engine.backward = scaled_backward
        for group in range(len(self.optimizer.param_groups)):
            for flat in self.flats(group):
                if isinstance(flat.state.get("step"), Tensor):
                    flat.state["step"].zero_()
            self.reset_step(group, lambda key, step: step.zero_())


class UnfusedView(_HalfView):
    """One master a parameter, deepspeed/runtime/fp16/unfused_optimizer.py."""

    def _masters(self) -> Iterator[tuple[int, Tensor, list[Span]]]:
        return _one_by_one(self.groups(), self.optimizer.fp32_groups)

    def unscaled_norm(self, norm: float) -> float:
        return norm / self.loss_scaler.cur_scale  # the optimizer stores the norm of the scaled gradients


class FusedView(_HalfView):
    """One master a parameter group, deepspeed/runtime/fp16/fused_optimizer.py."""

    def _masters(self) -> Iterator[tuple[int, Tensor, list[Span]]]:
        for index, (parameters, master) in enumerate(zip(self.groups(), self.optimizer.fp32_groups_flat, strict=True)):
            yield index, master, _one_after_the_other(parameters)


class TorchView(OptimizerView):
    """fp32 without ZeRO: the torch optimizer steps on the parameters themselves."""

    def groups(self) -> list[list[nn.Parameter]]:
        return [group["params"] for group in self.optimizer.param_groups]

    def _masters(self) -> Iterator[tuple[int, Tensor, list[Span]]]:
        return _one_by_one(self.groups(), self.groups())

    def master_of(self, parameter: nn.Parameter) -> Tensor:
        return parameter

    def repair(self) -> None:
        """`engine.clip_fp32_gradients` computes the gradient norm and throws it away."""
        engine = self.engine

        def clip() -> None:
            limit = engine.gradient_clipping()
            engine._global_grad_norm = nn.utils.clip_grad_norm_(engine.module.parameters(), limit).item()

        engine.clip_fp32_gradients = clip


def _one_by_one(groups: list[list[Any]], masters: list[list[Any]]) -> Iterator[tuple[int, Tensor, list[Span]]]:
    for index, (parameters, masters_of_group) in enumerate(zip(groups, masters, strict=True)):
        for parameter, master in zip(parameters, masters_of_group, strict=True):
            yield index, master, [Span(parameter, 0, parameter.numel(), 0)]


def _one_after_the_other(parameters: list[Any]) -> list[Span]:
    offsets = accumulate((parameter.numel() for parameter in parameters), initial=0)
    return [
        Span(parameter, 0, parameter.numel(), offset) for parameter, offset in zip(parameters, offsets, strict=False)
    ]


_VIEWS: dict[type, type[OptimizerView]] = {
    DeepSpeedZeroOptimizer_Stage3: Stage3View,
    DeepSpeedZeroOptimizer: ZeroView,
    BF16_Optimizer: BF16View,
    FP16_UnfusedOptimizer: UnfusedView,
    FP16_Optimizer: FusedView,
}


def view_of(engine: DeepSpeedEngine) -> OptimizerView:
    """The view of an engine's optimizer."""
    kinds = (view for kind, view in _VIEWS.items() if isinstance(engine.optimizer, kind))
    return next(kinds, TorchView)(engine)
