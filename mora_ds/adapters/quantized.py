"""Layers whose frozen weight is held in 8 or 4 bits: which they are, and the bytes of
them and of their merges."""

import math

from torch import nn

from mora_ds.adapters.config import AS_LOADED
from mora_ds.adapters.layer import AdaptedLinear, mora_layers
from mora_ds.adapters.nf4 import NF4Weight
from mora_ds.adapters.ops.int8 import Int8Weight


def quantized_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Module name -> layer whose weight is held in 8 or 4 bits."""
    return {
        name: layer
        for name, layer in mora_layers(model).items()
        if layer.weight_scales is not None
    }


def base_bits_of(model: nn.Module) -> int:
    """In how many bits adapted weights are held; `AS_LOADED` where they are dense."""
    for layer in quantized_layers(model).values():
        return NF4Weight.bits if layer.is_packed else Int8Weight.bits
    return AS_LOADED


def quantized_bytes(model: nn.Module) -> int:
    """Bytes of the weights in 8 or 4 bits, with their scales."""
    layers = quantized_layers(model).values()
    return sum(
        layer.weight.nbytes + layer.get_buffer("weight_scales").nbytes
        for layer in layers
    )


def merge_bytes(model: nn.Module) -> int:
    """Bytes that each merged cycle adds on every rank, where weights in 4 bits do not
    take it up: its values, and index tables of its own permutations."""
    return sum(
        math.prod(layer.spec.adapter_weight_shape) * layer.dtype.itemsize
        + layer.spec.table_bytes
        for layer in mora_layers(model).values()
        if layer.is_packed
    )
