"""The part of a MoRA operator that one process of a tensor-parallel group computes.

A window is a range of a layer's inputs and a range of its outputs. Of the update y = decompress(M compress(x)) it
computes what its inputs contribute to its outputs. Windows over consecutive output ranges, concatenated, give the
complete update (a colwise layer); windows over consecutive input ranges, summed, do too (a rowwise layer).

    fold      (..., w_in) -> (..., N, columns)        unfold     its transpose
    deal      (..., N, rows) -> (..., w_out)          collect    its transpose
    delta     M -> (w_out, w_in) of `delta_weight`    gradient   its transpose, for decouple and rotate

Shape legend: D = d_in, O = d_out, R = r_hat, N = blocks, as in `adapters.ops.mora`; w_in, w_out: inputs and outputs of
the window; rows, columns: those of M that it uses. A slot is a row or column of M, or for decouple and rotate, which
cut inputs and outputs into blocks of R, a position in a block.

Everything is index tables, made by running the operator on the numbers of its own inputs (so that there is one
definition of it), and gathers and sums over them, which give the same bits on every process of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.adapters.ops.gather import gather, regroup_blocks
from mora_ds.adapters.ops.mora import (
    OperatorSpec,
    block_pairs,
    block_squares,
    input_blocks,
    output_slots,
    rotate_blocks,
    sum_of_blocks,
    sums_by_product,
    tokens_in_cache,
)

Range = tuple[int, int]
"""[start, stop)."""


@dataclass(frozen=True)
class Window:
    """Inputs and outputs of an operator, and the rows and columns of M that they may use: all, or, with a grouping that
    is aligned to the group's processes, those of the window's own segments. Make it with `Window.of`."""

    spec: OperatorSpec
    inputs: Range
    outputs: Range
    columns: Range
    rows: Range

    @classmethod
    def of(
        cls,
        spec: OperatorSpec,
        inputs: Range | None = None,
        outputs: Range | None = None,
        columns: Range | None = None,
        rows: Range | None = None,
    ) -> Window:
        """A window with the complete range of everything that is not given."""
        every = (0, spec.r_hat)
        return cls(spec, inputs or (0, spec.d_in), outputs or (0, spec.d_out), columns or every, rows or every)

    @property
    def d_in(self) -> int:
        return self.inputs[1] - self.inputs[0]

    @property
    def d_out(self) -> int:
        return self.outputs[1] - self.outputs[0]

    def fold(self, x: Tensor) -> Tensor:
        """(..., w_in) -> (..., N, columns): `compress` without rotate's rotation, which `rotate` does."""
        tables = _tables(self, x.device)
        if self.spec.blockwise:
            return _gather(x, tables.inputs[0]).unflatten(-1, (self.spec.blocks_in, -1))
        return _gather_sum(x, tables.inputs).unsqueeze(-2)

    def unfold(self, z: Tensor) -> Tensor:
        """(..., N, columns) -> (..., w_in): the transpose of `fold`."""
        return _gather_sum(z.flatten(-2), _tables(self, z.device).input_slots)

    def rotate(self, z: Tensor, back: bool = False) -> Tensor:
        """Rotate's rotation of each block of z (..., N, R), or its inverse; z itself for the other operators."""
        return rotate_blocks(self.spec, z, back)

    def deal(self, u: Tensor) -> Tensor:
        """(..., N, used rows) -> (..., w_out): `decompress`."""
        slots = regroup_blocks(u, self.spec.blocks_out).flatten(-2) if self.spec.blockwise else u.squeeze(-2)
        return _gather(slots, _tables(self, u.device).output_slots)

    def collect(self, g: Tensor) -> Tensor:
        """(..., w_out) -> (..., N, used rows): the transpose of `deal`."""
        slots = _gather_sum(g, _tables(self, g.device).outputs)
        if not self.spec.blockwise:
            return slots.unsqueeze(-2)
        return regroup_blocks(slots.unflatten(-1, (self.spec.blocks_out, self.spec.r_hat)), self.spec.blocks_in)

    def used_rows(self, matrix: Tensor, dim: int = 0) -> Tensor:
        """rows -> used rows, along `dim`: those rows of M that the window's outputs read."""
        used = _tables(self, matrix.device).used
        return matrix if used is None else matrix.index_select(dim, used)

    def all_rows(self, gradient: Tensor, dim: int = 0) -> Tensor:
        """used rows -> rows, along `dim`: the transpose of `used_rows`, zero in the other rows."""
        used = _tables(self, gradient.device).used
        if used is None:
            return gradient
        shape = list(gradient.shape)
        shape[dim] = self.rows[1] - self.rows[0]
        return gradient.new_zeros(shape).index_copy_(dim, used, gradient)

    def delta(self, matrix: Tensor) -> Tensor:
        """(w_out, w_in): the window of `delta_weight`, from the rows and columns of M that it may use."""
        if self.spec.blockwise:
            return _delta_of_blocks(self, matrix)
        tables = _tables(self, matrix.device)
        columns = _gather_sum(self.used_rows(matrix), tables.input_slots)
        return F.pad(columns, (0, 0, 0, 1)).index_select(0, tables.output_slots)

    def gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """(R, R), for decouple and rotate: the window's part of dL/dM, from its input x (..., w_in) and the gradient g
        (..., w_out) of its output. Only the slots of each block that the window has are multiplied."""
        spec, tables = self.spec, _block_tables(self, g.device)
        inputs, outputs = tables.inputs, tables.outputs
        x, g = x.flatten(0, -2), g.flatten(0, -2)
        tokens = max(1, len(g)) if sums_by_product(g) else tokens_in_cache(g, max(self.d_in, self.d_out))
        runs = block_pairs(spec)
        products = [g.new_zeros(into.stop - into.start, outputs.width, inputs.width) for into, _ in runs]
        for x_part, g_part in zip(x.split(tokens), g.split(tokens), strict=True):
            z, c = inputs.of(x_part), outputs.of(g_part)
            for product, (into, out) in zip(products, runs, strict=True):
                product.baddbmm_(c[:, out].permute(1, 2, 0), z[:, into].transpose(0, 1))
        total = g.new_zeros(spec.blocks_in, spec.r_hat**2)
        for product, (into, out) in zip(products, runs, strict=True):
            elements = outputs.slots[out].unsqueeze(2) * spec.r_hat + inputs.slots[into].unsqueeze(1)
            padding = outputs.padding[out].unsqueeze(2) | inputs.padding[into].unsqueeze(1)
            total[into].scatter_add_(1, elements.flatten(1), product.masked_fill_(padding, 0).flatten(1))
        return sum_of_blocks(spec, total.unflatten(1, (spec.r_hat, spec.r_hat)))


def _delta_of_blocks(window: Window, matrix: Tensor) -> Tensor:
    spec, tables = window.spec, _block_tables(window, matrix.device)
    inputs = tables.inputs
    values = block_squares(spec, matrix).gather(2, inputs.slots.unsqueeze(1).expand(-1, spec.r_hat, -1))
    values = values.masked_fill(inputs.padding.unsqueeze(1), 0).flatten(0, 1)  # (N * R, Li)
    delta = values.new_zeros(window.d_out * window.d_in)
    for meeting in tables.meetings:
        elements = (meeting.outputs * window.d_in).unsqueeze(1) + inputs.numbers.index_select(0, meeting.blocks)
        delta.scatter_add_(0, elements.flatten(), values.index_select(0, meeting.rows).flatten())
    return delta.view(window.d_out, window.d_in)


# -- tables of all slots ----------------------------------------------------------------------------------------------


class _Tables(NamedTuple):
    """Index tables of a window's maps; one past the last index stands for zero."""

    inputs: Tensor
    """(K, slots): the inputs whose sum a slot holds."""
    input_slots: Tensor
    """(K, w_in): the transpose, the slots that each input is added to."""
    output_slots: Tensor
    """(w_out,): the slot that each output reads."""
    outputs: Tensor
    """(K, slots): the transpose, the outputs that read each slot."""
    used: Tensor | None = None
    """Rows of M, counted from the first of `Window.rows`, that the outputs read; None for all."""


def clear_tables() -> None:
    """Drops the cached tables of this module."""
    _tables.cache_clear()
    _block_tables.cache_clear()


@lru_cache(maxsize=1024)
def _tables(window: Window, device: torch.device) -> _Tables:
    with torch.inference_mode(False), torch.no_grad():
        output_slots, outputs, used = _output_tables(window)
        tables = _Tables(*_moved((*_input_tables(window), output_slots, outputs), device))
        return tables if used is None else tables._replace(used=used.to(device))


def _input_tables(window: Window) -> tuple[Tensor, Tensor]:
    spec, (start, stop), (first, last) = window.spec, window.inputs, window.columns
    numbers = _input_numbers(spec)[:, first:last]
    inside = (numbers >= start) & (numbers < stop)
    local, width = numbers - start, stop - start
    positions = torch.arange(numbers.numel()).view_as(numbers)
    if spec.blockwise:
        inputs = torch.where(inside, local, width).flatten().unsqueeze(0)
        return inputs, _lists(local[inside], positions[inside], width, numbers.numel())
    slots = positions % (last - first)
    inputs = _lists(slots[inside], local[inside], last - first, width)
    return inputs, _lists(local[inside], slots[inside], width, last - first)


def _output_tables(window: Window) -> tuple[Tensor, Tensor, Tensor | None]:
    spec, (start, stop) = window.spec, window.outputs
    slots = output_slots(spec)[start:stop]
    if spec.blockwise:
        count, used = spec.blocks_out * spec.r_hat, None
    else:
        slots = torch.where(slots < 0, slots, slots - window.rows[0])
        used = slots[slots >= 0].unique()
        count = len(used)
        slots = torch.where(slots < 0, slots, torch.searchsorted(used, slots))
        used = None if count == window.rows[1] - window.rows[0] else used
    reads = slots >= 0
    outputs = _lists(slots[reads], torch.arange(stop - start)[reads], count, stop - start)
    return torch.where(reads, slots, count), outputs, used


def _input_numbers(spec: OperatorSpec) -> Tensor:
    """(blocks, R): the input that lies at each position of each block, -1 for none."""
    return input_blocks(spec, torch.arange(1, spec.d_in + 1)) - 1


def _lists(keys: Tensor, values: Tensor, size: int, padding: int) -> Tensor:
    """(K, size): in column k the values whose key is k, in their order, padded to the length K of the longest column
    (at least 1)."""
    order = keys.argsort(stable=True)
    keys, values = keys[order], values[order]
    counts = torch.bincount(keys, minlength=size)
    rank = torch.arange(len(keys)) - (counts.cumsum(0) - counts)[keys]
    table = torch.full((max(int(counts.max()) if len(counts) else 0, 1), size), padding)
    table[rank, keys] = values
    return table


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x[..., index], zero where the index is one past the end. In two dimensions, where a CPU is fastest."""
    padded = F.pad(x, (0, 1))
    return padded.flatten(0, -2).index_select(1, index).unflatten(0, x.shape[:-1])


def _gather_sum(x: Tensor, table: Tensor) -> Tensor:
    """(..., n), (K, m) -> (..., m)."""
    gathered = _gather(x, table.flatten())
    return gathered if len(table) == 1 else gathered.unflatten(-1, table.shape).sum(dim=-2)


# -- tables of the slots in use, by block -----------------------------------------------------------------------------


class _Side(NamedTuple):
    """The window's inputs or outputs by block, (blocks, L) each: blocks with fewer than L of them are padded. L is
    written Li for inputs."""

    slots: Tensor
    """The position in the block."""
    numbers: Tensor
    """The input or output that lies there, counted from the window's first."""
    padding: Tensor
    """True where there is none: `slots` and `numbers` are then 0."""

    @property
    def width(self) -> int:
        return self.slots.shape[1]

    def of(self, x: Tensor) -> Tensor:
        """(T, w) -> (T, blocks, L). The padding is any number."""
        return gather(x, self.numbers.flatten()).unflatten(-1, self.numbers.shape)


class _Meeting(NamedTuple):
    """The outputs that read an input block in one of the operator's `block_pairs`; (n,) each."""

    outputs: Tensor
    """Counted from the window's first."""
    blocks: Tensor
    """The input block that each reads."""
    rows: Tensor
    """Its row among the N * R rows of all blocks of `block_squares`."""


class _BlockTables(NamedTuple):
    inputs: _Side
    outputs: _Side
    meetings: tuple[_Meeting, ...]


@lru_cache(maxsize=1024)
def _block_tables(window: Window, device: torch.device) -> _BlockTables:
    """The same window for decouple and rotate without the slots that other windows have, so that its part of the delta
    and of M's gradient costs its share of the complete one."""
    with torch.inference_mode(False), torch.no_grad():
        spec, (first, last), (start, stop) = window.spec, window.inputs, window.outputs
        numbers = _input_numbers(spec)
        in_blocks, in_slots = ((numbers >= first) & (numbers < last)).nonzero(as_tuple=True)
        inputs = _side(in_blocks, in_slots, numbers[in_blocks, in_slots] - first, spec.blocks_in)
        positions = output_slots(spec)[start:stop]
        blocks, slots = positions // spec.r_hat, positions % spec.r_hat
        outputs = _side(blocks, slots, torch.arange(stop - start), spec.blocks_out)
        meetings = []
        for into, out in block_pairs(spec):
            readers = ((blocks >= out.start) & (blocks < out.stop)).nonzero().flatten()
            read = blocks[readers] - out.start + into.start
            meetings.append(_Meeting(*_moved((readers, read, read * spec.r_hat + slots[readers]), device)))
        return _BlockTables(_Side(*_moved(inputs, device)), _Side(*_moved(outputs, device)), tuple(meetings))


def _side(blocks: Tensor, slots: Tensor, numbers: Tensor, count: int) -> _Side:
    columns = ((slots, 0), (numbers, 0), (torch.zeros_like(blocks), 1))
    slots, numbers, padding = (_lists(blocks, values, count, fill).T.contiguous() for values, fill in columns)
    return _Side(slots, numbers, padding.bool())


def _moved(tensors: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    return (tensor.to(device) for tensor in tensors)
