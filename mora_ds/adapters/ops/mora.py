"""MoRA's operators: compress, decompress, delta_weight and its adjoint, as pure functions of tensors.

A layer with frozen weight W0 (d_out, d_in) learns one square matrix M (r_hat, r_hat):

    h = W0 x + decompress(M compress(x))                                   MoRA, arXiv 2405.12130, eq. 3
    delta_weight(M) @ x == decompress(M compress(x))   for every x         the contract of every operator here

Shape legend:  D = d_in, O = d_out, R = r_hat, N = blocks that M is applied to (1 for truncate and share).

    compress    (..., D) -> (..., N, R)        decompress    (..., N, R) -> (..., O)
    delta_weight  (R, R) -> (O, D)             adjoint            (O, D) -> (R, R)

Both `delta_weight` and the forward pass are built from the same few index rules (`index_tables`):

    padded input     position q of the padded input holds x[q mod D], q < ceil(D / R) * R
    truncate         keep the first R inputs (zero-padded when R > D); zero-pad the output          eq. 4-5
    share            inputs are summed in groups, an output is a copy of its group's; a group is a residue class
                     (strided) or a run of neighbours (contiguous)                                  eq. 6-7
    decouple         block p of the padded input through M to block p of the output                 eq. 8
    rotate           the same, input block i first rotated by RoPE angles i * 10000^(-2j/R)         eq. 9-11

(The reference implementation calls share type 1 and rotate type 6.) With `Grouping.PERMUTED`, inputs and outputs are
first shuffled by permutations drawn from `seed`: ReMoRA changes the seed every cycle, which lets the rank of the summed
update grow.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.adapters.ops.gather import (
    LOW_PRECISION,
    gather,
    prefers_scatter,
    reuses_memory,
    rotate,
    scratch,
)
from mora_ds.adapters.ops.index_tables import IndexMap, rope_table, tables_of
from mora_ds.adapters.ops.spec import Grouping, OperatorKind, SquareSpec
from mora_ds.common.errors import UserError, unknown
from mora_ds.common.untrusted import MAX_SIDE


@dataclass(frozen=True)
class OperatorSpec(SquareSpec):
    """An operator with its sizes. Raises `UserError` for sizes or groupings that make no operator."""

    kind: OperatorKind
    d_in: int
    d_out: int
    r_hat: int
    grouping: Grouping = Grouping.PLAIN
    seed: int = 0
    """Seed of the permutations; read only when `grouping` is PERMUTED."""
    in_segments: int = 1
    """Share: inputs and columns of M are cut into this number of segments, and an input belongs to a column of its own
    segment."""
    out_segments: int = 1
    """The same for outputs and rows of M."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", _member(OperatorKind, self.kind, "operator"))
        object.__setattr__(self, "grouping", _member(Grouping, self.grouping, "grouping"))
        if min(self.d_in, self.d_out, self.r_hat) < 1 or max(self.d_in, self.d_out, self.r_hat) > MAX_SIDE:
            raise UserError(f"an operator needs positive sizes, and none above {MAX_SIDE:,}, got {self}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"the seed of an operator's permutations must be from 0 to 2^32 - 1, got {self.seed}")
        if self.kind is OperatorKind.ROTATE and self.r_hat % 2:
            raise UserError(f"rotate pairs dimensions, so r_hat must be even, got {self.r_hat}")
        is_share, segments = self.kind is OperatorKind.SHARE, max(self.in_segments, self.out_segments)
        if not is_share and self.grouping not in (Grouping.PLAIN, Grouping.PERMUTED):
            raise UserError(f"grouping {self.grouping.value!r} belongs to operator 'share', not {self.kind.value!r}")
        if min(self.in_segments, self.out_segments) < 1 or (segments > 1 and not is_share):
            raise UserError(f"segments belong to operator 'share', and are at least 1, got {self}")
        if segments > self.r_hat:
            raise UserError(f"r_hat must be at least the number of segments, {segments}, got {self.r_hat}")

    @property
    def blocks_in(self) -> int:
        return math.ceil(self.d_in / self.r_hat)

    @property
    def blocks_out(self) -> int:
        return math.ceil(self.d_out / self.r_hat)

    @property
    def blockwise(self) -> bool:
        """Whether M is applied to each of several blocks (decouple, rotate) instead of once (truncate, share)."""
        return self.kind in (OperatorKind.DECOUPLE, OperatorKind.ROTATE)

    @property
    def blocks(self) -> int:
        return self.blocks_in if self.blockwise else 1

    def delta_weight(self, value: Tensor) -> Tensor:
        return delta_weight(self, value)

    def low_rank(self, value: Tensor) -> tuple[Tensor, Tensor] | None:
        """For truncate and share: A says which inputs are summed (zeros and ones), B holds the rows of M."""
        return None if self.blockwise else (fold_matrix(self, value).T, rows_of_outputs(self, value))

    def adjoint(self, gradient: Tensor) -> Tensor:
        return adjoint(self, gradient)

    def describe(self) -> str:
        return f"{self.kind.value}/{self.grouping.value}"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kind": self.kind.value, "grouping": self.grouping.value}


def _member(enum: type[Enum], value: Any, what: str) -> Any:
    known = [member.value for member in enum]
    if value not in known:
        raise UserError(unknown(what, value, known))
    return enum(value)


def compress(spec: OperatorSpec, x: Tensor) -> Tensor:
    """(..., D) -> (..., N, R)."""
    return rotate_blocks(spec, fold_input(spec, x))


def decompress(spec: OperatorSpec, z: Tensor) -> Tensor:
    """(..., N, R) -> (..., O)."""
    return tables_of(spec, z.device).deal(z.flatten(-2))


def decompress_transpose(spec: OperatorSpec, g: Tensor) -> Tensor:
    """The transpose of `decompress`, (..., O) -> (..., N, R): from a gradient of the output to one of M compress(x)."""
    tables = tables_of(spec, g.device)
    return _sums(spec, g, tables.collect, tables.deal)


def fold_input(spec: OperatorSpec, x: Tensor) -> Tensor:
    """(..., D) -> (..., N, R): `compress` without the rotation of rotate."""
    if spec.blockwise and spec.grouping is Grouping.PLAIN and spec.d_in % spec.r_hat == 0:
        return x.unflatten(-1, (spec.blocks, spec.r_hat))  # a view
    tables = tables_of(spec, x.device)
    return _sums(spec, x, tables.fold, tables.unfold)


def unfold_input(spec: OperatorSpec, z: Tensor) -> Tensor:
    """The transpose of `fold_input`: (..., N, R) -> (..., D)."""
    return input_columns(spec, z.flatten(-2))


def _sums(spec: OperatorSpec, x: Tensor, sums: IndexMap, transpose: IndexMap) -> Tensor:
    """The map `sums` applied to x, as blocks (..., N, R). By scattering where that is faster, and in low precision by a
    product with ones and zeros: CPUs multiply such numbers faster than they move them one by one, and sum them in
    fp32."""
    if spec.blockwise or len(sums.table) == 1 or not prefers_scatter(x):
        total = sums(x)
    elif sums_by_product(x):
        total = x @ _matrix(transpose, spec.r_hat, x.dtype)
    else:
        flat = x.reshape(-1, x.shape[-1])
        groups = transpose.table[0].long().expand(len(flat), -1)
        total = flat.new_zeros(len(flat), spec.r_hat).scatter_add_(1, groups, flat)
        for members, more_groups in transpose.additions:
            total.index_add_(1, more_groups, gather(flat, members))
        total = total.view(*x.shape[:-1], spec.r_hat)
    return total.unflatten(-1, (spec.blocks, spec.r_hat))


def _matrix(transpose: IndexMap, size: int, dtype: torch.dtype) -> Tensor:
    """(inputs, size): x @ it is the map whose transpose is given."""
    table = transpose.table.T
    ones = torch.zeros(len(table), size + 1, dtype=dtype, device=table.device)
    ones.scatter_(1, table.where(table >= 0, size).long(), 1)
    return ones[:, :size]


def square_gradient(spec: OperatorSpec, saved: Tensor, g: Tensor, form_dense: bool = False) -> Tensor:
    """dL/dM (R, R) from the gradient g (..., O) of the layer's output; equal to adjoint(g^T x), which is not formed.

    `saved`: the layer's input x (..., D) for decouple and rotate, `fold_input` of it for truncate and share.
    `form_dense`: decouple and rotate do form g^T x (O, D), which in low precision may take less time.
    """
    if not spec.blockwise:
        z = saved.flatten(0, -2)
        if sums_by_product(g):
            return decompress_transpose(spec, z.T @ g.flatten(0, -2)).squeeze(-2).T
        return decompress_transpose(spec, g).flatten(0, -2).T @ z
    x, g = saved.flatten(0, -2), g.flatten(0, -2)
    if form_dense:
        return adjoint(spec, g.T @ x)
    tokens = tokens_in_cache(g, max(spec.d_in, spec.d_out))
    products = g.new_zeros(spec.blocks_in, spec.r_hat, spec.r_hat)
    for x_part, g_part in zip(x.split(tokens), g.split(tokens), strict=True):
        z, c = fold_input(spec, x_part), decompress_transpose(spec, g_part)
        products.baddbmm_(c.permute(1, 2, 0), z.transpose(0, 1))
    return sum_of_blocks(spec, products)


def sums_by_product(x: Tensor) -> bool:
    """Whether groups of x are summed, and copied to outputs, by products with matrices of ones and zeros."""
    return prefers_scatter(x) and x.dtype in LOW_PRECISION


def fold_matrix(spec: OperatorSpec, like: Tensor) -> Tensor:
    """(D, R) for share and truncate, in the dtype of `like`: compress(x) == x @ fold_matrix."""
    return _matrix(tables_of(spec, like.device).unfold, spec.r_hat, like.dtype)


def rows_of_outputs(spec: OperatorSpec, square: Tensor) -> Tensor:
    """(O, R) for share and truncate: the row of M that each output reads, so that decompress(M z) == z @ rows^T."""
    rows, slots = rows_and_slots(spec, square)
    return rows.index_select(0, slots)


def rows_and_slots(spec: OperatorSpec, rows: Tensor) -> tuple[Tensor, Tensor]:
    """For share and truncate, of rows (R, ...): these, with one of zeros where truncate has outputs that read none, and
    for each output (O,) the row that it reads."""
    deal = tables_of(spec, rows.device).deal
    if deal.missing is not None:
        rows = torch.cat((rows, torch.zeros_like(rows[:1])))
    return rows, deal.table[0] % len(rows)


def rotate_blocks(spec: OperatorSpec, blocks: Tensor, back: bool = False) -> Tensor:
    """The rotation of each input block (..., N, R), or its inverse; for all operators but rotate, the blocks
    themselves."""
    if spec.kind is not OperatorKind.ROTATE:
        return blocks
    cos, sin = rope_table(spec.blocks_in, spec.r_hat, blocks.dtype, blocks.device)
    return rotate(blocks, cos, -sin if back else sin)


def block_squares(spec: OperatorSpec, square: Tensor) -> Tensor:
    """(N, R, R) for decouple and rotate: M R_i for every input block i, since (M R_i) x = M (R_i x)."""
    squares = square.expand(spec.blocks_in, -1, -1)
    return rotate_blocks(spec, squares.transpose(0, 1), back=True).transpose(0, 1)


def apply_squares(squares: Tensor, z: Tensor) -> Tensor:
    """The product of each of the (N, R, R) with its block of z (T, N, R): (T, N, R)."""
    product = torch.empty_like(z)
    torch.bmm(z.transpose(0, 1), squares.transpose(1, 2), out=product.transpose(0, 1))
    return product


def mora_update(spec: OperatorSpec, square: Tensor, x: Tensor) -> Tensor:
    """decompress(M compress(x)): (..., D) -> (..., O), what the adapter adds to the frozen layer's output."""
    return decompress(spec, F.linear(compress(spec, x), square))


def delta_weight(spec: OperatorSpec, square: Tensor) -> Tensor:
    """The (O, D) change of the weight that M stands for, in its dtype and on its device, sharing no memory.

    Made of separate elementwise operations and copies only, so that every device rounds it alike.
    """
    if not spec.blockwise:
        return rows_of_outputs(spec, input_columns(spec, square))
    return add_blocks_(square.new_zeros(spec.d_out, spec.d_in), spec, square)


def add_blocks_(total: Tensor, spec: OperatorSpec, square: Tensor) -> Tensor:
    """total (O, D) + `delta_weight` of decouple or rotate, in place: M R_i wherever input block i meets an output
    block, as the delta is zero elsewhere. Every element is changed once, so that it is rounded once.

    The first inputs also fill up the last block. Where both blocks of such an input meet one output block, their
    columns are summed before they are added.
    """
    outputs = output_blocks(spec, total.device).flatten()[: spec.d_out].split(spec.r_hat)
    inputs = list(tables_of(spec, total.device).fold.table.long().view(-1, spec.r_hat))
    squares = list(block_squares(spec, square))
    last = spec.blocks_in - 1
    filled = spec.d_in - last * spec.r_hat
    if filled < spec.r_hat and last % spec.blocks_out == 0:
        leading, fills = squares[0].clone(), squares[last]
        for start in range(filled, spec.r_hat, spec.d_in):  # a block longer than the input has a column several times
            columns = fills[:, start : start + spec.d_in]
            leading[:, : columns.shape[1]] += columns
        squares[0] = leading
        squares[last] = squares[last][:, :filled]
        inputs[last] = inputs[last][:filled]
    flat = total.view(-1)
    for pair in range(max(spec.blocks_in, spec.blocks_out)):
        reads, feeds = outputs[pair % spec.blocks_out], inputs[pair % spec.blocks_in]
        places = reads.unsqueeze(1) * spec.d_in + feeds
        flat.index_add_(0, places.flatten(), squares[pair % spec.blocks_in][: len(reads)].flatten())
    return total


def effective_weight(spec: OperatorSpec, square: Tensor, weight: Tensor) -> Tensor:
    """weight (O, D) + delta_weight, contiguous. It may lie in `scratch`: it holds until the next call."""
    if spec.blockwise:
        formed = scratch("formed", square, spec.d_out, spec.d_in).copy_(weight)
        return add_blocks_(formed, spec, square)
    rows, slots = rows_and_slots(spec, input_columns(spec, square))
    memory = scratch("formed", rows, spec.d_out, spec.d_in) if reuses_memory(rows) else None
    return torch.index_select(rows, 0, slots, out=memory).add_(weight)


def input_columns(spec: OperatorSpec, square: Tensor) -> Tensor:
    """(R, R) -> (R, D) for truncate and share: each input's column of M (zeros for one that truncate leaves out). In
    general (..., N * R) -> (..., D): for each input the sum of what lies at its positions."""
    return tables_of(spec, square.device).unfold(square)


def adjoint(spec: OperatorSpec, gradient: Tensor) -> Tensor:
    """The adjoint of `delta_weight`: the gradient with respect to M, from G = dL/dW of shape (O, D).

    <delta_weight(M), G> == <M, adjoint(G)> for all M and G.
    """
    if not spec.blockwise:
        folded = fold_input(spec, gradient).squeeze(-2)
        return decompress_transpose(spec, folded.T).squeeze(-2).T
    members = output_blocks(spec, gradient.device)
    rows = F.pad(gradient, (0, 0, 0, 1))[members]  # (blocks_out, R, D); index -1 is the row of zeros
    columns = tables_of(spec, gradient.device).fold.table.long().view(spec.blocks_in, 1, spec.r_hat)
    products = gradient.new_zeros(spec.blocks_in, spec.r_hat, spec.r_hat)
    for into, out in block_pairs(spec):
        products[into] += rows[out].gather(2, columns[into].expand_as(products[into]))
    return sum_of_blocks(spec, products)


def output_blocks(spec: OperatorSpec, device: torch.device) -> Tensor:
    """(blocks_out, R) for decouple and rotate: the output at each position of each output block, -1 for none."""
    return tables_of(spec, device).collect.table.long().view(-1, spec.r_hat)[: spec.blocks_out]


def block_pairs(spec: OperatorSpec) -> list[tuple[slice, slice]]:
    """For decouple and rotate, the pairs (input block, output block) that M connects, as slices of both: p mod N and
    p mod blocks_out for p below the larger number of blocks."""
    most, least = max(spec.blocks_in, spec.blocks_out), min(spec.blocks_in, spec.blocks_out)
    runs = [
        (slice(start, min(start + least, most)), slice(0, min(least, most - start))) for start in range(0, most, least)
    ]
    return runs if spec.blocks_in >= spec.blocks_out else [(few, many) for many, few in runs]


def sum_of_blocks(spec: OperatorSpec, products: Tensor) -> Tensor:
    """dL/dM (R, R) from the gradients (N, R, R) of `block_squares`."""
    return rotate_blocks(spec, products.transpose(0, 1)).transpose(0, 1).sum(dim=0)


def tokens_in_cache(x: Tensor, width: int) -> int:
    """How many tokens of `width` numbers to gather and multiply at once: on a CPU, what stays in its cache; elsewhere
    all of x (tokens, ...)."""
    return max(256, 2**18 // width) if prefers_scatter(x) else max(1, len(x))
