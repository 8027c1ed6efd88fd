"""An adapted layer's product, by the operations of `ops`: both paths of `ops.linear`, in the fewest kernels.

    weight        forward    W' = W0 + delta, W' x, fold(x) for share
                  backward   W', g W', fold(x) for decouple and rotate, collect(g), dM
    activation    forward    fold(x), M z, W0 x, += deal(u)
                  backward   collect(g), c M, g W0, += unfold(g_z), fold(x) for decouple and rotate, dM

The folded input is rotated for rotate, so that M's gradient is one product for every operator, c^T z over all tokens
and blocks, summed in fp32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mora_ds.adapters.kernels import ops
from mora_ds.adapters.kernels.tables import KernelTables
from mora_ds.adapters.ops.frozen import Weight, dense, input_gradient, linear, maker_of, parts_of, product, weight_of
from mora_ds.adapters.ops.int8 import Int8Weight
from mora_ds.adapters.ops.linear import Compute


def kernel_linear(
    x: Tensor, weight: Weight, bias: Tensor | None, square: Tensor, tables: KernelTables, path: Compute
) -> Tensor:
    """`ops.linear.mora_linear` by kernels: (..., D) -> (..., O). Both paths save the folded input for share and
    truncate, the input itself for decouple and rotate."""
    function = _Weight if path is Compute.WEIGHT else _Activation
    y: Tensor = function.apply(x, weight, bias, square, tables)
    return y


def form_weight(weight: Weight, square: Tensor, tables: KernelTables) -> Tensor:
    """W0 + delta (O, D), contiguous, in the dtype of M. Not for merges: these round otherwise."""
    spec = tables.spec
    if isinstance(weight, Int8Weight):
        values, scales = weight.values, weight.scales
    else:
        values, scales = dense(weight, square.dtype), None
    cos, sin = tables.rotation
    blocks = (spec.blocks_in, spec.blocks_out) if spec.blocks > 1 else (1, 1)
    formed: Tensor = ops.form(values, scales, square, tables.unfold, tables.deal, tables.members, cos, sin, *blocks)
    return formed


def _fold(x: Tensor, tables: KernelTables) -> Tensor:
    """(T, D) -> (T, N * R), rotated for rotate."""
    folded: Tensor = ops.gather_sum(x, tables.fold, *tables.rotation, False)
    return folded


def _collect(g: Tensor, tables: KernelTables) -> Tensor:
    """(T, O) -> (T * N, R)."""
    collected: Tensor = ops.gather_sum(g, tables.collect, None, None, False)
    return collected.view(-1, tables.spec.r_hat)


def _square_gradient(c: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    gradient: Tensor = ops.sum_parts(ops.product(c, z.view(c.shape)), dtype)
    return gradient


def _flat(x: Tensor) -> Tensor:
    """(..., D) -> (T, D), contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, square: Tensor, tables: KernelTables
    ) -> Tensor:
        saved = x if tables.spec.blocks > 1 else _fold(_flat(x), tables)
        ctx.tables, ctx.make = tables, maker_of(weight)
        ctx.save_for_backward(saved, square, *parts_of(weight))
        return linear(x, form_weight(weight, square, tables), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,), tables = gradients, ctx.tables
        saved, square, *parts = ctx.saved_tensors
        g_x = g_square = None
        if ctx.needs_input_grad[0]:
            g_x = g @ form_weight(weight_of(ctx.make, *parts), square, tables)
        if ctx.needs_input_grad[3]:
            z = _fold(_flat(saved), tables) if tables.spec.blocks > 1 else saved
            g_square = _square_gradient(_collect(_flat(g), tables), z, square.dtype)
        return g_x, None, None, g_square, None


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, square: Tensor, tables: KernelTables
    ) -> Tensor:
        z = _fold(_flat(x), tables)
        ctx.tables, ctx.make = tables, maker_of(weight)
        ctx.save_for_backward(x if tables.spec.blocks > 1 else z, square, *parts_of(weight))
        u = z.view(-1, tables.spec.r_hat) @ square.T
        y = product(x, weight, bias)
        ops.gather_add_(y.view(-1, y.shape[-1]), u.view(z.shape), tables.deal, None, None, False)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,), tables = gradients, ctx.tables
        saved, square, *parts = ctx.saved_tensors
        c = _collect(_flat(g), tables)
        g_x = g_square = None
        if ctx.needs_input_grad[0]:
            g_x = input_gradient(g, weight_of(ctx.make, *parts))
            g_z = (c @ square).view(-1, tables.fold.shape[1])
            ops.gather_add_(g_x.view(-1, g_x.shape[-1]), g_z, tables.unfold, *tables.rotation, True)
        if ctx.needs_input_grad[3]:
            z = _fold(_flat(saved), tables) if tables.spec.blocks > 1 else saved
            g_square = _square_gradient(c, z, square.dtype)
        return g_x, None, None, g_square, None
