"""The engine for Hugging Face's Trainer, where accelerate calls `deepspeed.initialize`.

Written against accelerate 1.15, transformers 5.24 and DeepSpeed 0.19.8;
tests/hf/test_options.py fails if an upgrade moves a symbol used here.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
from accelerate import DistributedType, PartialState
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from mora_ds.adapters.inject import frozen_buffers
from mora_ds.common.attributes import replaced
from mora_ds.engine import zero
from mora_ds.engine.device import is_cpu
from mora_ds.engine.ds_keys import DsConfig
from mora_ds.engine.initialize import STARTED, initialize, move_here

_PATCHED = "_mora_ds_cpu"
"""Attribute of the class that `allow_cpu` has patched."""


def allow_cpu() -> None:
    """Let accelerate use DeepSpeed on CPUs, with gloo; does nothing on a GPU.

    With DeepSpeed on CPUs, accelerate would treat each process as a run of one process
    (state.py, `PartialState._prepare_backend`). Call before `TrainingArguments` are
    created, which start the process group.
    """
    if not is_cpu() or hasattr(PartialState, _PATCHED):
        return
    zero.prepare_backend()
    original = PartialState._prepare_backend

    def backend_of(
        self: Any, cpu: bool = False, *arguments: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        backend, kind = original(self, cpu, *arguments, **kwargs)
        launched = not cpu and kind == DistributedType.NO and "LOCAL_RANK" in os.environ
        return ("gloo", DistributedType.MULTI_CPU) if launched else (backend, kind)

    PartialState._prepare_backend = backend_of
    setattr(PartialState, _PATCHED, True)


@contextmanager
def our_engine() -> Iterator[None]:
    """A context in which `deepspeed.initialize` creates the engine of
    `mora_ds.initialize`.

    accelerate calls the function when it prepares a model (accelerator.py,
    `_prepare_deepspeed`), with `model`, `config_params`, `model_parameters` (ignored:
    the adapter defines its parameter groups) and `lr_scheduler`.
    """

    def ours(
        *,
        model: nn.Module,
        config_params: DsConfig,
        model_parameters: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        config = dict(config_params)
        # accelerate sets it to infinity, which JSON does not support
        # (utils/dataclasses.py, DeepSpeedPlugin)
        config.pop("steps_per_print", None)
        # A Trainer may train again: its new engine is then restored from a checkpoint
        vars(model).pop(STARTED, None)
        with replaced(deepspeed, "initialize", original):
            returned = initialize(model=model, config=config, **kwargs)
        mark_gathered(frozen_buffers(model).values())
        return returned

    original = deepspeed.initialize
    with replaced(deepspeed, "initialize", ours):
        yield


@contextmanager
def bare_model(dtype: Any) -> Iterator[None]:
    """A context in which `deepspeed.initialize` creates no engine: it moves the model to
    this process's device in `dtype` and returns it. For an evaluation before training,
    which needs no sharding."""

    def ours(*, model: nn.Module, **kwargs: Any) -> tuple[Any, ...]:
        move_here(model, dtype)
        mark_gathered([*frozen_buffers(model).values(), *model.parameters()])
        return model, None, None, None

    with replaced(deepspeed, "initialize", ours):
        yield


def mark_gathered(tensors: Iterable[Any]) -> None:
    """Set the status that ZeRO-3 gives gathered parameters. trl's losses read it from
    the head, frozen or not (trl/trainer/utils.py, `maybe_gather_lm_head_ctx`)."""
    for tensor in tensors:
        tensor.ds_status = ZeroParamStatus.AVAILABLE


def optimizer_steps(engine: zero.Engine) -> int:
    """Number of optimizer steps, without those skipped by fp16 loss scaling."""
    return int(engine.global_steps - engine.skipped_steps)


def is_sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 sharded the model at load (zero/partition_parameters.py)."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
