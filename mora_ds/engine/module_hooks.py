"""The hooks by which ZeRO-3 gathers parameters in a pass: none on modules that have nothing
to gather, and one set for each decoder layer.

DeepSpeed registers four Python hooks and two autograd functions on every module
(parameter_offload.py, `_register_deepspeed_module`). Here most modules have nothing to
gather: frozen weights are buffers, activation modules have no weights, and persistent
parameters (`stage3_param_persistence_threshold`), such as small MoRA matrices, are
unsharded between steps. Without the hooks a step has the same results and takes less
time of the host.

Where a decoder layer has sharded parameters, it gathers and releases those of all its
modules together (`LayerGathers`), which takes about a seventh of the host's time for
Llama's seven linear layers.

    forward     before the layer: fetch     after it: release
    backward    before the layer: fetch     after it, when the gradients of all its inputs are computed: release

When activation checkpointing repeats a layer's forward in backward, its parameters are
already gathered. A layer whose inputs need no gradient, such as after frozen embeddings,
is released at the end of the backward pass (stage3.py, `release_backward_leftovers`).

DeepSpeed's leaf modules (deepspeed/utils/z3_leaf_module.py) are not used: a leaf reduces
its gradients in a full backward hook, which runs too early if its input needs no
gradient.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, free_param
from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from mora_ds.models.decoder_layers import find_decoder_layers

_GATHERED = ZeroParamStatus.AVAILABLE
_SHARDED = ZeroParamStatus.NOT_AVAILABLE

_FREES: tuple[dict[str, bool], ...] = ({}, {"free_data": True})
"""The keyword arguments with which `partition` only frees a parameter."""

_MAX_SLICES = 1024
"""Maximum of parameters times ranks for a coalesced all-gather of persistent parameters.
Its result is sliced in Python by parameters and ranks, which for more slices takes
longer than an all-gather for each parameter."""


def remove_unused_hooks(engine: Any) -> list[str]:
    """Remove the hooks of modules without parameters to gather, and of modules in a
    decoder layer, which gathers for all of them (`LayerGathers`). Call once at stage 3,
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
        # Some are sharded before the first pass, after a step skipped by fp16 and after a
        # `GatheredParameters` context; otherwise the step has already gathered all
        root.register_forward_pre_hook(
            lambda *_: persistent[0].all_gather(persistent), prepend=True
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
    return tuple(x.view_as(x) if _needs_gradient(x) else x for x in inputs)


def _coalesce_refresh(persistent: list[Any]) -> None:
    """Gather all persistent parameters that are sharded by one all-gather. DeepSpeed uses
    one for each (partition_parameters.py, `_allgather_params_coalesced`), which is
    dominated by latency."""
    first = persistent[0]
    one_by_one = first.all_gather

    def all_gather(param_list: Any = None, **options: Any) -> Any:
        # stage3.py, `_post_step`, passes this list
        if param_list is not persistent:
            return one_by_one(param_list, **options)
        sharded = [weight for weight in persistent if weight.ds_status is _SHARDED]
        return first.all_gather_coalesced(sharded).wait() if sharded else None

    first.all_gather = all_gather


# -- the hooks of a decoder layer -------------------------------------------------------


class LayerGathers:
    """Represents a decoder layer in DeepSpeed's trace of modules. It has the attributes
    of a module that PartitionedParameterCoordinator reads."""

    def __init__(self, coordinator: Any, layer: Any, parameters: list[Any]) -> None:
        self.coordinator = coordinator
        self.ds_id = layer.ds_id
        self.training = True
        self.ds_recompute_parameters: set[Any] = set()
        self._named = [
            (str(number), parameter) for number, parameter in enumerate(parameters)
        ]
        self._runs_again = False
        layer.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        layer.register_forward_hook(self._after_forward)

    def named_parameters(self, recurse: bool = False) -> Iterator[tuple[str, Any]]:
        return iter(self._named)

    def ds_external_parameters(self) -> tuple[()]:
        return ()

    def fetch(self, forward: bool) -> None:
        """As `pre_sub_module_forward_function` and `pre_sub_module_backward_function`
        (parameter_offload.py)."""
        self.coordinator.trace_prologue(self)
        if self.coordinator.is_record_trace():
            self.coordinator.record_module(self)
        self.coordinator.fetch_sub_module(self, forward=forward)

    def release(self, forward: bool) -> None:
        self.coordinator.release_sub_module(self, forward=forward)

    def _before_forward(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        # Activation checkpointing runs a forward in a backward pass, where the layer is
        # already gathered.
        in_backward_pass = torch._C._current_graph_task_id() != -1
        active = self._named[0][1].ds_active_sub_modules
        self._runs_again = in_backward_pass and self.ds_id in active
        if not self._runs_again:
            self.fetch(forward=True)
        return call_in_backward((args, kwargs), partial(self.release, forward=False))

    def _after_forward(self, layer: nn.Module, args: Any, output: Any) -> Any:
        if not self._runs_again:
            self.release(forward=True)
        return call_in_backward(output, partial(self.fetch, forward=False))


def call_in_backward(value: Any, in_backward: Callable[[], None]) -> Any:
    """The same value; its backward calls `in_backward` when the gradients of all its
    tensors are computed. For a layer's outputs this is before the layer's backward, for
    its inputs after it."""
    leaves, structure = tree_flatten(value)
    tensors = [leaf for leaf in leaves if _needs_gradient(leaf)]
    if not tensors or not torch.is_grad_enabled():
        return value
    passed = iter(_Mark.apply(in_backward, *tensors))
    leaves = [next(passed) if _needs_gradient(leaf) else leaf for leaf in leaves]
    return tree_unflatten(leaves, structure)


def _needs_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def free_quickly(parameter: Any) -> None:
    """Patch the `partition` of a sharded parameter to free a gathered tensor directly.
    In this common case DeepSpeed's method (partition_parameters.py, `_partition_param`)
    would also format unused messages. Other cases still use it."""
    partition = parameter.partition

    def free(*args: Any, **kwargs: Any) -> None:
        if args or kwargs not in _FREES or parameter.ds_status is not _GATHERED:
            partition(*args, **kwargs)
            return
        free_param(parameter)
        parameter.ds_status = _SHARDED

    parameter.partition = free


class _Mark(torch.autograd.Function):
    """The identity. Its backward first calls `in_backward`."""

    @staticmethod
    def forward(
        ctx: Any, in_backward: Callable[[], None], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.in_backward = in_backward
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.in_backward()
        return None, *gradients
