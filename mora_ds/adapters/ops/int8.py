"""A frozen weight in 8 bits: integers from -127 to 127, and one scale for each output.

    quantize(W) -> values, scales       scale = max |row| / 127, value = round(W / scale): off by at most scale / 2
    dense(weight, dtype)                values * scales, formed for every product, in forward and in backward
    frozen_linear(x, weight, bias)      keeps nothing for backward but the weight itself, neither its dense form nor x

Shape legend:  O = d_out, D = d_in.

Plain torch, because the libraries' kernels are made for inference: torch's `_weight_int8pack_mm` has no backward, and
torchao's tensor subclass has its own matrix products, where here the update is added to the weight first. The scheme is
theirs (symmetric, one scale an output), so that another kernel could replace `dense` in a product.

All results come from separate elementwise operations, so that every device and number of threads gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.common.errors import RunError, UserError

LARGEST = 127

_CHUNK = {"cpu": 1 << 18}
"""Elements that are processed at a time on a CPU: 1 MiB in fp32, which stays in a core's cache."""

_CHUNK_OF_DEVICES = 1 << 24
"""Elements on other devices: 64 MiB."""


@dataclass(frozen=True)
class Int8Weight:
    """values (O, D) int8, which may be a transposed view, and scales (O,) fp32; or a stack of both."""

    values: Tensor
    scales: Tensor


Weight: TypeAlias = Tensor | Int8Weight
"""A frozen weight (O, D), dense or in 8 bits."""


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(O, D) of any floating dtype -> values (O, D) int8, contiguous, and scales (O,) fp32. `weight` is not written to.

    Of a stack (E, O, D) every matrix by itself. Raises `RunError` where an element is not finite.
    """
    if weight.dim() > 2:
        parts = [quantize(part) for part in weight]
        return torch.stack([values for values, _ in parts]), torch.stack([scales for _, scales in parts])
    outputs, inputs = weight.shape
    values = torch.empty((outputs, inputs), dtype=torch.int8, device=weight.device)
    scales = torch.empty(outputs, dtype=torch.float32, device=weight.device)
    rows = _rows_at_once(weight)
    for start in range(0, outputs, rows):
        part = weight[start : start + rows].float()
        least, most = torch.aminmax(part, dim=1)
        scale = torch.maximum(most, -least)
        # A tensor as divisor: by a number, CUDA multiplies with its reciprocal, which rounds otherwise.
        scale = scale / torch.full_like(scale, LARGEST)
        scales[start : start + rows] = scale
        divisor = torch.where(scale == 0, 1, scale).unsqueeze(1)  # a row of zeros
        values[start : start + rows] = (part / divisor).round_().clamp_(-LARGEST, LARGEST)
    if not (weight.is_meta or torch.isfinite(scales).all()):
        raise RunError("a weight that is not finite cannot be held in 8 bits")
    return values, scales


def parts_of(weight: Weight) -> tuple[Tensor, Tensor | None]:
    """What an autograd function saves of a weight, by `save_for_backward`: where the base is streamed, hooks on saved
    tensors bring it to the device."""
    return (weight, None) if isinstance(weight, Tensor) else (weight.values, weight.scales)


def weight_of(values: Tensor, scales: Tensor | None) -> Weight:
    """The weight of these parts."""
    return values if scales is None else Int8Weight(values, scales)


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight (O, D) to multiply by: a dense one itself, else values * scales rounded to `dtype`, a new tensor."""
    if isinstance(weight, Tensor):
        return weight
    if weight.values.dim() > 2:
        pairs = zip(weight.values, weight.scales, strict=True)
        return torch.stack([dense(Int8Weight(values, scales), dtype) for values, scales in pairs])
    if weight.values.is_contiguous():
        return _multiplied(weight.values, weight.scales.unsqueeze(1), dtype)
    return _multiplied(weight.values.T, weight.scales.unsqueeze(0), dtype).T


def _multiplied(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    result = torch.empty(values.shape, dtype=dtype, device=values.device)
    if values.device.type != "cpu":  # one kernel, which converts as well
        return torch.mul(values, scales, out=result)
    rows = _rows_at_once(values)
    for start in range(0, len(values), rows):
        part = slice(start, start + rows)
        torch.mul(values[part], scales[part] if len(scales) > 1 else scales, out=result[part])
    return result


def _rows_at_once(matrix: Tensor) -> int:
    return max(1, _CHUNK.get(matrix.device.type, _CHUNK_OF_DEVICES) // max(1, matrix.shape[1]))


def check_floating(x: Tensor, weight: Weight) -> None:
    """Raises `UserError` where a model has cast activations to the dtype of a layer's weight, and that is int8."""
    if isinstance(weight, Int8Weight) and not x.is_floating_point():
        raise UserError(f"--base_bits 8: this model casts activations to the dtype of a layer's weight, here {x.dtype}")


def frozen_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """W x + b for a frozen W: (..., D) -> (..., O)."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    return _FrozenLinear.apply(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    """Forms the dense weight again in backward, as saving it would cost the memory that 8 bits save."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(*parts_of(weight))
        return F.linear(x, dense(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        return g @ dense(weight_of(*ctx.saved_tensors), g.dtype), None, None
