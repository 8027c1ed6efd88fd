"""A LoRA whose products are added in place (`addmm_`), as in Unsloth: a comparison that
needs no package."""

from typing import Any

import torch
from torch import Tensor, nn


class _FusedProduct(torch.autograd.Function):
    """x W^T + scale x A^T B^T for a frozen W (O, D), with A (R, D) and B (O, R)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        rows = x.flatten(0, -2)
        inner = rows @ a.T
        ctx.save_for_backward(rows, inner, weight, a, b)
        ctx.scale = scale
        y = (rows @ weight.T).addmm_(inner, b.T, alpha=scale)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, weight, a, b = ctx.saved_tensors
        g = gradients[0].flatten(0, -2)
        g_inner = ctx.scale * (g @ b)
        g_x = (g @ weight).addmm_(g_inner, a)
        return (
            g_x.unflatten(0, gradients[0].shape[:-1]),
            None,
            g_inner.T @ rows,
            ctx.scale * (g.T @ inner),
            None,
        )


class FusedLoRA(nn.Module):
    """A LoRA of this rank on a frozen layer without bias, with alpha = 2 x rank."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        weight = base.weight
        self.weight = weight
        self.a = nn.Parameter(torch.randn(rank, base.in_features).to(weight) / rank)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank).to(weight))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _FusedProduct.apply(x, self.weight, self.a, self.b, 2.0)
        return y
