"""The tables of indices that the kernels read: all four maps of an operator as sums of gathered numbers.

    fold     (K, N * R)  the inputs that are summed at each position            x -> z, N blocks of R
    unfold   (K, D)      the positions that each input is summed into           its transpose
    deal     (K, O)      the positions of u that are summed at each output      u -> y
    collect  (K, N * R)  the outputs that read each position                    its transpose

K, the length of the longest sum, differs between the four; a shorter sum is filled up with -1, which stands for zero.

Shape legend:  D = d_in, O = d_out, R = r_hat, N = input blocks (1 for truncate and share).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mora_ds.adapters.ops.index_tables import GatherIndex, IndexTables, make_tables, rope_table
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import OperatorKind


class KernelTables(nn.Module):
    """The tables of one operator, int32, as non-persistent buffers: they move with the layer, and no checkpoint has
    them."""

    fold: Tensor
    unfold: Tensor
    deal: Tensor
    collect: Tensor

    def __init__(self, spec: OperatorSpec, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        tables = make_tables(spec, torch.device("cpu"))
        made = {
            "fold": _sources(tables.sources, spec, spec.d_in),
            "unfold": _positions(tables, spec),
            "deal": _dealt(tables, spec),
            "collect": _collected(tables, spec),
        }
        for name, table in made.items():
            self.register_buffer(name, table.to(torch.int32).contiguous().to(device), persistent=False)
        self.rotation: tuple[Tensor | None, Tensor | None] = (None, None)
        """Cosines and sines (N, R / 2) of rotate, shared by all layers of these sizes. No buffers, as they stay in fp32
        whatever dtype the layer is cast to."""
        if spec.kind is OperatorKind.ROTATE:
            self.rotation = rope_table(spec.blocks_in, spec.r_hat, torch.float32, device)

    @property
    def members(self) -> Tensor | None:
        """Share: (K, R), the outputs that read each row of M, so that a kernel reads a row once for all of them."""
        return self.collect if self.spec.kind is OperatorKind.SHARE else None


def _sources(index: GatherIndex, spec: OperatorSpec, size: int) -> Tensor:
    """(K, N * R): what lies at each position; `size` and beyond is nothing."""
    table = index.index.clone()
    if index.missing is not None:
        table[index.missing] = -1
    assert int(table.max()) < size
    return table.view(1, -1) if spec.blockwise else table.view(-1, spec.r_hat)


def _positions(tables: IndexTables, spec: OperatorSpec) -> Tensor:
    """(K, D): first positions, then second ones, D of them in a row, as no input occurs twice among those."""
    first = tables.places if spec.blockwise else tables.places.where(tables.places < spec.r_hat, -1)
    rows = [first]
    for inputs, places in zip(tables.more_sources.split(spec.d_in), tables.more_places.split(spec.d_in), strict=True):
        if len(inputs):
            rows.append(torch.full((spec.d_in,), -1).index_copy(0, inputs, places))
    return torch.stack(rows)


def _dealt(tables: IndexTables, spec: OperatorSpec) -> Tensor:
    """(K, O): output block p is the sum of the blocks p, p + blocks_out, ... of M's output, or one block again."""
    slots = tables.slots
    if not spec.blockwise:
        return slots.where(slots < spec.r_hat, -1).unsqueeze(0)
    size = spec.blocks_in * spec.r_hat
    if spec.blocks_in < spec.blocks_out:
        return (slots % size).unsqueeze(0)
    return _rows_until(slots, spec.blocks_out * spec.r_hat, size)


def _collected(tables: IndexTables, spec: OperatorSpec) -> Tensor:
    """(K, N * R): the transpose of `_dealt`."""
    members = _sources(tables.members, spec, spec.d_out)
    if not spec.blockwise:
        return members
    positions = torch.arange(spec.blocks_in * spec.r_hat)
    size = spec.blocks_out * spec.r_hat
    if spec.blocks_in >= spec.blocks_out:
        return members[:, positions % size]
    which = _rows_until(positions, spec.blocks_in * spec.r_hat, size)
    return members[0][which.clamp(min=0)].where(which >= 0, -1)


def _rows_until(first: Tensor, step: int, size: int) -> Tensor:
    """first, first + step, first + 2 step, ..., a row each; -1 from `size` on."""
    rows = first + step * torch.arange(math.ceil(size / step)).unsqueeze(1)
    return rows.where(rows < size, -1)
