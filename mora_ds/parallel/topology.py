"""Process groups of tensor parallelism and their collectives: world = t x dp.

    ranks 0 .. t-1      one tensor-parallel group: the same sequences, each rank a slice of every layer
    ranks r, r+t, ...   one data-parallel group: the same slice, other sequences; ZeRO shards over it

DeepSpeed gets the topology by its `mpu` argument. Its AutoTP is not used, because it
would shard the base. Written against DeepSpeed 0.19.8;
tests/parallel/test_topology_contract.py names each symbol that an upgrade has moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import deepspeed.comm as comm
import torch
from deepspeed.utils import groups
from torch import Tensor, nn

from mora_ds.adapters.ops.mora import LinearMapFunction
from mora_ds.common.errors import UserError
from mora_ds.parallel.limits import TENSOR, check_world


@dataclass(frozen=True)
class Topology:
    """This rank's index in its tensor-parallel group, and the group's collectives. All
    of them use `deepspeed.comm`, which counts them."""

    degree: int
    """t, the number of ranks in a tensor-parallel group."""
    index: int
    """The index of this rank in its group."""
    group: Any
    """The group of torch.distributed."""

    @classmethod
    def of(cls, degree: int) -> Topology:
        """Create the groups, once per process. Collective. Raises `UserError` if
        `degree` does not divide the world, or if this process already has groups of
        another size."""
        check_world(comm.get_world_size(), tensor=degree)
        # DeepSpeed's mesh is (dp, t), with t innermost (utils/groups.py)
        groups._init_tp_mesh_device(tensor_model_parallel_size=degree)
        group = groups.get_tensor_model_parallel_group()
        if comm.get_world_size(group) != degree:
            raise UserError(
                f"{TENSOR} {degree}: this process already has groups of {comm.get_world_size(group)}"
            )
        return cls(degree, comm.get_rank(group), group)

    @property
    def mpu(self) -> Any:
        """The `mpu` argument of `deepspeed.initialize`. It must not have
        `initialize_sequence_parallel`, which would disable the sum of norms over the
        group (zero/stage3.py, `__init__`)."""
        return groups

    def shard_range(self, size: int) -> tuple[int, int]:
        """[start, stop) of this rank's shard of `size` elements."""
        return self._ranges(size)[self.index]

    def _ranges(self, size: int) -> list[tuple[int, int]]:
        """[start, stop) of every rank's shard. Their sizes differ by at most one."""
        bounds = [size * index // self.degree for index in range(self.degree + 1)]
        return list(pairwise(bounds))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the group, in place."""
        comm.all_reduce(tensor, group=self.group)
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Replace the tensor by that of the group's first rank, in place."""
        comm.broadcast(
            tensor, src=comm.get_global_rank(self.group, 0), group=self.group
        )
        return tensor

    def gather(self, shard: Tensor, size: int) -> Tensor:
        """All-gather shards of the first dimension -> (size, ...), on every rank of the
        group."""
        padded = _padded(shard, -(-size // self.degree))
        full = shard.new_empty(len(padded) * self.degree, *shard.shape[1:])
        comm.all_gather_into_tensor(full, padded, group=self.group)
        if len(full) == size:
            return full
        shards = zip(full.chunk(self.degree), self._ranges(size), strict=True)
        return torch.cat([rows[: stop - start] for rows, (start, stop) in shards])

    def sum_scatter(self, full: Tensor) -> Tensor:
        """Reduce-scatter: (size, ...) -> this rank's shard of the sum over the
        group."""
        size = len(full)
        longest = -(-size // self.degree)
        start, stop = self.shard_range(size)
        if longest * self.degree != size:
            shards = [full[first:end] for first, end in self._ranges(size)]
            full = torch.cat([_padded(rows, longest) for rows in shards])
        shard = full.new_empty(longest, *full.shape[1:])
        comm.reduce_scatter_tensor(shard, full.contiguous(), group=self.group)
        return shard[: stop - start]


@dataclass(frozen=True)
class ShardInfo:
    """The position of this rank's shard in a MoRA matrix (r_hat, r_hat): it has rows
    from `start` on."""

    start: int
    r_hat: int


def mark_split(parameter: nn.Parameter, start: int, r_hat: int) -> None:
    """Mark a parameter as a shard of a matrix, so that the shards of all ranks count in
    the gradient norm (runtime/utils.py, `is_model_parallel_parameter`)."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.mora_shard = ShardInfo(start, r_hat)  # type: ignore[attr-defined]


def shard_info(parameter: Tensor) -> ShardInfo | None:
    """The mark of `mark_split`; None for a parameter that is the same on all ranks of a
    group."""
    return getattr(parameter, "mora_shard", None)


def _padded(tensor: Tensor, length: int) -> Tensor:
    if len(tensor) == length:
        return tensor.contiguous()
    return torch.cat(
        (tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:]))
    )


# -- collectives with a gradient -------------------------------------------------------


def sum_gradient(x: Tensor, topology: Topology) -> Tensor:
    """x unchanged; the gradient is summed over the group."""

    def summed(gradient: Tensor) -> Tensor:
        return topology.sum_(gradient.clone(memory_format=torch.contiguous_format))

    return LinearMapFunction.apply(x, lambda x: x.view_as(x), summed)


def all_gather(shard: Tensor, topology: Topology, r_hat: int) -> Tensor:
    """(..., shard of R) -> (..., R); the gradient is sliced to this rank's shard."""

    def gather(shard: Tensor) -> Tensor:
        return topology.gather(shard.movedim(-1, 0), r_hat).movedim(0, -1)

    def slice_gradient(gradient: Tensor) -> Tensor:
        start, stop = topology.shard_range(r_hat)
        return gradient[..., start:stop]

    return LinearMapFunction.apply(shard, gather, slice_gradient)


class Sum(torch.autograd.Function):
    """Sum over the group, in place; the gradient is passed unchanged."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, topology: Topology) -> Tensor:
        ctx.mark_dirty(y)
        return topology.sum_(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
