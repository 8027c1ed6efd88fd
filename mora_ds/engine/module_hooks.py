"""Removes ZeRO-3's hooks from modules that have nothing to all-gather.

DeepSpeed registers four Python hooks and two autograd functions on every module
(parameter_offload.py, `_register_deepspeed_module`). Here most modules have nothing to
gather: frozen weights are buffers, activation modules have no weights, and persistent
parameters (`stage3_param_persistence_threshold`), such as small MoRA matrices, are
unsharded between steps. Without the hooks a step has the same results and takes less
time of the host.
"""

from typing import Any

import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn

from mora_ds.engine.layer_gathers import LayerGathers, free_quickly
from mora_ds.models.decoder_layers import find_decoder_layers

_MAX_SLICES = 1024
"""Maximum of parameters times ranks for a coalesced all-gather of persistent parameters.
Its result is sliced in Python by parameters and ranks, which for more slices takes
longer than an all-gather for each parameter."""


def remove_unused_hooks(engine: Any) -> list[str]:
    """Remove the hooks of modules without parameters to gather, and of modules in a
    decoder layer, which gathers for all of them (`layer_gathers`). Call once at stage 3,
    after `deepspeed.initialize`. Returns the names of modules that keep their hooks."""
    offload = engine.optimizer.parameter_offload
    root = engine.module
    deepspeeds = (*offload.forward_hooks, *offload.backward_hooks)
    handles = {handle.id: handle for handle in deepspeeds}
    layers = _gather_by_layer(root, offload)
    gathered = {module for layer in layers for module in layer.modules()}
    hooked = []
    for name, module in root.named_modules():
        parameters = iter_params(module, z3_leaf_module(module))
        needed = any(not parameter.ds_persist for parameter in parameters)
        # The root's hooks start and end a pass (`setup_zero_stage3_hooks`): keep them
        if module is root or (needed and module not in gathered):
            hooked.append(name)
            continue
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key in hooks if key in handles]:
                handles[key].remove()
        if module not in layers:
            module.register_forward_pre_hook(_views)
    persistent = offload.persistent_parameters
    if persistent:
        if len(persistent) * dist.get_world_size() <= _MAX_SLICES:
            _coalesce_refresh(persistent)
        for parameter in persistent:
            free_quickly(parameter)
        root.register_forward_pre_hook(
            lambda *_: gather_persistent(persistent), prepend=True
        )
    return hooked


def _gather_by_layer(root: nn.Module, offload: Any) -> list[nn.Module]:
    """Make each decoder layer with sharded parameters gather them together. Returns
    these layers."""
    layers = []
    for layer in find_decoder_layers(root).values():
        sharded = [weight for weight in layer.parameters() if not weight.ds_persist]  # type: ignore[attr-defined]
        if sharded:
            LayerGathers(offload.param_coordinator, layer, sharded)
            layers.append(layer)
            for parameter in sharded:
                free_quickly(parameter)
    return layers


def _views(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook that returns views of the inputs. DeepSpeed's hooks pass inputs
    through an autograd function, so gradients of an input are first summed within each
    module. The views keep this order of summation, and so identical bits."""
    return tuple(
        item.view_as(item) if isinstance(item, Tensor) and item.requires_grad else item
        for item in inputs
    )


def _coalesce_refresh(persistent: list[Any]) -> None:
    """Make a step refresh all persistent parameters by one all-gather. DeepSpeed uses
    one for each (partition_parameters.py, `_allgather_params_coalesced`), which is
    dominated by latency."""
    first = persistent[0]
    one_by_one = first.all_gather

    def all_gather(param_list: Any = None, **options: Any) -> Any:
        # stage3.py, `_post_step`, passes this list
        if param_list is persistent:
            return first.all_gather_coalesced(_sharded(persistent)).wait()
        return one_by_one(param_list, **options)

    first.all_gather = all_gather


def _sharded(parameters: list[Any]) -> list[Any]:
    """The parameters that are not gathered."""
    return [
        parameter
        for parameter in parameters
        if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE
    ]


def gather_persistent(persistent: list[Any]) -> None:
    """All-gather the persistent parameters that are sharded. These exist before the
    first pass, after a step skipped by fp16 and after a `GatheredParameters` context;
    otherwise the step has already gathered all."""
    persistent[0].all_gather(_sharded(persistent))
