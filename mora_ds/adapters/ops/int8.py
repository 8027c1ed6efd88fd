"""A frozen weight in 8 bits: integers from -127 to 127, and one scale for each output.

    quantize(W) -> values, scales       scale = max |row| / 127, value = round(W / scale): off by at most scale / 2
    Int8Weight(values, scales)          values * scales, formed for every product (`frozen`)

Shape legend:  O = d_out, D = d_in.

Plain torch: torch's `_weight_int8pack_mm` has no backward, and torchao's tensor
subclass has its own matrix products. The scheme is theirs (symmetric, one scale an
output), so that another kernel could replace `dense` in a product.

All results come from separate elementwise operations, so that every device and number
of threads gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mora_ds.adapters.ops.frozen import Maker, QuantizedWeight
from mora_ds.common.errors import RunError

LARGEST = 127

_CPU_CHUNK = 1 << 18
"""Elements that a CPU processes at a time: 1 MiB in fp32, which stays in a core's
cache."""

_DEVICE_CHUNK = 1 << 24
"""Elements that other devices process at a time: 64 MiB."""


@dataclass(frozen=True)
class Int8Weight(QuantizedWeight):
    """values (O, D) int8, maybe transposed, and scales (O,) fp32; or a stack of
    both."""

    bits: ClassVar[int] = 8

    def dense(self, dtype: torch.dtype) -> Tensor:
        """values * scales, rounded to `dtype`."""
        if self.values.dim() > 2:
            return torch.stack(
                [self[index].dense(dtype) for index in range(len(self.values))]
            )
        if self.values.is_contiguous():
            return _multiplied(self.values, self.scales.unsqueeze(1), dtype)
        return _multiplied(self.values.T, self.scales.unsqueeze(0), dtype).T

    def __getitem__(self, which: int | slice) -> Int8Weight:
        """Some matrices of a stack."""
        return Int8Weight(self.values[which], self.scales[which])

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def largest_error(self) -> float:
        return self.scales.max().item() / 2

    @property
    def maker(self) -> Maker:
        return Int8Weight


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(O, D) of any floating dtype -> values (O, D) int8, contiguous, and scales (O,)
    fp32. `weight` is not written to.

    Of a stack (E, O, D) every matrix by itself. Raises `RunError` where an element is
    not finite.
    """
    if weight.dim() > 2:
        values_of, scales_of = zip(*map(quantize, weight), strict=True)
        return torch.stack(values_of), torch.stack(scales_of)
    outputs, inputs = weight.shape
    values = torch.empty((outputs, inputs), dtype=torch.int8, device=weight.device)
    scales = torch.empty(outputs, dtype=torch.float32, device=weight.device)
    rows = _rows_at_once(weight)
    for start in range(0, outputs, rows):
        chunk = weight[start : start + rows].float()
        least, most = torch.aminmax(chunk, dim=1)
        scale = torch.maximum(most, -least)
        # The divisor is a tensor, as CUDA divides by a number by multiplying with its
        # reciprocal, which rounds otherwise
        scale = scale / torch.full_like(scale, LARGEST)
        scales[start : start + rows] = scale
        # A row of zeros stays zeros
        divisor = torch.where(scale == 0, 1, scale).unsqueeze(1)
        values[start : start + rows] = (
            (chunk / divisor).round_().clamp_(-LARGEST, LARGEST)
        )
    if not (weight.is_meta or torch.isfinite(scales).all()):
        raise RunError("a weight that is not finite cannot be held in 8 bits")
    return values, scales


def _multiplied(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    result = torch.empty(values.shape, dtype=dtype, device=values.device)
    if values.device.type != "cpu":
        # One kernel converts and multiplies
        return torch.mul(values, scales, out=result)
    rows = _rows_at_once(values)
    for start in range(0, len(values), rows):
        chunk = slice(start, start + rows)
        chunk_scales = scales[chunk] if len(scales) > 1 else scales
        torch.mul(values[chunk], chunk_scales, out=result[chunk])
    return result


def _rows_at_once(matrix: Tensor) -> int:
    elements = _CPU_CHUNK if matrix.device.type == "cpu" else _DEVICE_CHUNK
    return max(1, elements // max(1, matrix.shape[1]))
