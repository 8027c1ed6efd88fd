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

import torch
from torch import Tensor

from mora_ds.adapters.ops.gather import LOW_PRECISION, gather
from mora_ds.adapters.ops.index_tables import rope_table, tables_of
from mora_ds.adapters.ops.mora import OperatorSpec, block_pairs, tokens_in_cache
from mora_ds.adapters.ops.spec import OperatorKind


def form(spec: OperatorSpec, square: Tensor, weight: Tensor) -> Tensor:
    """weight (O, D) + delta_weight(M), a new contiguous tensor."""
    tables = tables_of(spec, weight.device)
    formed = weight.new_empty(spec.d_out + 1, spec.d_in)  # one row more, for what fills up the last output block
    formed[:-1] = weight
    rows = tables.members.index
    if tables.members.missing is not None:
        rows = rows.index_fill(0, tables.members.missing, spec.d_out)
    rows = (rows * spec.d_in).view(-1, spec.r_hat, 1)
    columns = _by_pairs(spec, tables.sources.index).view(-1, 1, spec.r_hat)
    squares = _rotated(spec, square).to(weight.dtype)
    for into, out in block_pairs(spec):
        formed.view(-1).scatter_add_(0, (rows[out] + columns[into]).flatten(), squares[into].flatten())
    return formed[:-1]


def square_gradient(spec: OperatorSpec, x: Tensor, g: Tensor) -> Tensor:
    """dL/dM (R, R) from the layer's input x (..., D) and the gradient g (..., O) of its output. As many tokens as fit
    into the cache are gathered, summed and multiplied at a time; products are summed in fp32 at least."""
    x, g = x.flatten(0, -2), g.flatten(0, -2)
    tables, least = tables_of(spec, g.device), min(spec.blocks_in, spec.blocks_out)
    inputs, outputs = _by_pairs(spec, tables.sources.narrow), tables.members.narrow
    products = g.new_zeros(least, spec.r_hat, spec.r_hat, dtype=_wide(g.dtype))
    tokens = tokens_in_cache(g, max(spec.d_in, spec.d_out))
    for x_part, g_part in zip(x.split(tokens), g.split(tokens), strict=True):
        z, c = gather(x_part, inputs), gather(g_part, outputs)
        c[:, spec.d_out :] = 0  # what fills up the last block
        z, c = (each.unflatten(-1, (-1, spec.r_hat)) for each in (_sum_inputs(spec, z), _sum_outputs(spec, c)))
        products += torch.bmm(c[:, :least].permute(1, 2, 0), z[:, :least].transpose(0, 1))
    return _sum_rotated(spec, products).to(g.dtype)


def _sum_outputs(spec: OperatorSpec, c: Tensor) -> Tensor:
    """(T, Q * R), in place: block o is added to block o mod L."""
    size = min(spec.blocks_in, spec.blocks_out) * spec.r_hat
    for start in range(size, c.shape[1], size):
        more = c[:, start : start + size]
        c[:, : more.shape[1]] += more
    return c


def _sum_inputs(spec: OperatorSpec, z: Tensor) -> Tensor:
    """(T, N * R), in place but in low precision: block i, rotated by R_(i-o), is added to block o = i mod L."""
    least = min(spec.blocks_in, spec.blocks_out)
    if spec.kind is not OperatorKind.ROTATE:
        return _sum_outputs(spec, z)
    if spec.blocks_in == least:
        return z
    pairs, turns = _as_pairs(z), _turns(spec, z)
    for start in range(least, spec.blocks_in, least):
        turn = turns[start : start + least]
        turn = (turn / turns[: len(turn)]).flatten()
        more = pairs[:, start * turns.shape[1] :][:, : len(turn)]
        pairs[:, : len(turn)].addcmul_(more, turn)
    return torch.view_as_real(pairs).flatten(-2).to(z.dtype)


# -- rotations --------------------------------------------------------------------------------------------------------


def _by_pairs(spec: OperatorSpec, positions: Tensor) -> Tensor:
    """(N * R,): the positions of the blocks in the order of their pairs (j, j + P); decouple: as they are."""
    if spec.kind is not OperatorKind.ROTATE:
        return positions
    return positions.view(-1, 2, spec.r_hat // 2).transpose(1, 2).flatten()


def _rotated(spec: OperatorSpec, square: Tensor) -> Tensor:
    """(N, R, R): M R_i for every input block i, its columns in the order of pairs."""
    if spec.kind is not OperatorKind.ROTATE:
        return square.expand(spec.blocks_in, -1, -1)
    pairs = _as_pairs(square.unflatten(-1, (2, -1)).transpose(1, 2).flatten(1))
    return torch.view_as_real(pairs * _turns(spec, square, back=True).unsqueeze(1)).flatten(-2)


def _sum_rotated(spec: OperatorSpec, products: Tensor) -> Tensor:
    """(L, R, R), columns in the order of pairs -> (R, R): the rows of product i are rotated by R_i, then added up."""
    if spec.kind is not OperatorKind.ROTATE:
        return products.sum(dim=0)
    turns = _turns(spec, products)[: len(products)].unsqueeze(1)
    return torch.view_as_real((_as_pairs(products) * turns).sum(dim=0)).transpose(1, 2).flatten(1)


def _turns(spec: OperatorSpec, like: Tensor, back: bool = False) -> Tensor:
    """(N, P): e^(i angle) of every block and pair, or of minus the angle."""
    cos, sin = rope_table(spec.blocks_in, spec.r_hat, _wide(like.dtype), like.device)
    return torch.complex(cos, -sin if back else sin)


def _as_pairs(x: Tensor) -> Tensor:
    """(..., 2 n) -> (..., n) complex, a view but in low precision."""
    return torch.view_as_complex(x.to(_wide(x.dtype)).unflatten(-1, (-1, 2)))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in LOW_PRECISION else dtype
