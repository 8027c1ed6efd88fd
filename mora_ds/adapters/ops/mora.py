"""Compress, decompress, delta_weight and its adjoint: the whole mathematics of MoRA, as pure functions of tensors.

A layer with frozen weight W0 (d_out, d_in) learns one square M (r_hat, r_hat):

    h = W0 x + decompress(M compress(x))                                   MoRA, arXiv 2405.12130, eq. 3
    delta_weight(M) @ x == decompress(M compress(x))   for every x         the contract of every operator here

Shape legend:  D = d_in, O = d_out, R = r_hat, N = blocks the square is applied to (1 for truncate and share).

    compress    (..., D) -> (..., N, R)        decompress    (..., N, R) -> (..., O)
    delta_weight  (R, R) -> (O, D)             adjoint            (O, D) -> (R, R)

Both `delta_weight` and the forward pass are built from the same few index rules, so they cannot drift apart:

    padded input     position q of the padded input holds x[q mod D], q < ceil(D / R) * R  (wraps round)
    truncate         keep the first R inputs (zero-padded when R > D); zero-pad the output          eq. 4-5
    share            group sums in, group members out; a group is a residue class (strided) or a
                     run of neighbours (contiguous)                                                 eq. 6-7
    decouple         block p of the padded input through M to block p of the output                 eq. 8
    rotate           the same, input block i turned by RoPE angles i * 10000^(-2j/R) first          eq. 9-11

With `Grouping.PERMUTED`, inputs and outputs are first shuffled by permutations drawn from `seed`: ReMoRA changes
the seed every cycle, which is what lets the rank of the summed update grow.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.adapters.ops.gather import (
    LOW_PRECISION,
    add_rows,
    deal,
    gather,
    gather_sum,
    one_hot,
    rotate,
    scatters,
    sum_by,
)
from mora_ds.adapters.ops.index_tables import Index, rope_table, wiring
from mora_ds.adapters.ops.spec import Grouping, OperatorKind, OperatorSpec, default_kind, permutation_seed, square_size

__all__ = [
    "Grouping", "OperatorKind", "OperatorSpec", "adjoint", "apply_squares", "block_squares", "compress",
    "decompress", "decompress_transpose", "default_kind", "delta_weight", "effective_weight", "fold_input",
    "fold_matrix", "input_blocks", "input_columns", "mora_update", "multiplies", "output_slots", "permutation_seed",
    "rounds", "rows_of_outputs", "square_gradient", "square_gradient_of_input", "square_size", "sum_of_blocks",
    "tokens_in_cache", "turn", "unfold_input",
]  # fmt: skip


def compress(spec: OperatorSpec, x: Tensor) -> Tensor:
    """(..., D) -> (..., N, R)."""
    z = fold_input(spec, x)
    return turn(spec, z) if spec.kind is OperatorKind.ROTATE else z


def decompress(spec: OperatorSpec, z: Tensor) -> Tensor:
    """(..., N, R) -> (..., O)."""
    slots = wiring(spec, z.device).slots
    if spec.kind is OperatorKind.TRUNCATE:
        return gather(F.pad(z.squeeze(-2), (0, 1)), slots)
    if spec.blockwise and spec.blocks_in < spec.blocks_out:  # output blocks beyond the last read from the first again
        return gather(z.flatten(-2), slots % (spec.blocks_in * spec.r_hat))
    return gather((deal(z, spec.blocks_out) if spec.blockwise else z).flatten(-2), slots)


def decompress_transpose(spec: OperatorSpec, g: Tensor) -> Tensor:
    """The transpose of `decompress`: (..., O) -> (..., N, R). Takes gradients back to the square's output."""
    blocks = _output_blocks(spec, g)
    return deal(blocks, spec.blocks_in) if spec.blockwise else blocks


def fold_input(spec: OperatorSpec, x: Tensor) -> Tensor:
    """(..., D) -> (..., N, R): `compress` without rotate's turning, which `square_gradient` leaves to the products."""
    if spec.kind is not OperatorKind.SHARE:
        return input_blocks(spec, x)
    tables = wiring(spec, x.device)
    if not scatters(x):
        return gather_sum(x, tables.sources.index, tables.sources.missing, tables.sources.rows)
    if multiplies(x):
        return (x @ fold_matrix(spec, x)).unsqueeze(-2)
    z = sum_by(x, tables.places, spec.r_hat)
    if len(tables.more_sources):
        z.index_add_(-1, tables.more_places, gather(x, tables.more_sources))
    return z.unsqueeze(-2)


def unfold_input(spec: OperatorSpec, z: Tensor) -> Tensor:
    """The transpose of `fold_input`: (..., N, R) -> (..., D)."""
    tables, lanes = wiring(spec, z.device), z.flatten(-2)
    return _wrap_back(spec, gather(_or_zero(spec, lanes), tables.places), lanes)


def square_gradient(spec: OperatorSpec, folded: Tensor, g: Tensor) -> Tensor:
    """dL/dM (R, R) from `fold_input` of the layer's input (..., N, R) and the gradient g (..., O) of its output.

    Equal to adjoint(g^T x), without forming that (O, D) matrix.
    """
    if spec.blockwise:
        return _gradient_of_blocks(spec, folded, g, lambda part: part)
    z = folded.flatten(0, -2)
    if multiplies(g):
        return _output_blocks(spec, z.T @ g.flatten(0, -2)).squeeze(-2).T
    return decompress_transpose(spec, g).flatten(0, -2).T @ z


def square_gradient_of_input(spec: OperatorSpec, x: Tensor, g: Tensor, whole: bool = False) -> Tensor:
    """`square_gradient` from the layer's input x (..., D) itself; `whole`: from g^T x, an (O, D) matrix, which for
    decouple and rotate in low precision may take less time than moving both of its sides."""
    if not spec.blockwise:
        return square_gradient(spec, fold_input(spec, x), g)
    if whole:
        return adjoint(spec, g.flatten(0, -2).T @ x.flatten(0, -2))
    return _gradient_of_blocks(spec, x.unsqueeze(-2), g, lambda part: fold_input(spec, part.squeeze(-2)))


def multiplies(x: Tensor) -> bool:
    """Whether groups are summed and handed out by products (`lanes.sum_by`)."""
    return scatters(x) and x.dtype in LOW_PRECISION


def fold_matrix(spec: OperatorSpec, like: Tensor) -> Tensor:
    """(D, R) for share and truncate: compress(x) == x @ fold_matrix."""
    tables = wiring(spec, like.device)
    return one_hot(tables.places, spec.r_hat, like.dtype, tables.more_sources, tables.more_places)


def rows_of_outputs(spec: OperatorSpec, square: Tensor) -> Tensor:
    """(O, R) for share and truncate: the row of M that each output reads, so that decompress(M z) == z @ rows^T."""
    rows = F.pad(square, (0, 0, 0, 1)) if spec.kind is OperatorKind.TRUNCATE else square
    return rows.index_select(0, wiring(spec, square.device).slots)


def output_slots(spec: OperatorSpec) -> Tensor:
    """(O,) on the CPU: what each output reads. A row of M for share and truncate (-1 for none), a position in the
    output blocks, one behind the other, for decouple and rotate."""
    slots = wiring(spec, torch.device("cpu")).slots
    return slots.where(slots < spec.r_hat, -1) if spec.kind is OperatorKind.TRUNCATE else slots


def turn(spec: OperatorSpec, blocks: Tensor, back: bool = False) -> Tensor:
    """Rotate's turning of each input block (..., N, R), or its inverse."""
    cos, sin = rope_table(spec.blocks_in, spec.r_hat, blocks.dtype, blocks.device)
    return rotate(blocks, cos, -sin if back else sin)


def block_squares(spec: OperatorSpec, square: Tensor) -> Tensor:
    """(N, R, R) for decouple and rotate: M R_i for every input block i, since (M R_i) x = M (R_i x)."""
    squares = square.expand(spec.blocks_in, -1, -1)
    if spec.kind is not OperatorKind.ROTATE:
        return squares
    return turn(spec, squares.transpose(0, 1), back=True).transpose(0, 1)


def apply_squares(squares: Tensor, z: Tensor) -> Tensor:
    """(N, R, R) to the blocks of z (T, N, R), each to its own: (T, N, R)."""
    found = torch.empty_like(z)
    torch.bmm(z.transpose(0, 1), squares.transpose(1, 2), out=found.transpose(0, 1))
    return found


def mora_update(spec: OperatorSpec, square: Tensor, x: Tensor) -> Tensor:
    """decompress(M compress(x)): (..., D) -> (..., O), what the adapter adds to the frozen layer's output."""
    return decompress(spec, F.linear(compress(spec, x), square))


def delta_weight(spec: OperatorSpec, square: Tensor) -> Tensor:
    """The (O, D) matrix that the square stands for, in its dtype and on its device, sharing no memory.

    Made of separate elementwise operations and copies only, so that every device rounds it alike.
    """
    if not spec.blockwise:
        return rows_of_outputs(spec, input_columns(spec, square))
    return _block_rows(spec, square).index_select(0, wiring(spec, square.device).slots)


def effective_weight(spec: OperatorSpec, square: Tensor, weight: Tensor) -> Tensor:
    """weight (O, D) + delta_weight, a new tensor."""
    if spec.blockwise or spec.kind is OperatorKind.TRUNCATE:
        return delta_weight(spec, square).add_(weight)
    return add_rows(weight, input_columns(spec, square), wiring(spec, square.device).slots)


def input_columns(spec: OperatorSpec, square: Tensor) -> Tensor:
    """(R, D) for truncate and share: each input's column of M (zeros for one that truncate leaves out)."""
    found = gather(_or_zero(spec, square), wiring(spec, square.device).places)
    return _wrap_back(spec, found, square)


def adjoint(spec: OperatorSpec, gradient: Tensor) -> Tensor:
    """The adjoint of `delta_weight`: the gradient with respect to M, from G = dL/dW of shape (O, D).

    <delta_weight(M), G> == <M, adjoint(G)> for all M and G.
    """
    if not spec.blockwise:
        folded = fold_input(spec, gradient).squeeze(-2)
        return _output_blocks(spec, folded.T).squeeze(-2).T
    members = wiring(spec, gradient.device).members
    rows = gather(gradient.T, members.index, members.missing).T.unflatten(0, (spec.blocks_out, spec.r_hat))
    products = gradient.new_zeros(spec.blocks_in, spec.r_hat, spec.r_hat)
    for into, out in rounds(spec):
        products[into] += rows[out].gather(2, _columns_of_blocks(spec, gradient.device)[into].expand_as(products[into]))
    return sum_of_blocks(spec, products)


def input_blocks(spec: OperatorSpec, x: Tensor) -> Tensor:
    """(..., D) -> (..., N, R): permuted and padded input cut into blocks (share: those that will be summed)."""
    if _is_identity(spec):
        return x.unflatten(-1, (spec.blocks_in, spec.r_hat))
    return _taken(x, wiring(spec, x.device).sources)


def rounds(spec: OperatorSpec) -> list[tuple[slice, slice]]:
    """For decouple and rotate, the pairs (input block, output block) that meet, as runs of both: p mod N and
    p mod blocks_out for p below the larger number of blocks."""
    most, least = max(spec.blocks_in, spec.blocks_out), min(spec.blocks_in, spec.blocks_out)
    runs = [
        (slice(start, min(start + least, most)), slice(0, min(least, most - start))) for start in range(0, most, least)
    ]
    return runs if spec.blocks_in >= spec.blocks_out else [(few, many) for many, few in runs]


def sum_of_blocks(spec: OperatorSpec, products: Tensor) -> Tensor:
    """dL/dM (R, R) from the gradients (N, R, R) of `block_squares`."""
    if spec.kind is OperatorKind.ROTATE:
        products = turn(spec, products.transpose(0, 1)).transpose(0, 1)
    return products.sum(dim=0)


def tokens_in_cache(x: Tensor, width: int) -> int:
    """Tokens of `width` numbers that a CPU moves at once, so that they are still in its cache when they are multiplied;
    elsewhere all of x (tokens, ...)."""
    return max(256, 2**18 // width) if scatters(x) else max(1, len(x))


# -- parts ------------------------------------------------------------------------------------------------------------


def _is_identity(spec: OperatorSpec) -> bool:
    """Whether input blocks are but a view."""
    return spec.blockwise and spec.grouping is Grouping.PLAIN and spec.d_in % spec.r_hat == 0


def _taken(x: Tensor, table: Index) -> Tensor:
    return gather(x, table.index, table.missing).unflatten(-1, (table.rows, -1))


def _output_blocks(spec: OperatorSpec, g: Tensor) -> Tensor:
    """(..., O) -> (..., 1, R), or the output blocks (..., blocks_out, R) for decouple and rotate."""
    tables = wiring(spec, g.device)
    if spec.kind is OperatorKind.SHARE and scatters(g):
        return sum_by(g, tables.slots, spec.r_hat).unsqueeze(-2)
    if spec.kind is OperatorKind.SHARE:
        return gather_sum(g, tables.members.index, tables.members.missing, tables.members.rows)
    return _taken(g, tables.members)


def _or_zero(spec: OperatorSpec, lanes: Tensor) -> Tensor:
    """With one more lane, of zeros, for what reads none."""
    return F.pad(lanes, (0, 1)) if spec.kind is OperatorKind.TRUNCATE else lanes


def _wrap_back(spec: OperatorSpec, found: Tensor, lanes: Tensor) -> Tensor:
    """Adds in place, to the inputs (..., D) that lie at a second place, what that place holds: in turns of D at most,
    so that no turn adds to one input twice."""
    tables = wiring(spec, lanes.device)
    for sources, places in zip(tables.more_sources.split(spec.d_in), tables.more_places.split(spec.d_in), strict=True):
        if len(sources):
            found.index_add_(-1, sources, gather(lanes, places))
    return found


def _gradient_of_blocks(spec: OperatorSpec, saved: Tensor, g: Tensor, fold: Callable[[Tensor], Tensor]) -> Tensor:
    """dL/dM for decouple and rotate, a run of tokens at a time; `fold` makes blocks of what was saved of them."""
    saved, g = saved.flatten(0, -3), g.flatten(0, -2)
    tokens = tokens_in_cache(g, max(spec.d_in, spec.d_out))
    products = g.new_zeros(spec.blocks_in, spec.r_hat, spec.r_hat)
    for part, g_part in zip(saved.split(tokens), g.split(tokens), strict=True):
        z, c = fold(part), _output_blocks(spec, g_part)
        for into, out in rounds(spec):
            products[into].baddbmm_(c[:, out].permute(1, 2, 0), z[:, into].transpose(0, 1))
    return sum_of_blocks(spec, products)


def _columns_of_blocks(spec: OperatorSpec, device: torch.device) -> Tensor:
    """(N, 1, R): the input at each place of each block."""
    return wiring(spec, device).sources.index.view(spec.blocks_in, 1, spec.r_hat)


def _block_rows(spec: OperatorSpec, square: Tensor) -> Tensor:
    """(blocks_out * R, D) for decouple and rotate: every square written where its blocks meet. What wraps round in the
    last block is added afterwards: nothing else meets a column twice."""
    squares, columns = block_squares(spec, square), _columns_of_blocks(spec, square.device)
    canvas = squares.new_zeros(spec.blocks_out, spec.r_hat, spec.d_in)
    last, kept = spec.blocks_in - 1, spec.d_in - (spec.blocks_in - 1) * spec.r_hat
    wrapped = []
    for into, out in rounds(spec):
        if into.stop > last and kept < spec.r_hat:
            wrapped.append(canvas[out.stop - 1])
            _place(wrapped[-1], columns[last, :, :kept], squares[last, :, :kept])
            into, out = slice(into.start, last), slice(out.start, out.stop - 1)
        _place(canvas[out], columns[into], squares[into])
    for start in range(kept, spec.r_hat, spec.d_in):  # a block longer than the input meets a column several times
        part = slice(start, start + spec.d_in)
        for rows in wrapped:
            values = squares[last, :, part]
            rows.scatter_add_(1, columns[last, :, part].expand_as(values), values)
    return canvas.flatten(0, 1)


def _place(rows: Tensor, columns: Tensor, values: Tensor) -> None:
    rows.scatter_(-1, columns.expand_as(values), values)
