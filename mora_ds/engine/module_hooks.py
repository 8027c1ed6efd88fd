"""ZeRO-3's hooks on modules, kept where a module has something to all-gather.

DeepSpeed puts four Python hooks and two autograd functions on every module (parameter_offload.py,
`_register_deepspeed_module`). Here most modules have nothing to gather: frozen weights are buffers, activations have
none, and persistent parameters (`stage3_param_persistence_threshold`), such as small MoRA matrices, are unsharded on
every process between two steps. Without these hooks a step computes the same numbers with less work of the host.

Not used: decoder layers as leaf modules (deepspeed/utils/z3_leaf_module.py). A leaf reduces its gradients in a full
backward hook, which runs too early where its input needs no gradient, as behind frozen embeddings.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn


def drop_idle_hooks(engine: Any) -> list[str]:
    """Remove the hooks of modules without a parameter that is gathered when they run; to be called once, after
    `deepspeed.initialize`, at stage 3. Returns the names of the modules that keep theirs."""
    offload, root = engine.optimizer.parameter_offload, engine.module
    handles = {handle.id: handle for handle in (*offload.forward_hooks, *offload.backward_hooks)}
    kept = []
    for name, module in root.named_modules():
        # The root's start and end a pass (`setup_zero_stage3_hooks`).
        if module is root or any(not each.ds_persist for each in iter_params(module, z3_leaf_module(module))):
            kept.append(name)
            continue
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key in hooks if key in handles]:
                handles[key].remove()
        module.register_forward_pre_hook(_views)
    persistent = offload.persistent_parameters
    if persistent:
        root.register_forward_pre_hook(lambda *_: _gather(persistent), prepend=True)
    return kept


def _views(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Views of the inputs. DeepSpeed's hooks pass them through an autograd function, so that the gradients that a
    module's operations return for an input are added up before those of other modules: so they are added up here, too,
    and losses stay the same to the bit."""
    del module
    return tuple(each.view_as(each) if isinstance(each, Tensor) and each.requires_grad else each for each in inputs)


def _gather(persistent: list[Any]) -> None:
    """All-gather the persistent parameters that are sharded: before the first pass, after a step that fp16 has skipped
    and after a context that has gathered one (`GatheredParameters`). Else the step has gathered them already."""
    sharded: list[nn.Parameter] = [each for each in persistent if each.ds_status is ZeroParamStatus.NOT_AVAILABLE]
    if sharded:
        persistent[0].all_gather(sharded)
