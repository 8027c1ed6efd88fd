"""Two ways to compute a layer with a square, and which to take.

    activation   W0 x + decompress(M compress(x))             passes over the activations, cost ~ tokens
    weight       (W0 + delta_weight(M)) x                     passes over the weight, cost ~ d_in * d_out, once a pass

The weight path forms the sum in forward and again in backward, so it keeps nothing of the size of W0; the gradient of
M comes from the folded input and the folded output gradient (`square_gradient`), never from a (d_out, d_in) product.
Both are the same function of x and M. They differ in rounding: in bf16 or fp16 the weight path rounds W0 + delta to
that dtype, so that a delta smaller than half a unit in the last place of W0 does not act; AUTO takes it in fp32 only.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.operators import OperatorSpec, delta_weight, fold_input, mora_update, square_gradient

TOKENS_PER_WIDTH = 1.25
"""AUTO takes the weight path from this many tokens per (harmonic mean of d_in and d_out) on: where the two met, forward
and backward in fp32 on one core, for square layers of 192 to 2048 (`tools/bench_layer.py`)."""


class Compute(str, Enum):
    """How a layer with a square is computed."""

    AUTO = "auto"
    ACTIVATION = "activation"
    WEIGHT = "weight"


def choose(tokens: int, d_in: int, d_out: int, dtype: torch.dtype) -> Compute:
    """The cheaper path: activation passes cost tokens * (d_in + d_out), weight passes d_in * d_out.

    Low precision always takes the activation path, which loses nothing of a small delta.
    """
    if dtype in (torch.bfloat16, torch.float16):
        return Compute.ACTIVATION
    enough = tokens * (d_in + d_out) >= 2 * TOKENS_PER_WIDTH * d_in * d_out
    return Compute.WEIGHT if enough else Compute.ACTIVATION


def mora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, square: Tensor, spec: OperatorSpec, path: Compute = Compute.AUTO
) -> Tensor:
    """(..., d_in) -> (..., d_out). `weight` (d_out, d_in) is frozen; a transposed view will do."""
    if path is Compute.AUTO:
        path = choose(x.numel() // spec.d_in, spec.d_in, spec.d_out, x.dtype)
    if path is Compute.WEIGHT:
        return _WeightPath.apply(x, weight, bias, square, spec)
    return F.linear(x, weight, bias) + mora_update(spec, square, x)


class _WeightPath(torch.autograd.Function):
    """Saves the folded input for share and truncate (tokens * r_hat); for decouple and rotate, whose folded input is as
    large as the input, the input itself, which layers that read the same tensor share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, square: Tensor, spec: OperatorSpec) -> Tensor:
        ctx.spec = spec
        ctx.weight = weight
        ctx.save_for_backward(x if spec.blockwise else fold_input(spec, x), square)
        return F.linear(x, delta_weight(spec, square).add_(weight), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        saved, square = ctx.saved_tensors
        spec: OperatorSpec = ctx.spec
        g_x = g @ delta_weight(spec, square).add_(ctx.weight) if ctx.needs_input_grad[0] else None
        g_square = None
        if ctx.needs_input_grad[3]:
            g_square = square_gradient(spec, fold_input(spec, saved) if spec.blockwise else saved, g)
        return g_x, None, None, g_square, None
