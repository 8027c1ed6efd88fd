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

import hashlib
import math
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.errors import UserError, nearest
from mora_ds.lanes import deal, pick, resize, rotate, unwrap, wrap
from mora_ds.tables import lane_members, permutation_tables, rope_table, run_lengths, segment_lanes, strided_groups

ROTATE_BELOW_RANK = 64
"""Below this LoRA-equivalent rank `default_kind` rotates, from it on it shares (paper: rotate at 8, share at 256)."""


class OperatorKind(str, Enum):
    """The four families of compress / decompress pairs of the paper."""

    TRUNCATE = "truncate"
    SHARE = "share"
    DECOUPLE = "decouple"
    ROTATE = "rotate"


class Grouping(str, Enum):
    """Which inputs (outputs) meet in one slot. PLAIN and PERMUTED fit every kind; the others only `share`."""

    PLAIN = "plain"
    PERMUTED = "permuted"
    STRIDED = "strided"
    CONTIGUOUS = "contiguous"
    CONTIGUOUS_STRIDED = "contiguous-strided"
    STRIDED_CONTIGUOUS = "strided-contiguous"

    @property
    def contiguous_in(self) -> bool:
        return self in (Grouping.CONTIGUOUS, Grouping.CONTIGUOUS_STRIDED)

    @property
    def contiguous_out(self) -> bool:
        return self in (Grouping.CONTIGUOUS, Grouping.STRIDED_CONTIGUOUS)


@dataclass(frozen=True)
class OperatorSpec:
    """Everything that fixes an operator: the ledger stores it beside each square.

    Raises `UserError` for sizes or groupings that make no operator.
    """

    kind: OperatorKind
    d_in: int
    d_out: int
    r_hat: int
    grouping: Grouping = Grouping.PLAIN
    seed: int = 0
    """Seed of the permutations; read only when `grouping` is PERMUTED."""
    in_segments: int = 1
    """Cut the inputs and the columns of M into so many runs; an input meets columns of its own run only. For share."""
    out_segments: int = 1
    """The same of the outputs and the rows of M."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", _member(OperatorKind, self.kind, "operator"))
        object.__setattr__(self, "grouping", _member(Grouping, self.grouping, "grouping"))
        if min(self.d_in, self.d_out, self.r_hat) < 1:
            raise UserError(f"an operator needs positive sizes, got {self}")
        if self.kind is OperatorKind.ROTATE and self.r_hat % 2:
            raise UserError(f"rotate pairs dimensions, so r_hat must be even, got {self.r_hat}")
        if self.kind is not OperatorKind.SHARE and self.grouping not in (Grouping.PLAIN, Grouping.PERMUTED):
            raise UserError(f"grouping {self.grouping.value!r} belongs to operator 'share', not {self.kind.value!r}")
        segments = max(self.in_segments, self.out_segments)
        if min(self.in_segments, self.out_segments) < 1 or (segments > 1 and self.kind is not OperatorKind.SHARE):
            raise UserError(f"segments belong to operator 'share', and are at least 1, got {self}")
        if segments > self.r_hat:
            raise UserError(f"{segments} segments need a square of that side at least, got {self.r_hat}")

    @property
    def blocks_in(self) -> int:
        return math.ceil(self.d_in / self.r_hat)

    @property
    def blocks_out(self) -> int:
        return math.ceil(self.d_out / self.r_hat)

    @property
    def blockwise(self) -> bool:
        """Whether M is applied to each of several blocks (decouple, rotate) instead of once."""
        return self.kind in (OperatorKind.DECOUPLE, OperatorKind.ROTATE)

    def to_dict(self) -> dict[str, Any]:
        """Without segments where there are none, as before there were any."""
        values = {**asdict(self), "kind": self.kind.value, "grouping": self.grouping.value}
        return {key: value for key, value in values.items() if not (key.endswith("_segments") and value == 1)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OperatorSpec:
        return cls(**values)


def _member(enum: type[Enum], value: Any, what: str) -> Any:
    try:
        return enum(value)
    except ValueError:
        known = [member.value for member in enum]
        raise UserError(f"unknown {what} {value!r}; known: {', '.join(known)}.{nearest(str(value), known)}") from None


def default_kind(rank: int) -> OperatorKind:
    """The operator for a LoRA-equivalent `rank` when none is named: rotate for small ranks, share for large ones."""
    return OperatorKind.ROTATE if rank < ROTATE_BELOW_RANK else OperatorKind.SHARE


def square_size(d_in: int, d_out: int, rank: int, kind: OperatorKind) -> int:
    """r_hat = floor(sqrt((d_in + d_out) * rank)): a square of a rank-`rank` LoRA's parameters (paper, section 3).

    Rounded down to even for rotate. Raises `UserError` where the rank is too small for any square.
    """
    if rank < 1:
        raise UserError(f"--mora_rank must be at least 1, got {rank}")
    r_hat = math.isqrt((d_in + d_out) * rank)
    return r_hat - r_hat % 2 if kind is OperatorKind.ROTATE else r_hat


def permutation_seed(run_seed: int, layer: str, cycle: int) -> int:
    """The seed of a layer's permutations in a cycle: a hash, so that it never depends on the order of layers."""
    digest = hashlib.sha256(f"{run_seed}/{layer}/{cycle}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def compress(spec: OperatorSpec, x: Tensor) -> Tensor:
    """(..., D) -> (..., N, R)."""
    if spec.grouping.contiguous_in and spec.in_segments == 1:
        return _sum_runs(x, spec.r_hat).unsqueeze(-2)
    blocks = input_blocks(spec, x)
    if spec.kind is OperatorKind.SHARE:
        return blocks.sum(dim=-2, keepdim=True)
    return rotate(blocks, *_angles(spec, x)) if spec.kind is OperatorKind.ROTATE else blocks


def decompress(spec: OperatorSpec, z: Tensor) -> Tensor:
    """(..., N, R) -> (..., O). The inverse permutation, if any, comes last."""
    if spec.kind is OperatorKind.TRUNCATE:
        y = resize(z.squeeze(-2), spec.d_out)
    elif spec.grouping.contiguous_out or spec.out_segments > 1:
        y = pick(z.squeeze(-2), _output_lanes(spec, z.device))
    else:
        y = deal(z, spec.blocks_out).flatten(-2)[..., : spec.d_out]
    if spec.grouping is Grouping.PERMUTED:
        y = pick(y, _inverse_permutations(spec, z.device)[1])
    return y


def decompress_transpose(spec: OperatorSpec, g: Tensor) -> Tensor:
    """The transpose of `decompress`: (..., O) -> (..., N, R). Takes gradients back to the square's output."""
    if spec.grouping is Grouping.PERMUTED:
        g = pick(g, _permutations(spec, g.device)[1])
    if spec.kind is OperatorKind.TRUNCATE:
        return resize(g, spec.r_hat).unsqueeze(-2)
    if spec.out_segments > 1:
        members = lane_members(spec.d_out, spec.r_hat, spec.out_segments, spec.grouping.contiguous_out, g.device)
        return pick(F.pad(g, (0, 1)), members.flatten()).unflatten(-1, members.shape).sum(dim=-2, keepdim=True)
    if spec.grouping.contiguous_out:
        return _sum_runs(g, spec.r_hat).unsqueeze(-2)
    blocks = resize(g, spec.blocks_out * spec.r_hat).unflatten(-1, (spec.blocks_out, spec.r_hat))
    return deal(blocks, spec.blocks_in if spec.blockwise else 1)


def fold_input(spec: OperatorSpec, x: Tensor) -> Tensor:
    """(..., D) -> (..., N, R): `compress` without rotate's turning, which `square_gradient` leaves to the products."""
    return input_blocks(spec, x) if spec.blockwise else compress(spec, x)


def square_gradient(spec: OperatorSpec, folded: Tensor, g: Tensor) -> Tensor:
    """dL/dM (R, R) from `fold_input` of the layer's input (..., N, R) and the gradient g (..., O) of its output.

    Equal to adjoint(g^T x), without forming that (O, D) matrix.
    """
    z = decompress_transpose(spec, g).flatten(0, -3)
    products = z.permute(1, 2, 0) @ folded.flatten(0, -3).transpose(0, 1)
    if spec.kind is OperatorKind.ROTATE:
        cos, sin = _angles(spec, products)
        products = rotate(products, cos.unsqueeze(1), sin.unsqueeze(1))
    return products.sum(dim=0)


def output_slots(spec: OperatorSpec) -> Tensor:
    """(O,) on the CPU: what each output reads. A row of M for share and truncate (-1 for none), a position in the
    output blocks, one behind the other, for decouple and rotate."""
    slots = torch.arange(spec.d_out)
    if spec.kind is OperatorKind.TRUNCATE:
        slots = slots.where(slots < spec.r_hat, -1)
    elif spec.kind is OperatorKind.SHARE:
        slots = _output_lanes(spec, slots.device)
    return slots[_inverse_permutations(spec, slots.device)[1]] if spec.grouping is Grouping.PERMUTED else slots


def turn(spec: OperatorSpec, blocks: Tensor, back: bool = False) -> Tensor:
    """Rotate's turning of each input block (..., N, R), or its inverse."""
    cos, sin = _angles(spec, blocks)
    return rotate(blocks, cos, -sin if back else sin)


def mora_update(spec: OperatorSpec, square: Tensor, x: Tensor) -> Tensor:
    """decompress(M compress(x)): (..., D) -> (..., O), what the adapter adds to the frozen layer's output."""
    return decompress(spec, F.linear(compress(spec, x), square))


def delta_weight(spec: OperatorSpec, square: Tensor) -> Tensor:
    """The (O, D) matrix that the square stands for, in its dtype and on its device, sharing no memory.

    Made of separate elementwise operations and copies only, so that every device rounds it alike.
    """
    if spec.blockwise:
        delta = unwrap(_place_blocks(spec, block_squares(spec, square)), spec.d_in)
    else:
        delta = input_columns(spec, square)  # rows come last: a gather of whole rows is as fast as a copy
    if spec.blockwise and spec.grouping is Grouping.PERMUTED:
        delta = delta.index_select(1, _inverse_permutations(spec, square.device)[0])
    if not spec.blockwise:
        delta = _output_rows(spec, delta)
    if spec.grouping is Grouping.PERMUTED:
        delta = delta.index_select(0, _inverse_permutations(spec, square.device)[1])
    return delta


def input_columns(spec: OperatorSpec, square: Tensor) -> Tensor:
    """(R, D) for truncate and share: each input's column of M (zeros for one that truncate leaves out)."""
    columns = _input_columns(spec, square)
    if spec.grouping is Grouping.PERMUTED:
        columns = columns.index_select(1, _inverse_permutations(spec, square.device)[0])
    return columns


def block_squares(spec: OperatorSpec, square: Tensor) -> Tensor:
    """(N, R, R) for decouple and rotate: M R_i for every input block i, since (M R_i) x = M (R_i x)."""
    squares = square.expand(spec.blocks_in, -1, -1)
    if spec.kind is OperatorKind.DECOUPLE:
        return squares
    cos, sin = _angles(spec, square)
    return rotate(squares, cos.unsqueeze(1), -sin.unsqueeze(1))


def adjoint(spec: OperatorSpec, gradient: Tensor) -> Tensor:
    """The adjoint of `delta_weight`: the gradient with respect to M, from G = dL/dW of shape (O, D).

    <delta_weight(M), G> == <M, adjoint(G)> for all M and G.
    """
    template = torch.zeros(spec.r_hat, spec.r_hat, dtype=gradient.dtype, device=gradient.device, requires_grad=True)
    with torch.enable_grad():
        (result,) = torch.autograd.grad(delta_weight(spec, template), template, gradient)
    return result


# -- index rules -------------------------------------------------------------------------------------------------


def input_blocks(spec: OperatorSpec, x: Tensor) -> Tensor:
    """(..., D) -> (..., N, R): permuted and padded input cut into blocks (share: those that will be summed)."""
    if spec.grouping is Grouping.PERMUTED:
        x = pick(x, _permutations(spec, x.device)[0])
    if spec.kind is OperatorKind.TRUNCATE:
        return resize(x, spec.r_hat).unsqueeze(-2)
    if spec.in_segments > 1 or spec.grouping.contiguous_in:
        members = lane_members(spec.d_in, spec.r_hat, spec.in_segments, spec.grouping.contiguous_in, x.device)
        return pick(F.pad(x, (0, 1)), members.flatten()).unflatten(-1, members.shape)
    return wrap(x, spec.blocks_in * spec.r_hat).unflatten(-1, (spec.blocks_in, spec.r_hat))


def _sum_runs(x: Tensor, groups: int) -> Tensor:
    """(..., D) -> (..., groups): sums over runs of neighbours, the first D mod groups of them one longer."""
    long, short = run_lengths(x.shape[-1], groups)
    split = (x.shape[-1] % groups) * long
    head = x[..., :split].unflatten(-1, (split // long, long)).sum(-1)
    if short == 0:  # fewer inputs than groups: the last groups are empty
        return resize(head, groups)
    tail = x[..., split:].unflatten(-1, (-1, short)).sum(-1)
    return torch.cat((head, tail), dim=-1) if split else tail


def _input_columns(spec: OperatorSpec, square: Tensor) -> Tensor:
    """(R, D) for truncate and share: each input's column of M."""
    if spec.kind is OperatorKind.TRUNCATE:
        return resize(square, spec.d_in)
    if spec.grouping.contiguous_in or spec.in_segments > 1:
        lanes = segment_lanes(spec.d_in, spec.r_hat, spec.in_segments, spec.grouping.contiguous_in, square.device)
        return square.index_select(1, lanes)
    groups = strided_groups(spec.blocks_in * spec.r_hat, spec.r_hat, square.device)
    return unwrap(square.index_select(1, groups), spec.d_in)


def _output_rows(spec: OperatorSpec, columns: Tensor) -> Tensor:
    """(R, D) -> (O, D) for truncate and share: each output's row."""
    if spec.kind is OperatorKind.TRUNCATE:
        return F.pad(columns[: spec.d_out], (0, 0, 0, max(0, spec.d_out - spec.r_hat))).clone()
    return columns.index_select(0, _output_lanes(spec, columns.device))


def _output_lanes(spec: OperatorSpec, device: torch.device) -> Tensor:
    """(O,) of share: the row of M that each output reads, before the inverse permutation."""
    return segment_lanes(spec.d_out, spec.r_hat, spec.out_segments, spec.grouping.contiguous_out, device)


def _place_blocks(spec: OperatorSpec, squares: Tensor) -> Tensor:
    """(N, R, R) -> (O, padded D): square of input block i written where that block meets its output block."""
    pairs = torch.arange(max(spec.blocks_in, spec.blocks_out), device=squares.device)
    rows, columns = pairs % spec.blocks_out, pairs % spec.blocks_in
    canvas = squares.new_zeros(spec.blocks_out, spec.blocks_in, spec.r_hat, spec.r_hat)
    canvas = canvas.index_put((rows, columns), squares[columns])
    return canvas.transpose(1, 2).reshape(spec.blocks_out * spec.r_hat, -1)[: spec.d_out]


def _angles(spec: OperatorSpec, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each (N, R/2), in the dtype and on the device of `like`."""
    return rope_table(spec.blocks_in, spec.r_hat, like.dtype, like.device)


def _permutations(spec: OperatorSpec, device: torch.device) -> tuple[Tensor, ...]:
    """Of the inputs (D,) and of the outputs (O,)."""
    return _all_permutations(spec, device)[:2]


def _inverse_permutations(spec: OperatorSpec, device: torch.device) -> tuple[Tensor, ...]:
    return _all_permutations(spec, device)[2:]


def _all_permutations(spec: OperatorSpec, device: torch.device) -> tuple[Tensor, ...]:
    return permutation_tables(spec.seed, spec.d_in, spec.d_out, device, spec.in_segments, spec.out_segments)
