"""Decouple and rotate over the weight, block by block: what the path `blocks` computes with.

    form                W0 + delta        a copy of W0, to which M R_i is added where input block i meets an output
    square_gradient     dL/dM             sum over i of (g_i^T x_i) R_i^T, g_i and x_i the blocks of g and x

Delta has max(N, blocks_out) R^2 numbers that are not zero, of D O in all, and nothing else of it is made. All input
blocks that meet output block o are summed before they are multiplied, rotated by R_(i-o) = R_i R_o^T, so that there are
L = min(N, blocks_out) products. Blocks are gathered in the order of their pairs: a pair is then a complex number, and a
rotation a product with e^(i angle). Otherwise as `mora.effective_weight` and `mora.square_gradient`, but for rounding.

Shape legend:  T = tokens, D = d_in, O = d_out, R = r_hat, N = input blocks, Q = output blocks, P = R / 2 pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mora_ds.adapters.ops.gather import LOW_PRECISION, gather_to_scratch, scratch
from mora_ds.adapters.ops.index_tables import rope_table, tables_of
from mora_ds.adapters.ops.mora import OperatorSpec, block_pairs, tokens_in_cache
from mora_ds.adapters.ops.spec import OperatorKind


@dataclass(frozen=True)
class _Tables:
    """What both functions look up, for one operator, dtype and device."""

    inputs: Tensor
    """(N * R,) int32: the input at each position of the blocks, a block in the order of its pairs for rotate."""
    outputs: Tensor
    """(Q * R,) int32: the output at each position; (O,) where Q > N, without those that fill up the last block."""
    rows: Tensor
    """(Q, R, 1): where the row of each output starts in the formed weight; what fills up the last block is row O."""
    columns: Tensor
    """(N, 1, R): `inputs`."""
    turns: Tensor | None
    """(N, P): e^(i angle) of R_i; None for decouple."""
    relative: Tensor | None
    """((N - L) P,): of R_i R_o^T for the blocks from L on."""


@lru_cache(maxsize=512)
def _tables(spec: OperatorSpec, dtype: torch.dtype, device: torch.device) -> _Tables:
    with torch.inference_mode(False), torch.no_grad():
        found, least = tables_of(spec, device), min(spec.blocks_in, spec.blocks_out)
        turns = relative = None
        inputs, outputs, rows = found.sources.index, found.members.index, found.members.index
        if found.members.missing is not None:
            rows = rows.index_fill(0, found.members.missing, spec.d_out)
        if spec.kind is OperatorKind.ROTATE:
            inputs = inputs.view(-1, 2, spec.r_hat // 2).transpose(1, 2).flatten()  # a pair is (j, j + P)
            turns = torch.complex(*rope_table(spec.blocks_in, spec.r_hat, _wide(dtype), device))
            others = torch.arange(least, spec.blocks_in)
            relative = (turns[others] / turns[others % least]).flatten()
        return _Tables(
            inputs=inputs.int(),
            outputs=(outputs[: spec.d_out] if spec.blocks_out > spec.blocks_in else outputs).int(),
            rows=(rows * spec.d_in).view(-1, spec.r_hat, 1),
            columns=inputs.view(-1, 1, spec.r_hat),
            turns=turns,
            relative=relative,
        )


def clear_tables() -> None:
    """Drops the cached tables of this module."""
    _tables.cache_clear()


def form(spec: OperatorSpec, square: Tensor, weight: Tensor) -> Tensor:
    """weight (O, D) + delta_weight(M), contiguous, in `scratch`."""
    tables = _tables(spec, weight.dtype, weight.device)
    shape = spec.d_out + 1, spec.d_in  # one row more, for what fills up the last output block
    formed = scratch("formed", weight, *shape)
    formed[:-1] = weight
    squares = _rotated(spec, square, tables.turns).to(weight.dtype)
    for into, out in block_pairs(spec):
        places = tables.rows[out] + tables.columns[into]
        formed.view(-1).scatter_add_(0, places.flatten(), squares[into].flatten())
    return formed[:-1]


def square_gradient(spec: OperatorSpec, x: Tensor, g: Tensor) -> Tensor:
    """dL/dM (R, R) from the layer's input x (..., D) and the gradient g (..., O) of its output. As many tokens as fit
    into the cache are gathered, summed and multiplied at a time; products are summed in fp32 at least."""
    x, g = x.flatten(0, -2), g.flatten(0, -2)
    tables, least = _tables(spec, g.dtype, g.device), min(spec.blocks_in, spec.blocks_out)
    products = g.new_zeros(least, spec.r_hat, spec.r_hat, dtype=_wide(g.dtype))
    tokens = tokens_in_cache(g, max(spec.d_in, spec.d_out))
    for x_part, g_part in zip(x.split(tokens), g.split(tokens), strict=True):
        z, c = gather_to_scratch("z", x_part, tables.inputs), gather_to_scratch("c", g_part, tables.outputs)
        z, c = (
            each[:, : least * spec.r_hat].unflatten(-1, (least, -1)).transpose(0, 1)
            for each in (_sum_inputs(spec, z, tables.relative), _sum_blocks(spec, c))
        )
        if products.dtype is g.dtype:
            products.baddbmm_(c.transpose(1, 2), z)
        else:
            products += torch.bmm(c.transpose(1, 2), z)
    if spec.blocks_out == least:
        products[-1, spec.d_out - (least - 1) * spec.r_hat :] = 0  # what fills up the last block
    return _sum_rotated(products, tables.turns).to(g.dtype)


def _sum_blocks(spec: OperatorSpec, c: Tensor) -> Tensor:
    """(T, blocks * R), in place: block i is added to block i mod L."""
    size = min(spec.blocks_in, spec.blocks_out) * spec.r_hat
    for start in range(size, c.shape[1], size):
        more = c[:, start : start + size]
        c[:, : more.shape[1]] += more
    return c


def _sum_inputs(spec: OperatorSpec, z: Tensor, relative: Tensor | None) -> Tensor:
    """(T, N * R), in place but in low precision: block i, rotated by R_(i-o), is added to block o = i mod L."""
    if relative is None:
        return _sum_blocks(spec, z)
    if not len(relative):
        return z
    pairs = _as_pairs(z)
    size = pairs.shape[1] - len(relative)
    for start in range(size, pairs.shape[1], size):
        more, turn = pairs[:, start : start + size], relative[start - size : start]
        pairs[:, : more.shape[1]].addcmul_(more, turn)
    return torch.view_as_real(pairs).flatten(-2).to(z.dtype)


# -- rotations --------------------------------------------------------------------------------------------------------


def _rotated(spec: OperatorSpec, square: Tensor, turns: Tensor | None) -> Tensor:
    """(N, R, R): M R_i for every input block i, its columns in the order of pairs."""
    if turns is None:
        return square.expand(spec.blocks_in, -1, -1)
    pairs = _as_pairs(square.unflatten(-1, (2, -1)).transpose(1, 2).flatten(1))
    return torch.view_as_real(pairs * turns.conj().unsqueeze(1)).flatten(-2)


def _sum_rotated(products: Tensor, turns: Tensor | None) -> Tensor:
    """(L, R, R), columns in the order of pairs -> (R, R): the rows of product i are rotated by R_i, then added up."""
    if turns is None:
        return products.sum(dim=0)
    total = (_as_pairs(products) * turns[: len(products)].unsqueeze(1)).sum(dim=0)
    return torch.view_as_real(total).transpose(1, 2).flatten(1)


def _as_pairs(x: Tensor) -> Tensor:
    """(..., 2 n) -> (..., n) complex, a view but in low precision."""
    return torch.view_as_complex(x.to(_wide(x.dtype)).unflatten(-1, (-1, 2)))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in LOW_PRECISION else dtype
