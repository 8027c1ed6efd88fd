"""The part of a MoRA operator that one process of a tensor-parallel group computes.

A window is a range of a layer's inputs and a range of its outputs. Of the update y = decompress(M compress(x)) it
computes what its inputs contribute to its outputs. Windows over consecutive output ranges, concatenated, give the
complete update (a colwise layer); windows over consecutive input ranges, summed, do too (a rowwise layer).

    fold      (..., w_in) -> (..., N, columns)        unfold     its transpose
    spread    (..., N, rows) -> (..., w_out)          collect    its transpose
    delta     M -> (w_out, w_in) of `delta_weight`    gradient   its transpose, where M is applied to several blocks

Shape legend: D = d_in, O = d_out, R = r_hat, N = blocks, as in `adapters.ops.mora`; w_in, w_out: inputs and outputs of
the window; rows, columns: those of M that it uses. A slot is a row or column of M, or where M is applied to several
blocks, a position in a block.

Everything is a part of the operator's own maps (`index_tables`): gathers and sums, which give the same bits on every
process of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.adapters.ops.gather import gather
from mora_ds.adapters.ops.index_tables import IndexMap, IndexTables, lists, tables_of, transposed
from mora_ds.adapters.ops.mora import (
    OperatorSpec,
    add_rows_of_blocks_,
    block_squares,
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
        return cls(
            spec,
            inputs or (0, spec.d_in),
            outputs or (0, spec.d_out),
            columns or every,
            rows or every,
        )

    @property
    def d_in(self) -> int:
        return self.inputs[1] - self.inputs[0]

    @property
    def d_out(self) -> int:
        return self.outputs[1] - self.outputs[0]

    def fold(self, x: Tensor) -> Tensor:
        """(..., w_in) -> (..., N, columns): `compress` without rotate's rotation, which `rotate` does."""
        return _tables(self, x.device).maps.fold(x).unflatten(-1, (self.spec.blocks, -1))

    def unfold(self, z: Tensor) -> Tensor:
        """(..., N, columns) -> (..., w_in): the transpose of `fold`."""
        return _tables(self, z.device).maps.unfold(z.flatten(-2))

    def rotate(self, z: Tensor, back: bool = False) -> Tensor:
        """Rotate's rotation of each block of z (..., N, R), or its inverse; z itself for the other operators."""
        return rotate_blocks(self.spec, z, back)

    def spread(self, u: Tensor) -> Tensor:
        """(..., N, used rows) -> (..., w_out): `decompress`."""
        return _tables(self, u.device).maps.spread(u.flatten(-2))

    def collect(self, g: Tensor) -> Tensor:
        """(..., w_out) -> (..., N, used rows): the transpose of `spread`."""
        return _tables(self, g.device).maps.collect(g).unflatten(-1, (self.spec.blocks, -1))

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
        tables = _tables(self, matrix.device).maps
        if self.spec.blocks > 1:
            delta = matrix.new_zeros(self.d_out, self.d_in + 1)  # the last column is for inputs of other windows
            return add_rows_of_blocks_(delta, tables, block_squares(self.spec, matrix))[:, :-1].contiguous()
        columns = F.pad(tables.unfold(self.used_rows(matrix)), (0, 0, 0, 1))
        return columns.index_select(0, tables.spread.table[0] % len(columns))

    def gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """(R, R), where M is applied to several blocks: the window's share of dL/dM, from its input x (..., w_in) and
        the gradient g (..., w_out) of its output. Only the slots of each block that the window has are multiplied."""
        spec = self.spec
        tables = _block_tables(self, g.device)
        inputs = tables.inputs
        outputs = tables.outputs
        x = x.flatten(0, -2)
        g = g.flatten(0, -2)
        tokens = max(1, len(g)) if sums_by_product(g) else tokens_in_cache(g, max(self.d_in, self.d_out))
        runs = tables.runs
        products = [g.new_zeros(into.stop - into.start, outputs.width, inputs.width) for into, _ in runs]
        for x_part, g_part in zip(x.split(tokens), g.split(tokens), strict=True):
            z = inputs.of(x_part)
            c = outputs.of(g_part)
            for product, (into, out) in zip(products, runs, strict=True):
                product.baddbmm_(c[:, out].permute(1, 2, 0), z[:, into].transpose(0, 1))
        total = g.new_zeros(spec.blocks, spec.r_hat**2)
        for product, (into, out) in zip(products, runs, strict=True):
            elements = outputs.slots[out].unsqueeze(2) * spec.r_hat + inputs.slots[into].unsqueeze(1)
            padding = outputs.padding[out].unsqueeze(2) | inputs.padding[into].unsqueeze(1)
            total[into].scatter_add_(
                1,
                elements.flatten(1),
                product.masked_fill_(padding, 0).flatten(1),
            )
        return sum_of_blocks(spec, total.unflatten(1, (spec.r_hat, spec.r_hat)))


# -- tables of all slots ----------------------------------------------------------------------------------------------


def clear_tables() -> None:
    """Drops the cached tables of this module."""
    for cached in (_tables, _block_tables):
        cached.cache_clear()


class _Tables(NamedTuple):
    maps: IndexTables
    """The window's. Their sums have no more terms than the window has in one slot."""
    used: Tensor | None
    """For truncate and share: the rows of M, counted from the first of `Window.rows`, that the outputs read, in order;
    None for all."""


@lru_cache(maxsize=1024)
def _tables(window: Window, device: torch.device) -> _Tables:
    with torch.inference_mode(False), torch.no_grad():
        spec = window.spec
        tables = tables_of(spec, torch.device("cpu"))
        fold = tables.fold.table
        spread = tables.spread.table[:, slice(*window.outputs)].long()
        size = spec.blocks * spec.r_hat
        used = None
        if spec.blocks == 1:
            fold = fold[:, slice(*window.columns)]
            rows = spread[spread >= 0].unique()
            if not len(rows):
                rows = torch.tensor(window.rows[:1])  # one that they may read, so that no tensor is empty
            spread = torch.searchsorted(rows, spread).where(spread >= 0, -1)
            size = len(rows)
            if size < window.rows[1] - window.rows[0]:
                used = (rows - window.rows[0]).to(device)
        fold = _within(fold, window.inputs)
        maps = IndexTables(
            fold=IndexMap.of(fold, device),
            unfold=IndexMap.of(transposed(fold, window.d_in), device),
            spread=IndexMap.of(spread, device),
            collect=IndexMap.of(transposed(spread, size), device),
        )
        return _Tables(maps, used)


def _within(table: Tensor, numbers: Range) -> Tensor:
    """(K, Q) -> (K', Q): the terms in a range, counted from its start."""
    start, stop = numbers
    inside = (table >= start) & (table < stop)
    results = torch.arange(table.shape[1]).expand_as(table)
    return lists(results[inside], table[inside].long() - start, table.shape[1])


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


class _BlockTables(NamedTuple):
    inputs: _Side
    """Of the N input blocks."""
    outputs: _Side
    """Of the P blocks of each term of `collect`, one term after the other."""
    runs: tuple[tuple[slice, slice], ...]
    """Input blocks, and the blocks of `outputs` that read them: in each pair as many, one by one."""


@lru_cache(maxsize=1024)
def _block_tables(window: Window, device: torch.device) -> _BlockTables:
    """The same window, where M is applied to several blocks, without the slots that other windows have, so that its
    gradient of M costs its share of the complete one."""
    with torch.inference_mode(False), torch.no_grad():
        spec = window.spec
        tables = tables_of(spec, torch.device("cpu"))
        fold = tables.fold.table.long().view(spec.blocks, spec.r_hat)
        collect = tables.collect.table.long().unflatten(1, (-1, spec.r_hat))  # (K, P, R)
        terms, count, _ = collect.shape
        runs = []
        for term in range(terms):
            for first in range(0, spec.blocks, count):  # block b of u has the numbers of block b mod P
                into = slice(first, min(first + count, spec.blocks))
                runs.append((into, slice(term * count, term * count + into.stop - first)))
        return _BlockTables(
            inputs=_side(fold, window.inputs, device),
            outputs=_side(collect.flatten(0, 1), window.outputs, device),
            runs=tuple(runs),
        )


def _side(numbers: Tensor, bounds: Range, device: torch.device) -> _Side:
    """`numbers`: (blocks, R), the inputs (outputs) at each position of each block."""
    inside = (numbers >= bounds[0]) & (numbers < bounds[1])
    blocks, slots = inside.nonzero(as_tuple=True)
    by_block = lists(blocks, torch.arange(len(blocks)), len(numbers)).T.contiguous()
    padding = by_block < 0
    local = numbers[inside] - bounds[0]
    return _Side(
        slots=slots[by_block].masked_fill(padding, 0).to(device),
        numbers=local[by_block].masked_fill(padding, 0).to(device),
        padding=padding.to(device),
    )
