"""The product of a layer that has a MoRA matrix, computed in one of two ways.

    activation   W0 x + decompress(M compress(x))             works on the activations: cost ~ tokens
    weight       (W0 + delta_weight(M)) x                     works on the weight: cost ~ d_in * d_out in each direction

The weight path forms the sum in forward and again in backward, so that nothing of the
size of W0 is saved; the gradient of M comes from the folded input and the folded output
gradient (`mora_matrix_gradient`), not from a (d_out, d_in) product. Both are the same
function of x and M. They differ in rounding: in bf16 or fp16 the weight path rounds W0
+ delta to that dtype, as mixed-precision training of full weights does, so that a delta
smaller than half a unit in the last place of W0 has no effect until it has grown; the
gradient of M is that of the sum. A quantized weight is made dense for each product of
either path, and freed after it (`frozen`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mora_ds.adapters.ops.frozen import Weight
from mora_ds.adapters.ops.mora import (
    Maps,
    add_blocks_,
    add_input_gradient_,
    add_update_,
    decompress_transpose,
    fold_input,
    mora_matrix_gradient,
    rows_and_slots,
    sums_by_product,
)


class Compute(str, Enum):
    """How a layer with a MoRA matrix is computed."""

    AUTO = "auto"
    ACTIVATION = "activation"
    WEIGHT = "weight"


def cheaper_path(tokens: int, d_in: int, d_out: int) -> Compute:
    """The path of a layer whose path is AUTO, when it is called with this number of tokens.

    It has the less work of what only one of the paths does, in each direction:

        weight        W0 + delta is formed: d_in * d_out numbers are read, added and written
        activation    tokens * (d_in + d_out) numbers are gathered or added, and multiplied by M: two operations each

    Sizes alone decide, never a measurement, a device or a dtype, because the paths
    round differently: the same command computes the same bits on every rank and in
    every resumed run.
    """
    formed = d_in * d_out
    moved = 2 * tokens * (d_in + d_out)
    return Compute.WEIGHT if formed <= moved else Compute.ACTIVATION


def mora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    mora_matrix: Tensor,
    products: LayerProducts,
    compute: Compute,
) -> Tensor:
    """(..., d_in) -> (..., d_out), by the steps of `products`. `weight` (d_out, d_in) is
    frozen; a transposed view will do."""
    if x.dim() == 1:
        rows = mora_linear(x.unsqueeze(0), weight, bias, mora_matrix, products, compute)
        return rows.squeeze(0)
    if compute is Compute.AUTO:
        # Those that this process computes
        d_in = products.spec.d_in
        compute = cheaper_path(x.numel() // d_in, d_in, products.spec.d_out)
    by_weight = compute is Compute.WEIGHT
    return MoRALinearFunction.apply(x, weight, bias, mora_matrix, products, by_weight)


class MoRALinearFunction(torch.autograd.Function):
    """The layer's product and its gradients, on either path. The activation path adds
    the update to W0 x in place, so that no second tensor of that size is made."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        mora_matrix: Tensor,
        products: LayerProducts,
        by_weight: bool,
    ) -> Tensor:
        ctx.products = products
        ctx.by_weight = by_weight
        saved = products.saved_input(x)
        # The frozen weight too: where the base is streamed, hooks on saved tensors
        # bring it to the device
        if isinstance(weight, Tensor):
            ctx.make = None
            ctx.save_for_backward(saved, mora_matrix, weight, None)
        else:
            ctx.make = weight.maker
            ctx.save_for_backward(saved, mora_matrix, weight.values, weight.scales)
        full = products.full(mora_matrix)
        if by_weight:
            y = F.linear(x, products.effective_weight(weight, full), bias)
        else:
            y = products.output(x, weight, bias, full, saved)
        # A view, which torch returns with a bias, may not be changed in place, as
        # transformers/models/roc_bert does
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        products: LayerProducts = ctx.products
        saved, mora_matrix, values, scales = ctx.saved_tensors
        weight = values if ctx.make is None else ctx.make(values, scales)
        collected = None if ctx.by_weight else products.collect_once(g)
        g_x = g_mora_matrix = None
        if ctx.needs_input_grad[0]:
            full = products.full(mora_matrix)
            if ctx.by_weight:
                g_x = g @ products.effective_weight(weight, full)
            else:
                g_x = products.input_gradient(g, weight, full, collected)
        if ctx.needs_input_grad[3]:
            g_full = products.mora_matrix_gradient(saved, g, collected, ctx.by_weight)
            g_mora_matrix = products.share_of_gradient(g_full)
        return g_x, None, None, g_mora_matrix, None, None


@dataclass
class LayerProducts:
    """The steps of both paths for one operator, in plain torch (`kernels.linear` has
    them by kernels)."""

    spec: Maps

    def full(self, mora_matrix: Tensor) -> Tensor:
        """M (R, R), from the parameter, which may be a shard of it."""
        return mora_matrix

    def share_of_gradient(self, gradient: Tensor) -> Tensor:
        """The parameter's gradient, from this process's dL/dM (R, R)."""
        return gradient

    def saved_input(self, x: Tensor) -> Tensor:
        """What forward saves of x (..., D) for M's gradient: the folded input
        (..., 1, R) where M is applied once. That of several blocks is as large as x
        itself, which is saved in its place: layers that read one tensor share it."""
        return fold_input(self.spec, x) if self.spec.blocks == 1 else x

    def effective_weight(self, weight: Weight, mora_matrix: Tensor) -> Tensor:
        """weight + delta (O, D), contiguous, in the dtype of M."""
        dense = (
            weight if isinstance(weight, Tensor) else weight.dense(mora_matrix.dtype)
        )
        if self.spec.blocks > 1:
            total = mora_matrix.new_empty(dense.shape).copy_(dense)
            return add_blocks_(total, self.spec, mora_matrix)
        tables = self.spec.tables(mora_matrix.device)
        rows, slots = rows_and_slots(tables.spread, tables.unfold(mora_matrix))
        return rows.index_select(0, slots).add_(dense)

    def output(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        mora_matrix: Tensor,
        saved: Tensor,
    ) -> Tensor:
        """W0 x + b + decompress(M compress(x)) (..., O). `saved`: `saved_input` of
        x."""
        if isinstance(weight, Tensor):
            y = F.linear(x, weight, bias)
        else:
            y = weight.product(x, bias)
        return add_update_(y, self.spec, mora_matrix, saved)

    def collect_once(self, g: Tensor) -> Tensor | None:
        """The output gradient g (..., O) collected to the rows of M, where both
        gradients of the activation path read that; None where they read g itself."""
        if self.spec.blocks > 1 or sums_by_product(g):
            return None
        return decompress_transpose(self.spec, g)

    def input_gradient(
        self,
        g: Tensor,
        weight: Weight,
        mora_matrix: Tensor,
        collected: Tensor | None,
    ) -> Tensor:
        """g W0 + the update's transpose of g: (..., O) -> (..., D)."""
        if isinstance(weight, Tensor):
            g_x = g @ weight
        else:
            g_x = weight.input_gradient(g)
        return add_input_gradient_(g_x, self.spec, mora_matrix, g, collected)

    def mora_matrix_gradient(
        self,
        saved: Tensor,
        g: Tensor,
        collected: Tensor | None,
        by_weight: bool,
    ) -> Tensor:
        """dL/dM (R, R). `by_weight`: on the weight path, without `collected`."""
        if collected is not None:
            return collected.flatten(0, -2).T @ saved.flatten(0, -2)
        form_dense = by_weight and sums_by_product(g)
        return mora_matrix_gradient(self.spec, saved, g, form_dense)
