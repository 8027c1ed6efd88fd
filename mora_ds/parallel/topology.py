"""Which processes compute what together, and the collectives among them: world = t x
dp.

    ranks 0 .. t-1      one tensor-parallel group: the same rows of the batch, each process a slice of every layer
    ranks r, r+t, ...   one data-parallel group: the same slice, other rows; ZeRO shards over it

DeepSpeed learns of it by its `mpu` argument. Its own AutoTP stays off: it would shard
the base. Written against DeepSpeed 0.19.8; tests/parallel/test_topology_contract.py
names each symbol that an upgrade has moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepspeed.comm as comm
import torch
from deepspeed.utils import groups
from torch import Tensor, nn

from mora_ds.adapters.ops.mora import linear_map
from mora_ds.common.errors import UserError
from mora_ds.parallel.limits import TENSOR, check_world


@dataclass(frozen=True)
class Topology:
    """This process's place in its tensor-parallel group, and the group's collectives.
    All of them go through `deepspeed.comm`, which counts them."""

    degree: int
    """t, the number of processes in a tensor-parallel group."""
    index: int
    """The index of this process in its group."""
    group: Any
    """The group of torch.distributed."""

    @classmethod
    def of(cls, degree: int) -> Topology:
        """Make the groups, once a process. Collective. Raises `UserError` where
        `degree` does not divide the world, or differs from that of an engine that this
        process has made before."""
        check_world(comm.get_world_size(), tensor=degree)
        # DeepSpeed's mesh is (dp, t), with t innermost (utils/groups.py)
        groups._init_tp_mesh_device(tensor_model_parallel_size=degree)
        group = groups.get_tensor_model_parallel_group()
        if comm.get_world_size(group) != degree:
            raise UserError(
                f"{TENSOR} {degree}: this process has groups of {comm.get_world_size(group)} already"
            )
        return cls(degree, comm.get_rank(group), group)

    @property
    def mpu(self) -> Any:
        """For `deepspeed.initialize`. It must not have `initialize_sequence_parallel`,
        which would turn the summing of norms over the group off (zero/stage3.py,
        `__init__`)."""
        return groups

    def share(self, size: int) -> tuple[int, int]:
        """[start, stop) of this process's share; shares differ by at most one."""
        return share(size, self.degree, self.index)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the group, in place."""
        comm.all_reduce(tensor, group=self.group)
        return tensor

    def first_(self, tensor: Tensor) -> Tensor:
        """The tensor of the group's first process, in place."""
        comm.broadcast(
            tensor, src=comm.get_global_rank(self.group, 0), group=self.group
        )
        return tensor

    def gather(self, shard: Tensor, size: int) -> Tensor:
        """Shares of the first dimension -> (size, ...), on every process of the
        group."""
        padded = _padded(shard, -(-size // self.degree))
        whole = shard.new_empty(len(padded) * self.degree, *shard.shape[1:])
        comm.all_gather_into_tensor(whole, padded, group=self.group)
        if len(whole) == size:
            return whole
        bounds = [share(size, self.degree, index) for index in range(self.degree)]
        pieces = zip(whole.chunk(self.degree), bounds, strict=True)
        return torch.cat([piece[: stop - start] for piece, (start, stop) in pieces])

    def sum_scatter(self, whole: Tensor) -> Tensor:
        """(size, ...) -> this process's share of the sum over the group."""
        size = len(whole)
        longest = -(-size // self.degree)
        start, stop = self.share(size)
        if longest * self.degree != size:
            bounds = [share(size, self.degree, index) for index in range(self.degree)]
            pieces = [whole[first:end] for first, end in bounds]
            whole = torch.cat([_padded(piece, longest) for piece in pieces])
        shard = whole.new_empty(longest, *whole.shape[1:])
        comm.reduce_scatter_tensor(shard, whole.contiguous(), group=self.group)
        return shard[: stop - start]


def share(size: int, degree: int, index: int) -> tuple[int, int]:
    """[start, stop) of share `index` of `degree`."""
    return size * index // degree, size * (index + 1) // degree


@dataclass(frozen=True)
class Share:
    """Which rows of a MoRA matrix a parameter of this process holds."""

    start: int
    r_hat: int


def mark_split(parameter: nn.Parameter, start: int, r_hat: int) -> None:
    """Note that each process of a group holds another part of a matrix, so that each
    counts in the gradient norm (runtime/utils.py, `is_model_parallel_parameter`)."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.mora_share = Share(start, r_hat)  # type: ignore[attr-defined]


def share_of(parameter: Tensor) -> Share | None:
    """What `mark_split` noted; None for a parameter that every process of a group
    holds."""
    return getattr(parameter, "mora_share", None)


def _padded(tensor: Tensor, length: int) -> Tensor:
    if len(tensor) == length:
        return tensor.contiguous()
    return torch.cat(
        (tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:]))
    )


# -- collectives with a gradient -------------------------------------------------------


def sum_gradient(x: Tensor, topology: Topology) -> Tensor:
    """x itself, whose gradient is summed over the group."""

    def summed(gradient: Tensor) -> Tensor:
        return topology.sum_(gradient.clone(memory_format=torch.contiguous_format))

    return linear_map(x, lambda x: x.view_as(x), summed)


def all_gather(shard: Tensor, topology: Topology, r_hat: int) -> Tensor:
    """(..., share of R) -> (..., R); the gradient is this process's slice."""

    def whole(shard: Tensor) -> Tensor:
        return topology.gather(shard.movedim(-1, 0), r_hat).movedim(0, -1)

    def in_share(gradient: Tensor) -> Tensor:
        start, stop = topology.share(r_hat)
        return gradient[..., start:stop]

    return linear_map(shard, whole, in_share)


class Sum(torch.autograd.Function):
    """y -> its sum over the group, in place; the gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, topology: Topology) -> Tensor:
        ctx.mark_dirty(y)
        return topology.sum_(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
