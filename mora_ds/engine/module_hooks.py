"""ZeRO-3's hooks on modules, kept where a module has something to all-gather.

DeepSpeed puts four Python hooks and two autograd functions on every module
(parameter_offload.py, `_register_deepspeed_module`). Here most modules have nothing to
gather: frozen weights are buffers, activations have none, and persistent parameters
(`stage3_param_persistence_threshold`), such as small MoRA matrices, are unsharded on
every process between two steps. Without these hooks a step computes the same numbers
with less work of the host.
"""

from typing import Any

import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn

from mora_ds.engine.layer_gathers import LayerGathers, free_quickly
from mora_ds.models.decoder_layers import find_decoder_layers

_FEW_SLICES = 1024
"""Parameters times ranks up to which persistent parameters are refreshed at once: a
common all-gather is sliced in Python, by parameters and ranks, and with many ranks that
takes longer than an all-gather for each."""


def drop_idle_hooks(engine: Any) -> list[str]:
    """Remove the hooks of modules without a parameter that is gathered when they run,
    and of those in a decoder layer, which gathers for them all (`layer_gathers`); to be
    called once, after `deepspeed.initialize`, at stage 3. Returns the names of the
    modules that keep theirs."""
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
        # The root's hooks start and end a pass (`setup_zero_stage3_hooks`)
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
        if len(persistent) * dist.get_world_size() <= _FEW_SLICES:
            _refresh_at_once(persistent)
        for parameter in persistent:
            free_quickly(parameter)
        root.register_forward_pre_hook(
            lambda *_: gather_persistent(persistent), prepend=True
        )
    return hooked


def _gather_by_layer(root: nn.Module, offload: Any) -> list[nn.Module]:
    """Let decoder layers with sharded parameters gather all of theirs; returns
    these."""
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
    """Views of the inputs. DeepSpeed's hooks pass them through an autograd function, so
    that the gradients that a module's operations return for an input are added up
    before those of other modules: so they are added up here, too, and losses stay the
    same to the bit."""
    return tuple(
        item.view_as(item) if isinstance(item, Tensor) and item.requires_grad else item
        for item in inputs
    )


def _refresh_at_once(persistent: list[Any]) -> None:
    """Have a step refresh the persistent parameters by one all-gather. DeepSpeed sends
    one for each (partition_parameters.py, `_allgather_params_coalesced`), and small
    messages take longer to start than to send."""
    first = persistent[0]
    one_by_one = first.all_gather

    def all_gather(param_list: Any = None, **options: Any) -> Any:
        # The list itself is what stage3.py, `_post_step`, asks for
        if param_list is persistent:
            return first.all_gather_coalesced(_sharded(persistent)).wait()
        return one_by_one(param_list, **options)

    first.all_gather = all_gather


def _sharded(parameters: list[Any]) -> list[Any]:
    """Those that are not gathered."""
    return [
        parameter
        for parameter in parameters
        if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE
    ]


def gather_persistent(persistent: list[Any]) -> None:
    """All-gather the persistent parameters that are sharded: before the first pass,
    after a step that fp16 has skipped and after a context that has gathered one
    (`GatheredParameters`). Else the step has gathered them already."""
    persistent[0].all_gather(_sharded(persistent))
