"""Collectives of a tensor-parallel group within a graph: what each is to its gradient.

SumGradient   x -> x                        the gradient is summed over the ranks: at the input of a split block
Sum           y -> sum of all ranks' y      the gradient is every rank's: at its output
AllLanes, OwnLanes                          shares of the last dimension put together, and cut out again
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mora_ds.parallel.topology import Topology


class SumGradient(torch.autograd.Function):
    """x -> x; the gradient is summed over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, topology: Topology) -> Tensor:
        ctx.topology = topology
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.topology.sum_(gradients[0].clone(memory_format=torch.contiguous_format)), None


class Sum(torch.autograd.Function):
    """The sum of all ranks' y, in place; its gradient is every rank's."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, topology: Topology) -> Tensor:
        ctx.mark_dirty(y)
        return topology.sum_(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class AllLanes(torch.autograd.Function):
    """(..., share of R) -> (..., R); each rank's share of the gradient."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, topology: Topology, r_hat: int) -> Tensor:
        ctx.topology = topology
        return topology.gather(own.movedim(-1, 0), r_hat).movedim(0, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        start, stop = ctx.topology.share(gradients[0].shape[-1])
        return gradients[0][..., start:stop], None, None


class OwnLanes(torch.autograd.Function):
    """(..., R) -> (..., share of R); all shares of the gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, topology: Topology) -> Tensor:
        ctx.topology, ctx.r_hat = topology, z.shape[-1]
        start, stop = topology.share(z.shape[-1])
        return z[..., start:stop]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.topology.gather(gradients[0].movedim(-1, 0), ctx.r_hat).movedim(0, -1), None
