"""Products of rows with the matrices of a stack, every row with one of them: what the
experts of a mixture compute.

    grouped_linear(x, W, ends)      rows ends[e - 1] .. ends[e] - 1 of x through W[e]: (S, D) -> (S, O)

Shape legend:  S = rows, sorted by their matrix, E = matrices, O = d_out, D = d_in.

On GPUs torch's grouped product in bf16, which reads `ends` on the device; elsewhere a
product for each matrix that has rows. Only the gradients that are wanted are computed,
and a frozen stack saves no rows for backward. A stack in 8 bits is formed for every
product, in forward and in backward (`ops.frozen`).
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.adapters.ops.frozen import Weight, dense
from mora_ds.adapters.ops.int8 import Int8Weight

_ALIGNMENT = 16
"""Bytes of which rows must be a multiple for torch's grouped product."""


def grouped_linear(x: Tensor, stack: Weight, ends: Tensor) -> Tensor:
    """(S, D) -> (S, O). `stack`: (E, O, D), dense or in 8 bits; `ends`: (E,) int32,
    where the rows of each matrix end.

    A dense stack that is a parameter gets its gradient."""
    if isinstance(stack, Tensor):
        return GroupedLinearFunction.apply(x, stack, None, ends)
    return GroupedLinearFunction.apply(x, stack.values, stack.scales, ends)


class GroupedLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        scales: Tensor | None,
        ends: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None, values, scales, ends
        )
        return _rows_through(x, _stack_of(values, scales), ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        g = gradients[0].contiguous()
        x, values, scales, ends = ctx.saved_tensors
        g_rows = g_stack = None
        if ctx.needs_input_grad[0]:
            g_rows = _rows_through(g, _stack_of(values, scales), ends, back=True)
        if x is not None:
            g_stack = _outer(g, x, ends)
        return g_rows, g_stack, None, None


def _stack_of(values: Tensor, scales: Tensor | None) -> Tensor | Int8Weight:
    return values if scales is None else Int8Weight(values, scales)


def _factors(
    stack: Tensor | Int8Weight,
    which: int | slice,
    dtype: torch.dtype,
    back: bool,
) -> Tensor:
    """What rows are multiplied by: transposed matrices, with `back` as they are."""
    formed = dense(stack[which], dtype)
    return formed if back else formed.mT


def _rows_through(
    x: Tensor,
    stack: Tensor | Int8Weight,
    ends: Tensor,
    back: bool = False,
) -> Tensor:
    """(S, D) -> (S, O), with `back` (S, O) -> (S, D)."""
    _, outputs, inputs = stack.shape
    width = inputs if back else outputs
    if x.is_meta:
        # Called for a plan, which counts the memory of a stack that is formed
        _factors(stack, slice(None), x.dtype, back)
        return x.new_empty(len(x), width)
    if has_kernel(x, width):
        factors = _factors(stack, slice(None), x.dtype, back)
        return F.grouped_mm(x.contiguous(), factors, offs=ends)
    result = x.new_empty(len(x), width)
    for index, rows in _runs(ends):
        torch.mm(x[rows], _factors(stack, index, x.dtype, back), out=result[rows])
    return result


def _outer(g: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The sum over its rows of g_s x_s^T for every matrix: (S, N), (S, K) ->
    (E, N, K)."""
    if x.is_meta:
        return x.new_empty(len(ends), g.shape[1], x.shape[1])
    if has_kernel(x, g.shape[1]):
        return F.grouped_mm(g.mT, x.contiguous(), offs=ends)
    result = x.new_zeros(len(ends), g.shape[1], x.shape[1])
    for index, rows in _runs(ends):
        torch.mm(g[rows].T, x[rows], out=result[index])
    return result


def has_kernel(x: Tensor, width: int) -> bool:
    """Whether torch (from 2.10 on) has a grouped product for rows x and results of this
    width: in bf16, for GPUs from sm_80 on."""
    sizes = (x.shape[-1], width)
    return (
        x.device.type == "cuda"
        and hasattr(F, "grouped_mm")
        and x.dtype is torch.bfloat16
        and all(size * x.dtype.itemsize % _ALIGNMENT == 0 for size in sizes)
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def _runs(ends: Tensor) -> list[tuple[int, slice]]:
    """Each matrix that has rows, with them. Reads `ends` on the host."""
    pairs = enumerate(pairwise([0, *ends.tolist()]))
    return [
        (index, slice(start, stop)) for index, (start, stop) in pairs if stop > start
    ]
