"""What the rest of mora_ds asks a DeepSpeed engine: masters, optimizer state, learning rate, gradient norm.

Which optimizer the engine has is decided in `optimizer_view`; what Muon needs besides is in `muon`. The frozen base
never appears here: it is made of buffers, which ZeRO does not see.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TypeAlias

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from mora_ds.engine.optimizer_view import view_of

Engine: TypeAlias = DeepSpeedEngine


def prepare_backend(verbose: bool = False) -> None:
    """Call before `deepspeed.init_distributed`: starts gloo without compiling, and quietens DeepSpeed's logger.

    On a CPU, DeepSpeed's backend compiles `deepspeed_shm_comm` at start (77 s, needs g++, and waits for ever on the
    lock of a killed build): deepspeed/comm/torch.py, `build_shm_op`. gloo does the same work without it.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not verbose:
        deepspeed_logger.setLevel(logging.WARNING)


def whole_parameter(engine: Engine, parameter: nn.Parameter) -> AbstractContextManager[None]:
    """A context in which a trained parameter that ZeRO-3 has sharded is unsharded on every process. Collective."""
    return deepspeed.zero.GatheredParameters([parameter], enabled=is_stage3(engine))


def is_stage3(engine: Engine) -> bool:
    return engine.zero_optimization_stage() == 3


def at_accumulation_boundary(engine: Engine) -> bool:
    """Whether the last `step()` was an optimizer step.

    `engine.is_gradient_accumulation_boundary()` already speaks of the next micro-batch after `step()`: engine.py
    counts `micro_steps` up at its end. Where the caller sets the boundary, as accelerate does, `step()` is called once
    for all micro-batches, and what was set for the last one holds (engine.py, `set_gradient_accumulation_boundary`).
    """
    boundary = engine._is_gradient_accumulation_boundary
    return engine.micro_steps % engine.gradient_accumulation_steps() == 0 if boundary is None else boundary


def full_fp32(engine: Engine, parameter: nn.Parameter) -> Tensor:
    """The unsharded fp32 master of one trainable parameter, on every process. Collective: call it in the same order on
    all processes."""
    master = safe_get_full_fp32_param(parameter)
    return master.view(getattr(parameter, "ds_shape", parameter.shape))


@torch.no_grad()
def set_fp32(engine: Engine, parameter: nn.Parameter, value: Tensor) -> None:
    """Set one trainable parameter to `value` (unsharded, the same on every process): its fp32 master and every
    low-precision copy. Its optimizer state stays. Not collective."""
    value = value.to(engine.device, torch.float32)
    view_of(engine).set_master(parameter, value)
    if parameter.numel():  # empty under ZeRO-3, unless still gathered
        parameter.copy_(value)


@torch.no_grad()
def reset_group(engine: Engine, group: int, parameters: Iterable[nn.Parameter]) -> None:
    """Zero the fp32 masters of a parameter group, every low-precision copy of them, and its optimizer state.

    `parameters` are all parameters of the group. All copies must go: a master that is left brings the old value back at
    the next step, a low-precision copy that is left acts for one step more. So must the step counts: with the old one
    Adam's first update would be 2.94 times too large.
    """
    view = view_of(engine)
    for flat in view.flats(group):
        flat.master.zero_()
        for key, value in flat.state.items():
            if isinstance(value, Tensor):
                value.zero_()
            else:  # the step count of DeepSpeed's own Adam
                flat.state[key] = type(value)(0)
    view.set_step(group, 0)
    for parameter in parameters:
        view.zero_copy(parameter)


def set_learning_rate(engine: Engine, learning_rate: float, others: float = 1.0) -> None:
    """Set the learning rate of the next optimizer step: `learning_rate` for group 0, the MoRA matrices, and `others`
    times it for the other trained parameters. With Muon, DeepSpeed marks the groups by the key `use_muon`."""
    for index, group in enumerate(engine.optimizer.param_groups):
        group["lr"] = learning_rate * (1.0 if group.get("use_muon", index == 0) else others)


def gradient_norm(engine: Engine) -> float:
    """Global norm of the last step's gradients before clipping (engine.py, `get_global_grad_norm`); NaN before one."""
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)
