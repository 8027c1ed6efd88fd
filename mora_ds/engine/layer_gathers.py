"""The sharded parameters of a decoder layer, gathered and released together.

DeepSpeed has four Python hooks on every module with a sharded parameter, and decides at
each what to gather and what to release (partitioned_param_coordinator.py). Here a
decoder layer has them, with the parameters of all modules in it as if they were its
own: about seven times less work of the host for Llama's seven linear layers.

    forward     before the layer: fetch     after it: release
    backward    before the layer: fetch     after it: release, once the gradients of all its inputs are there

Where activation checkpointing runs a layer's forward again within its backward, its
parameters are there already. A layer whose inputs need no gradient, as behind frozen
embeddings, is released when the backward pass ends (stage3.py,
`release_backward_leftovers`).

Not used: decoder layers as DeepSpeed's leaf modules
(deepspeed/utils/z3_leaf_module.py). A leaf reduces its gradients in a full backward
hook, which runs too early where its input needs no gradient.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus, free_param
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


class LayerGathers:
    """What stands for a decoder layer in DeepSpeed's trace of modules.
    `named_parameters`, `ds_*`: of those modules, as PartitionedParameterCoordinator
    reads them."""

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
        """`pre_sub_module_forward_function` and its twin (parameter_offload.py)."""
        self.coordinator.trace_prologue(self)
        if self.coordinator.is_record_trace():
            self.coordinator.record_module(self)
        self.coordinator.fetch_sub_module(self, forward=forward)

    def release(self, forward: bool) -> None:
        self.coordinator.release_sub_module(self, forward=forward)

    def _before_forward(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        # Activation checkpointing runs a forward within a backward pass, for which the
        # layer is gathered already.
        in_backward_pass = torch._C._current_graph_task_id() != -1
        active = self._named[0][1].ds_active_sub_modules
        self._runs_again = in_backward_pass and self.ds_id in active
        if not self._runs_again:
            self.fetch(forward=True)
        return marked((args, kwargs), partial(self.release, forward=False))

    def _after_forward(self, layer: nn.Module, args: Any, output: Any) -> Any:
        if not self._runs_again:
            self.release(forward=True)
        return marked(output, partial(self.fetch, forward=False))


def marked(value: Any, in_backward: Callable[[], None]) -> Any:
    """The value, whose backward calls `in_backward` once the gradients of all tensors
    in it are there: at a layer's outputs before the layer's own backward, at its inputs
    after it."""
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
    """Gives a sharded parameter a `partition` that frees the gathered tensor at once,
    and calls DeepSpeed's for all else (partition_parameters.py, `_partition_param`),
    which formats messages that nobody reads."""
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
    """The identity, whose backward makes a call first."""

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
