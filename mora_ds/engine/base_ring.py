"""A base that stays in host memory: the device holds the weights of a few decoder
layers, copied there in turn.

    forward     layer 0, 1, ..., L-1        while layer i computes, the layers i+1 ... i+N-1 are copied
    backward    L-1, ..., 0                 the same downwards; then 0 ... N-1 for the next forward
    slots       layer i is always in buffer i mod N

Outside of a layer's forward its modules hold the tensors in host memory, which merges
write, checksums read and every rank of a node may share. While a layer runs they hold
views into its buffer instead. What autograd saves of a weight is such a view. As a
layer's buffer is always the same, the view is right whenever the layer is there, and a
hook on saved tensors brings it there when backward asks for it. Gradient checkpointing
has such hooks of its own and runs the layer's modules again, which brings it there as
well. Copies leave autograd's version counters alone (`Tensor.data`).

With N buffers a micro-batch copies L - N layers in each direction, the fewest possible:
backward finds the last N there, and forward the first N.
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

_RING = "_mora_ring"
"""The attribute of a model that holds its ring."""


class _Layer:
    """A decoder layer's frozen tensors: in its modules, and in its buffer."""

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
        """The tensors in host memory that `show` has replaced, to be put back."""

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(view, tensor in host memory) of each tensor, as the modules hold them
        now."""
        by_view = {
            id(view): (view.data, buffers[key]) for buffers, key, view in self.entries
        }
        return list(by_view.values())

    def show(self) -> None:
        """Let the modules hold the views."""
        self._hosts = [buffers[key] for buffers, key, _ in self.entries]
        for buffers, key, view in self.entries:
            buffers[key] = view

    def hide(self) -> None:
        """Undo `show`."""
        for (buffers, key, _), host in zip(self.entries, self._hosts, strict=False):
            buffers[key] = host
        self._hosts = []


class BaseRing:
    """The buffers of one model, and which layer each of them holds."""

    def __init__(self, model: Any, device: torch.device, copies: Copies) -> None:
        """Raises `UserError` without decoder layers, and if memory cannot be locked."""
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
        """The layer that each buffer holds, or is to hold once its copy has ended."""
        self._tickets: dict[int, Any] = {}
        """Layer -> its copy, until something waits for it."""
        self._now: tuple[int, bool] | None = None
        """The layer that was asked for last, and whether in backward."""
        self._running: list[int] = []
        """The layer whose forward is running, once for each of its modules that is."""
        self._hooks: Any = nullcontext()
        self._index = _modules_of_layers(model, weights)
        copies.pin(
            tensor for tensors in weights.values() for tensor in tensors.values()
        )
        for module, index in self._index.items():
            module.register_forward_pre_hook(partial(self.enter, index))
            module.register_forward_hook(self.leave, always_call=True)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within, modules hold views, so that `nn.Module.to` moves no host memory."""
        for layer in self._layers:
            layer.show()
        try:
            yield
        finally:
            for layer in self._layers:
                layer.hide()

    def forget(self) -> None:
        """To be called before weights in host memory are written: waits for copies of
        them, and makes new ones when they are needed again."""
        self._copies.finish()
        self._layer_in = [None] * self.buffers
        self._tickets.clear()
        self._now = None

    # -- which layer is where ----------------------------------------------------------

    def _use(self, index: int) -> None:
        """Order the device after the copy of a layer, and copy those that come next."""
        # torch/autograd/graph.py tells by this that backward runs
        is_backward = torch._C._current_graph_task_id() != -1
        now = (index, is_backward)
        if self._now == now:
            return
        self.copy(index)
        if index in self._tickets:
            self._copies.wait(self._tickets.pop(index))
        self._now = now
        # The layers that come next go into the buffers that none before them needs.
        used = {index % self.buffers}
        for following in self._following(*now):
            if len(used) == self.buffers:
                return
            if following % self.buffers not in used:
                used.add(following % self.buffers)
                self.copy(following)

    def _following(self, index: int, backward: bool) -> Iterable[int]:
        """The layers after this one, in the order in which they will be asked for."""
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
                f"--base_device host: decoder layer {index} runs within layer {before}: use device"
            )
        self._tickets.pop(before, None)  # type: ignore[arg-type]
        pairs = self._layers[index].pairs()
        self._tickets[index] = self._copies.start(pairs)
        self._layer_in[number] = index
        self.copied += sum(view.nbytes for view, _ in pairs)

    # -- forward and backward ----------------------------------------------------------

    def enter(self, index: int, *_: Any) -> None:
        """Before a module of layer `index` runs, the first time or for
        checkpointing."""
        self._running.append(index)
        if len(self._running) > 1:
            return
        self._use(index)
        self._layers[index].show()
        # Hooks that are there already are those of checkpointing, which saves no tensor
        # of the layer
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
            self._hooks = torch.autograd.graph.saved_tensors_hooks(
                self._pack, self._unpack
            )
            self._hooks.__enter__()

    def leave(self, *_: Any) -> None:
        """After it, also where it has raised: checkpointing ends a repeated forward
        so."""
        index = self._running.pop()
        if not self._running:
            self._hooks.__exit__(None, None, None)
            self._hooks = nullcontext()
            self._layers[index].hide()

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


def stream_base(model: Any, device: torch.device) -> BaseRing:
    """Let a model whose frozen weights are in host memory run on `device`, with those
    of a few decoder layers there. Raises `UserError` as `BaseRing` does."""
    ring = BaseRing(model, device, copies_for(device))
    setattr(model, _RING, ring)
    return ring


def names_on_host(model: Any) -> set[str]:
    """Names of the frozen tensors that `stream_base` takes from host memory."""
    return set(chain.from_iterable(weights_of_layers(model).values()))


def ring_of(model: nn.Module) -> BaseRing | None:
    """The ring of a model whose base is streamed, else None."""
    return getattr(model, _RING, None)


def _modules_of_layers(
    model: nn.Module, weights: dict[str, Tensors]
) -> dict[nn.Module, int]:
    """Module with weights of a decoder layer in it -> index of the layer.

    transformers' checkpointing runs a layer's forward again without the hooks of the
    layer itself (modeling_layers.py, `GradientCheckpointingLayer`), but with those of
    the modules in it.
    """
    indices: dict[nn.Module, int] = {}
    for index, (layer, layer_weights) in enumerate(weights.items()):
        for name in layer_weights:
            while name != layer:
                name = name.rpartition(".")[0]
                indices[model.get_submodule(name)] = index
    return indices
