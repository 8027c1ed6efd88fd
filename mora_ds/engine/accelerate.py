"""The engine of a run by Hugging Face's Trainer, whose accelerate calls
`deepspeed.initialize` itself.

Written against accelerate 1.15, transformers 5.24 and DeepSpeed 0.19.8;
tests/hf/test_options.py fails where an upgrade moves what is used here.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
from accelerate import DistributedType, PartialState
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

from mora_ds.adapters.inject import frozen_buffers, move_base
from mora_ds.engine import zero
from mora_ds.engine.device import current_device, is_cpu
from mora_ds.engine.ds_keys import DsConfig
from mora_ds.engine.initialize import STARTED, initialize

_OURS = "_mora_ds_cpu"
"""Marks the class that `allow_cpu` has changed."""


def allow_cpu() -> None:
    """Lets accelerate use DeepSpeed on CPUs, over gloo; does nothing on a GPU.

    accelerate takes processes on CPUs for a single one each, unless DeepSpeed is left
    out (state.py, `PartialState._prepare_backend`). Called before `TrainingArguments`
    are made, which start the process group.
    """
    if not is_cpu() or hasattr(PartialState, _OURS):
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
    setattr(PartialState, _OURS, True)


@contextmanager
def our_engine() -> Iterator[None]:
    """Within, `deepspeed.initialize` makes the engine of `mora_ds.initialize`.

    accelerate looks the function up when a model is prepared (accelerator.py,
    `_prepare_deepspeed`) and passes `model`, `config_params`, `model_parameters`
    (dropped: the adapter chooses its parameter groups) and `lr_scheduler`.
    """

    def ours(
        *,
        model: nn.Module,
        config_params: DsConfig,
        model_parameters: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        config = dict(config_params)
        # accelerate sets it to infinity, which is no number of JSON
        # (utils/dataclasses.py, DeepSpeedPlugin)
        config.pop("steps_per_print", None)
        # A Trainer may train again, from a checkpoint, which fills its new engine
        vars(model).pop(STARTED, None)
        with _in_place_of_deepspeed(original):
            returned = initialize(model=model, config=config, **kwargs)
        mark_whole(frozen_buffers(model).values())
        return returned

    original = deepspeed.initialize
    with _in_place_of_deepspeed(ours):
        yield


@contextmanager
def bare_model(dtype: Any) -> Iterator[None]:
    """Within the context `deepspeed.initialize` makes no engine: it moves the model to
    this process's device in `dtype` and returns it. For an evaluation before training,
    which needs no shards of anything."""

    def ours(*, model: nn.Module, **kwargs: Any) -> tuple[Any, ...]:
        move_base(model, current_device(), dtype)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(current_device(), dtype)
        mark_whole([*frozen_buffers(model).values(), *model.parameters()])
        return model, None, None, None

    with _in_place_of_deepspeed(ours):
        yield


def mark_whole(tensors: Iterable[Any]) -> None:
    """Marks tensors as ZeRO-3 marks parameters that are gathered at present. trl's
    losses ask that of the head, be it frozen or not (trl/trainer/utils.py,
    `maybe_gather_lm_head_ctx`)."""
    for tensor in tensors:
        tensor.ds_status = ZeroParamStatus.AVAILABLE


@contextmanager
def _in_place_of_deepspeed(function: Callable[..., Any]) -> Iterator[None]:
    original = deepspeed.initialize
    deepspeed.initialize = function
    try:
        yield
    finally:
        deepspeed.initialize = original


def optimizer_steps(engine: zero.Engine) -> int:
    """Optimizer steps without those that fp16's loss scaling dropped."""
    return int(engine.global_steps - engine.skipped_steps)


def is_sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 has sharded the model at load (zero/partition_parameters.py)."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
