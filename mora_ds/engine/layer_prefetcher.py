"""Prefetches decoder layers of a base in host memory to a few buffers on the device.

    forward     layer 0, 1, ..., L-1        while layer i computes, layers i+1 ... i+N-1 are copied
    backward    L-1, ..., 0                 the same in reverse order; then 0 ... N-1 for the next forward
    buffers     layer i always uses buffer i mod N

The modules of a layer hold tensors in host memory, which merges write, checksums read,
and all ranks of a node may share. Only while a layer runs, its modules hold views of its
buffer, so these are what autograd saves. A layer always has the same buffer, so a saved
view is valid whenever the layer is in its buffer. A saved-tensor hook copies the layer
to its buffer again before backward uses the view. Gradient checkpointing replaces these
hooks, but runs the layer's modules again, which has the same effect. Copies do not
change autograd's version counters (`Tensor.data`).

With N buffers a micro-batch copies L - N layers in each direction, which is the minimum:
the last N layers are still there for backward, and the first N for the next forward.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain, cycle
from typing import Any

import torch
from torch import Tensor, nn

from mora_ds.common.errors import RunError
from mora_ds.common.tensor_files import Tensors
from mora_ds.engine.device import BUFFERS
from mora_ds.engine.host_copies import Copies, copies_for
from mora_ds.models.decoder_layers import (
    extent,
    offsets,
    stored_bytes,
    weights_of_layers,
)

_ATTRIBUTE = "_mora_prefetcher"
"""The attribute of a model that holds its prefetcher."""


class _Layer:
    """The frozen tensors of a decoder layer: in host memory, and views of its
    buffer."""

    def __init__(self, model: nn.Module, tensors: Tensors, slot: Tensor) -> None:
        starts, _ = offsets(tensors.values())
        views: dict[int, Tensor] = {}
        self.entries: list[tuple[dict[str, Any], str, Tensor]] = []
        for name, tensor in tensors.items():
            if id(tensor) not in views:
                start = starts[id(tensor)]
                size = extent(tensor) * tensor.element_size()
                flat = slot[start : start + size].view(tensor.dtype)
                views[id(tensor)] = flat.as_strided(tensor.size(), tensor.stride())
            owner, _, key = name.rpartition(".")
            buffers = model.get_submodule(owner)._buffers
            self.entries.append((buffers, key, views[id(tensor)]))
        self._hosts: list[Tensor | None] = []
        """The tensors in host memory that `bind_device` replaced."""

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(view, current tensor in host memory) of each tensor."""
        by_view = {
            id(view): (view.data, buffers[key]) for buffers, key, view in self.entries
        }
        return list(by_view.values())

    def bind_device(self) -> None:
        """Make the modules hold the views."""
        self._hosts = [buffers[key] for buffers, key, _ in self.entries]
        for buffers, key, view in self.entries:
            buffers[key] = view

    def bind_host(self) -> None:
        """Undo `bind_device`."""
        for (buffers, key, _), host in zip(self.entries, self._hosts, strict=False):
            buffers[key] = host
        self._hosts = []


class LayerPrefetcher:
    """The buffers of a model, and the layer that each of them holds."""

    def __init__(self, model: Any, device: torch.device, copies: Copies) -> None:
        """Raises `UserError` without decoder layers, or if memory cannot be locked."""
        weights = weights_of_layers(model)
        self.buffers = min(BUFFERS, len(weights))
        size = max(stored_bytes(tensors.values()) for tensors in weights.values())
        self.slots = [
            torch.empty(size, dtype=torch.uint8, device=device)
            for _ in range(self.buffers)
        ]
        self.copied = 0
        """Bytes copied so far."""
        self._copies = copies
        in_turn = zip(weights.values(), cycle(self.slots), strict=False)
        self._layers = [_Layer(model, tensors, slot) for tensors, slot in in_turn]
        self._slot_at = {
            slot.untyped_storage().data_ptr(): number
            for number, slot in enumerate(self.slots)
        }
        self._layer_in: list[int | None] = [None] * self.buffers
        """The layer in each buffer; its copy may still be in progress."""
        self._events: dict[int, Any] = {}
        """Layer -> event of its copy, until something has waited for it."""
        self._current: tuple[int, bool] | None = None
        """The last layer that was used, and whether in backward."""
        self._running: list[int] = []
        """The layer in forward, repeated for each of its modules in forward."""
        self._hooks: Any = nullcontext()
        self._index = _modules_of_layers(model, weights)
        copies.pin(
            tensor for tensors in weights.values() for tensor in tensors.values()
        )
        for module, index in self._index.items():
            module.register_forward_pre_hook(partial(self.before_forward, index))
            module.register_forward_hook(self.after_forward, always_call=True)

    @contextmanager
    def device_bound(self) -> Iterator[None]:
        """A context in which modules hold views, so that `nn.Module.to` does not move
        host memory."""
        for layer in self._layers:
            layer.bind_device()
        try:
            yield
        finally:
            for layer in self._layers:
                layer.bind_host()

    def invalidate(self) -> None:
        """Wait for running copies and mark all buffers as empty. Call before weights in
        host memory are written."""
        self._copies.finish()
        self._layer_in = [None] * self.buffers
        self._events.clear()
        self._current = None

    # -- contents of the buffers -------------------------------------------------------

    def _use(self, index: int) -> None:
        """Make the device wait for the copy of a layer, and prefetch the next
        layers."""
        # Whether backward is running, as in torch/autograd/graph.py
        is_backward = torch._C._current_graph_task_id() != -1
        current = (index, is_backward)
        if self._current == current:
            return
        self.copy(index)
        if index in self._events:
            self._copies.wait(self._events.pop(index))
        self._current = current
        # Prefetch into each buffer the first of the next layers that uses it.
        used = {index % self.buffers}
        for following in self._following(*current):
            if len(used) == self.buffers:
                return
            if following % self.buffers not in used:
                used.add(following % self.buffers)
                self.copy(following)

    def _following(self, index: int, backward: bool) -> Iterable[int]:
        """The next layers, in the order of their use."""
        upwards = range(len(self._layers))
        downwards = range(len(self._layers) - 1, -1, -1)
        if backward:
            return chain(downwards[len(self._layers) - index :], upwards)
        afterwards = downwards if torch.is_grad_enabled() else upwards
        return chain(upwards[index + 1 :], afterwards)

    def copy(self, index: int) -> None:
        number = index % self.buffers
        before = self._layer_in[number]
        if before == index:
            return
        if before is not None and before in self._running:
            raise RunError(
                f"--base_device host: decoder layer {index} runs within layer {before}: use --base_device device"
            )
        self._events.pop(before, None)  # type: ignore[arg-type]
        pairs = self._layers[index].pairs()
        self._events[index] = self._copies.start(pairs)
        self._layer_in[number] = index
        self.copied += sum(view.nbytes for view, _ in pairs)

    # -- forward and backward ----------------------------------------------------------

    def before_forward(self, index: int, *_: Any) -> None:
        """Pre-forward hook of a module of layer `index`, also for a forward repeated by
        checkpointing."""
        self._running.append(index)
        if len(self._running) > 1:
            return
        self._use(index)
        self._layers[index].bind_device()
        # Existing hooks are those of checkpointing, which saves no tensor of the layer
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
            self._hooks = torch.autograd.graph.saved_tensors_hooks(
                self._pack, self._unpack
            )
            self._hooks.__enter__()

    def after_forward(self, *_: Any) -> None:
        """Forward hook, also called after an error: checkpointing stops a repeated
        forward by one."""
        index = self._running.pop()
        if not self._running:
            self._hooks.__exit__(None, None, None)
            self._hooks = nullcontext()
            self._layers[index].bind_host()

    def _pack(self, tensor: Tensor) -> Tensor | tuple[int, Tensor]:
        number = self._slot_at.get(tensor.untyped_storage().data_ptr())
        index = None if number is None else self._layer_in[number]
        return tensor if index is None else (index, tensor)

    def _unpack(self, packed: Tensor | tuple[int, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        index, view = packed
        self._use(index)
        return view


def stream_base(model: Any, device: torch.device) -> LayerPrefetcher:
    """Make a model with frozen weights in host memory run on `device`, which holds a few
    decoder layers at a time. Raises `UserError` as `LayerPrefetcher` does."""
    prefetcher = LayerPrefetcher(model, device, copies_for(device))
    setattr(model, _ATTRIBUTE, prefetcher)
    return prefetcher


def names_on_host(model: Any) -> set[str]:
    """Names of the frozen tensors that `stream_base` reads from host memory."""
    return set(chain.from_iterable(weights_of_layers(model).values()))


def prefetcher_of(model: nn.Module) -> LayerPrefetcher | None:
    """The prefetcher of a model with a streamed base; None for other models."""
    return getattr(model, _ATTRIBUTE, None)


def _modules_of_layers(
    model: nn.Module, weights: dict[str, Tensors]
) -> dict[nn.Module, int]:
    """Module that contains weights of a decoder layer -> index of the layer.

    Hooks on modules inside of a layer, because transformers' checkpointing repeats a
    layer's forward without the layer's hooks (modeling_layers.py,
    `GradientCheckpointingLayer`).
    """
    indices: dict[nn.Module, int] = {}
    for index, (layer, layer_weights) in enumerate(weights.items()):
        for name in layer_weights:
            while name != layer:
                name = name.rpartition(".")[0]
                indices[model.get_submodule(name)] = index
    return indices
