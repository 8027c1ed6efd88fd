"""What the kernels get besides numbers of a layer: an operator's four maps
(`ops.index_tables`) as they read them, int32 with -1 for zero, and the buffers for partial
sums of M's gradient.

Shape legend:  D = d_in, O = d_out, R = r_hat, N = input blocks (1 for truncate and share), K = terms of a map's sums,
P = blocks of collected outputs, at most N: input block b reads block b mod P.
"""

import math

import torch
from torch import Tensor, nn

from mora_ds.adapters.ops.index_tables import make_tables, rope_table, transposed
from mora_ds.adapters.ops.mora import OperatorSpec

TILE = 128
"""Side of the tiles of M's gradient that one program of `product` sums."""

_TERMS = 512
"""Terms of a sum that a part of `product` has at least."""

_READ_A_SUM = 16
"""Numbers that a part of `product` reads for each of its partial sums, at least: in 16
bits eight times their bytes."""


class KernelTables(nn.Module):
    """The tables of one operator, int32, as non-persistent buffers: they move with the
    layer, and no checkpoint has them."""

    fold: Tensor
    """(K, N * R)"""
    unfold: Tensor
    """(K, D), of numbers in N blocks for rotate, which turns each by angles of its own,
    else of numbers in P blocks."""
    spread: Tensor
    """(K, O)"""
    collect: Tensor
    """(K, P * R)"""
    slots: Tensor
    """(K, O), the transpose of `collect`: the numbers among P blocks that each output
    reads; one, of every operator here."""

    blocks_read: Tensor | None
    """(N,), the block of collected outputs that each input block reads, if repeated."""

    def __init__(self, spec: OperatorSpec, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        tables = make_tables(spec, torch.device("cpu"))
        collect = tables.collect.table
        unfold = tables.unfold.table
        if not spec.rotates:
            unfold = unfold.where(unfold < 0, unfold % collect.shape[1])
        maps = {
            "fold": tables.fold.table,
            "unfold": unfold,
            "spread": tables.spread.table,
            "collect": collect,
            "slots": transposed(collect, spec.d_out),
        }
        for name, table in maps.items():
            buffer = table.to(device, torch.int32).contiguous()
            self.register_buffer(name, buffer, persistent=False)
        self.register_buffer("blocks_read", None, persistent=False)
        self.blocks_out = collect.shape[1] // spec.r_hat
        """P."""
        if spec.rotates and self.blocks_out < spec.blocks:
            blocks_read = torch.arange(spec.blocks) % self.blocks_out
            self.blocks_read = blocks_read.to(device, torch.int32)
        self._every_output_reads_a_row = (
            spec.blocks == 1 and tables.spread.missing is None
        )
        self.rotation: tuple[Tensor | None, Tensor | None] = (None, None)
        """Cosines and sines (N, R / 2) of rotate, shared by all layers of these sizes.
        No buffers, as they stay in fp32 whatever dtype the layer is cast to."""
        if spec.rotates:
            self.rotation = rope_table(spec.blocks, spec.r_hat, torch.float32, device)

    @property
    def members(self) -> Tensor | None:
        """(K, R), the outputs that read each row of M, where M is applied once and
        every output reads a row: a kernel then reads a row once for all of them."""
        return self.collect if self._every_output_reads_a_row else None


# -- partial sums of M's gradient -------------------------------------------------------


def part_count(c: Tensor, z: Tensor, programs: int) -> int:
    """In how many parts `product` sums c^T z, so that about `programs` programs, and
    with them all processors of a GPU, have work."""
    tokens, blocks, r_hat = z.shape
    tiles = math.ceil(r_hat / TILE) ** 2
    worth = (c.numel() + z.numel()) // (_READ_A_SUM * r_hat**2)
    return max(1, min(programs // tiles, tokens * blocks // _TERMS, worth))


def empty_product(c: Tensor, z: Tensor, programs: int) -> Tensor:
    """(parts, R, R) for `product`: in fp32 where several parts are added up later."""
    parts = part_count(c, z, programs)
    dtype = c.dtype if parts == 1 else torch.promote_types(c.dtype, torch.float32)
    return c.new_empty(parts, c.shape[2], z.shape[2], dtype=dtype)
