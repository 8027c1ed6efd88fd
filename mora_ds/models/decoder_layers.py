"""The decoder layers of a model, and the frozen weights that belong to each alone: what
can be held layer by layer.

find_decoder_layers(model)  name -> layer, in the order in which they run
weights_of_layers(model)    name of a layer -> (name -> frozen tensor)
stored_bytes(tensors)       bytes of a buffer for them; `offsets` says where each lies in it
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from mora_ds.adapters.inject import frozen_buffers
from mora_ds.adapters.tp_plan import text_config
from mora_ds.common.errors import UserError
from mora_ds.common.tensor_files import Tensors

_ALIGNMENT = 256
LINE = 64
"""Bytes: the places of tensors in a buffer are multiples of the first, as in CUDA's
allocator. On a CPU a tensor keeps its place within a cache line, the second: a matrix
product may round otherwise at another one."""


def find_decoder_layers(model: Any) -> dict[str, nn.Module]:
    """The entries of the model's list of decoder layers: the `nn.ModuleList` with
    num_hidden_layers entries; of several the one with most frozen elements. Nothing for
    a model that has none."""
    count = _count(model)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    frozen = frozen_buffers(model)

    def elements(name: str) -> int:
        inside = [buffer for buffer in frozen if buffer.startswith(f"{name}.")]
        return sum(frozen[buffer].numel() for buffer in inside)

    chosen = max(lists, key=elements, default=None)
    if chosen is None:
        return {}
    return {f"{chosen}.{index}": layer for index, layer in enumerate(lists[chosen])}


def _count(model: Any) -> int:
    """num_hidden_layers of a transformers model; 0 for another one."""
    return getattr(text_config(model), "num_hidden_layers", 0)


def weights_of_layers(model: Any) -> dict[str, Tensors]:
    """For each decoder layer in turn: its name -> (name in the model -> frozen tensor).

    Left out: tensors that something outside of the layer uses, too. Raises `UserError`
    for a model without decoder layers, or whose layers have no frozen weights of their
    own.
    """
    layers = find_decoder_layers(model)
    if not layers:
        raise UserError(
            f"--base_device host: {type(model).__name__} has no list of {_count(model)} decoder layers, whose weights "
            "could be held in turn: use --base_device device"
        )
    frozen = frozen_buffers(model)
    owners: dict[str, str] = {}
    for layer in layers:
        owners.update({name: layer for name in frozen if name.startswith(f"{layer}.")})
    uses = Counter(
        (id(tensor), owners.get(name, "")) for name, tensor in frozen.items()
    )
    users = Counter(tensor for tensor, _ in uses)
    weights: dict[str, Tensors] = {}
    for name, layer in owners.items():
        if users[id(frozen[name])] == 1:
            weights.setdefault(layer, {})[name] = frozen[name]
    if not weights:
        raise UserError(
            f"--base_device host: the decoder layers of {type(model).__name__} share their weights: use --base_device "
            "device"
        )
    return weights


def within_line(tensor: Tensor) -> int:
    """Bytes from the start of a cache line to the tensor, in whole elements."""
    if tensor.is_meta:
        return 0
    return tensor.data_ptr() % LINE // tensor.itemsize * tensor.itemsize


def offsets(tensors: Iterable[Tensor]) -> tuple[dict[int, int], int]:
    """(id of a tensor -> its first byte in a buffer for all, bytes of the buffer)."""
    starts: dict[int, int] = {}
    size = 0
    for tensor in tensors:
        if id(tensor) not in starts:
            starts[id(tensor)] = size + within_line(tensor)
            size += (
                -(-(extent(tensor) * tensor.itemsize + LINE) // _ALIGNMENT) * _ALIGNMENT
            )
    return starts, size


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of a buffer that holds each of these tensors once."""
    return offsets(tensors)[1]


def extent(tensor: Tensor) -> int:
    """Elements of memory from a tensor's first to its last one, in its own strides."""
    if not tensor.numel():
        return 0
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in sides)
