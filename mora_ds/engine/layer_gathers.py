"""Gathers and releases all sharded parameters of a decoder layer together.

DeepSpeed registers four Python hooks on every module with a sharded parameter
(partitioned_param_coordinator.py). Here only the decoder layer has them, for the
parameters of all modules in it, which takes about a seventh of the host's time for
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
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, free_param
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


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

    def free(
        param_list: Any = None,
        hierarchy: int = 0,
        has_been_updated: bool = False,
        free_data: bool = True,
    ) -> None:
        is_gathered = parameter.ds_status is ZeroParamStatus.AVAILABLE
        if is_gathered and param_list is None and free_data and not has_been_updated:
            free_param(parameter)
            parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
        else:
            partition(param_list, hierarchy, has_been_updated, free_data)

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
