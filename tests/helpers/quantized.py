"""Layers over a base of few bits: what the tests of 8 and of 4 bits share."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mora_ds.adapters.layer import AdaptedLinear
from mora_ds.adapters.ops.lora import LoRASpec
from tests.helpers.operators import random

LORA = [LoRASpec(12, 9, 3, 6.0), LoRASpec(7, 20, 2, 4.0)]


def base_of(spec: Any, conv: bool, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A linear layer of the sides of `spec`, stored transposed with `conv`."""
    base = Conv1D(spec.d_out, spec.d_in) if conv else nn.Linear(spec.d_in, spec.d_out)
    weight = random(spec.d_out, spec.d_in, seed=2)
    base.weight.data = (weight.T.contiguous() if conv else weight).to(dtype)
    base.bias.data = random(spec.d_out, seed=3).to(dtype)
    return base


def in_bits(layer: AdaptedLinear, bits: int) -> AdaptedLinear:
    """The layer with its frozen weight in so many bits."""
    layer.quantize(layer.weight, bits)
    return layer


def found_by(layer: Any, spec: Any) -> tuple[Tensor, ...]:
    """y, dL/dx, dL/dM."""
    dtype = layer.value.dtype
    x = random(2, 3, spec.d_in).to(dtype).requires_grad_()
    g = random(2, 3, spec.d_out, seed=4).to(dtype)
    y = layer(x)
    return (y, *torch.autograd.grad(y, (x, layer.value), g))
