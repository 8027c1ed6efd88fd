"""Linear maps of the last dimension that operators are made of: gathers, sums and
rotations, without parameters.

Shape legend:  D = inputs, R = r_hat, N = blocks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LOW_PRECISION = (torch.bfloat16, torch.float16)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x[..., index], with x as a matrix, from which a CPU gathers up to five times
    faster."""
    flat = x.reshape(-1, x.shape[-1])
    return flat.index_select(1, index).view(*x.shape[:-1], len(index))


def on_cpu(x: Tensor) -> bool:
    """Whether x is computed with as a CPU likes it: from memory that stays in its
    cache."""
    return x.device.type == "cpu"


def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """RoPE of the last dimension in half-split pairs, as in Llama: (x1, x2) -> (x1 cos - x2
    sin, x2 cos + x1 sin); with `back` the inverse. `cos` and `sin` (..., 2, R / 2) of
    `signed`, for x (..., R). Few operations, as each of them costs more to start than to
    compute where matrices are small."""
    halves = x.unflatten(-1, (2, -1))
    turned = halves * cos
    crossed = halves.flip(-2) * sin
    return (turned.sub_(crossed) if back else turned.add_(crossed)).flatten(-2)


def add_rotated_(total: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """total (..., R) + `rotate` of x, in place, rounded as the CPU likes."""
    summed = total.unflatten(-1, (2, -1))
    halves = x.unflatten(-1, (2, -1))
    summed.addcmul_(halves, cos)
    first, second = halves.unbind(-2)
    minus_sin, plus_sin = sin.unbind(-2)
    summed.select(-2, 0).addcmul_(second, minus_sin)
    summed.select(-2, 1).addcmul_(first, plus_sin)


def signed(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(..., R / 2) each -> what `rotate` multiplies both halves by, (..., 2, R / 2): the
    cosines twice, as a CPU multiplies by one long run faster than by two short ones."""
    return torch.stack((cos, cos), dim=-2), torch.stack((-sin, sin), dim=-2)


def linear_map(
    x: Tensor,
    apply: Callable[[Tensor], Tensor],
    transpose: Callable[[Tensor], Tensor],
) -> Tensor:
    """apply(x), whose gradient is transpose(g). Recorded term by term, a backward pass
    of sums with many terms would copy the gradient of all that is gathered once a
    term."""
    return _LinearMap.apply(x, apply, transpose)


class _LinearMap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        apply: Callable[[Tensor], Tensor],
        transpose: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ctx.transpose = transpose
        return apply(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transpose(gradients[0]), None, None
