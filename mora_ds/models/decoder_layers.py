"""The decoder layers of a model, and the frozen weights that only one layer uses. These
can be copied to the device layer by layer.

find_decoder_layers(model)  name -> layer, in execution order
weights_of_layers(model)    name of a layer -> (name -> frozen tensor)
stored_bytes(tensors)       size of a buffer for tensors, in bytes; `offsets`: their positions in it
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from mora_ds.adapters.inject import frozen_buffers
from mora_ds.common.errors import UserError
from mora_ds.common.tensor_files import Tensors

_ALIGNMENT = 256
LINE = 64
"""In bytes. Tensors in a buffer are aligned to `_ALIGNMENT`, as by CUDA's allocator. A
tensor keeps its offset within a CPU cache line of `LINE` bytes, because matrix products
may round differently at another offset."""


def find_decoder_layers(model: Any) -> dict[str, nn.Module]:
    """Name -> decoder layer: the entries of the `nn.ModuleList` with num_hidden_layers
    entries; if there are several, of the one with most frozen elements. Empty if there
    is none."""
    count = _layer_count(model)
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


def _layer_count(model: Any) -> int:
    """num_hidden_layers of a transformers model; 0 for other models."""
    return getattr(text_config(model), "num_hidden_layers", 0)


def weights_of_layers(model: Any) -> dict[str, Tensors]:
    """Name of a decoder layer -> (name in the model -> frozen tensor), in execution
    order.

    Excludes tensors that are also used outside of the layer. Raises `UserError` for a
    model without decoder layers, and if no layer has such weights.
    """
    layers = find_decoder_layers(model)
    if not layers:
        raise UserError(
            f"--base_device host: {type(model).__name__} has no list of {_layer_count(model)} decoder layers that "
            "could be copied one by one: use --base_device device"
        )
    frozen = frozen_buffers(model)
    owners: dict[str, str] = {}
    for layer in layers:
        owners.update({name: layer for name in frozen if name.startswith(f"{layer}.")})
    users: dict[int, set[str]] = {}
    for name, tensor in frozen.items():
        users.setdefault(id(tensor), set()).add(owners.get(name, ""))
    weights: dict[str, Tensors] = {}
    for name, layer in owners.items():
        if len(users[id(frozen[name])]) == 1:
            weights.setdefault(layer, {})[name] = frozen[name]
    if not weights:
        raise UserError(
            f"--base_device host: the decoder layers of {type(model).__name__} share their weights: use --base_device "
            "device"
        )
    return weights


def within_line(tensor: Tensor) -> int:
    """Offset of the tensor in its cache line, in bytes, rounded down to elements."""
    if tensor.is_meta:
        return 0
    return tensor.data_ptr() % LINE // tensor.itemsize * tensor.itemsize


def offsets(tensors: Iterable[Tensor]) -> tuple[dict[int, int], int]:
    """(id of a tensor -> its offset in a buffer for all, size of the buffer), in
    bytes."""
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
    """Size in bytes of a buffer with each of these tensors once."""
    return offsets(tensors)[1]


def extent(tensor: Tensor) -> int:
    """Number of elements in memory from a tensor's first to its last element, by its
    strides."""
    if not tensor.numel():
        return 0
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in sides)


def text_config(model: nn.Module) -> Any:
    """The config of a model, or of its language model; None where it has none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
