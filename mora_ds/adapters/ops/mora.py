"""MoRA's operators: compress, decompress, delta_weight and its adjoint, as pure
functions of tensors.

A layer with frozen weight W0 (d_out, d_in) learns one square matrix M (r_hat, r_hat):

    h = W0 x + decompress(M compress(x))                                 MoRA, arXiv 2405.12130, eq. 3
    delta_weight(M) @ x == decompress(M compress(x))   for every x       the contract of every operator here

Shape legend:  D = d_in, O = d_out, R = r_hat, N = blocks that M is applied to (1 for truncate and share).

    compress    (..., D) -> (..., N, R)        decompress    (..., N, R) -> (..., O)
    delta_weight  (R, R) -> (O, D)             adjoint            (O, D) -> (R, R)

Both `delta_weight` and the forward pass are built from the same few index rules
(`index_tables`):

    padded input     position q of the padded input holds x[q mod D], q < ceil(D / R) * R
    truncate         keep the first R inputs (zero-padded when R > D); zero-pad the output          eq. 4-5
    share            inputs are summed in groups, an output is a copy of its group's; a group is a residue class
                     (strided) or a run of neighbors (contiguous)                                  eq. 6-7
    decouple         block p of the padded input through M to block p of the output                 eq. 8
    rotate           the same, input block i first rotated by RoPE angles i * 10000^(-2j/R)         eq. 9-11

(The reference implementation calls share type 1 and rotate type 6.) With
`Grouping.PERMUTED`, inputs and outputs are first shuffled by permutations drawn from
`seed`: ReMoRA changes the seed every cycle, which lets the rank of the summed update
grow.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from functools import cached_property, partial
from typing import Any, ClassVar, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.adapters.ops.index_tables import (
    LOW_PRECISION,
    OPERATORS,
    IndexMap,
    IndexTables,
    kept_tables,
    of_all_blocks,
    signed_rope_table,
    tables_of,
)
from mora_ds.adapters.ops.spec import (
    AdditiveSpec,
    Grouping,
    OperatorKind,
    UpdateSpec,
)
from mora_ds.common.errors import UserError, unknown
from mora_ds.common.files import JsonObject
from mora_ds.common.untrusted import MAX_SIDE, typed_fully

_CHUNK = 1 << 18
"""Elements of a weight that a delta is added to at a time on a CPU: 1 MiB in fp32,
which stays in a core's cache."""


@dataclass(frozen=True)
class OperatorSpec(AdditiveSpec):
    """An operator with its sizes. Raises `UserError` for sizes or groupings that make
    no operator."""

    kind: OperatorKind
    d_in: int
    d_out: int
    r_hat: int
    grouping: Grouping = Grouping.PLAIN
    seed: int = 0
    """Seed of the permutations; read only when `grouping` is PERMUTED."""
    seed_tensor: ClassVar[Tensor]
    """`seed` as a scalar on the CPU."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", _member(OperatorKind, self.kind, "operator"))
        object.__setattr__(
            self, "grouping", _member(Grouping, self.grouping, "grouping")
        )
        sizes = (self.d_in, self.d_out, self.r_hat)
        if min(sizes) < 1 or max(sizes) > MAX_SIDE:
            raise UserError(
                f"an operator needs positive sizes, and none above {MAX_SIDE:,}, got {self}"
            )
        if not 0 <= self.seed < 2**32:
            raise UserError(
                f"the seed of an operator's permutations must be from 0 to 2^32 - 1, got {self.seed}"
            )
        # Not a number, for which a compiled layer would be compiled again after a merge
        seed = torch.tensor(self.seed, device="cpu")
        object.__setattr__(self, "seed_tensor", seed)
        operator = OPERATORS[self.kind]
        if self.r_hat % operator.smallest_side:
            raise UserError(
                f"rotate pairs dimensions, so r_hat must be even, got {self.r_hat}"
            )
        if self.grouping not in operator.groupings:
            raise UserError(
                f"grouping {self.grouping.value!r} belongs to operator 'share', not {self.kind.value!r}"
            )

    @property
    def adapter_weight_shape(self) -> tuple[int, ...]:
        return self.r_hat, self.r_hat

    @property
    def multiplications(self) -> int:
        return self.r_hat**2 * self.blocks

    @property
    def table_bytes(self) -> int:
        """About three int32 for each input and output, if cycles draw permutations; five
        where M has several blocks, by whose rows a weight is formed."""
        if self.grouping is not Grouping.PERMUTED:
            return 0
        numbers = 3 if self.blocks == 1 else 5
        return numbers * torch.int32.itemsize * (self.d_in + self.d_out)

    @property
    def blocks_in(self) -> int:
        return math.ceil(self.d_in / self.r_hat)

    @property
    def blocks_out(self) -> int:
        return math.ceil(self.d_out / self.r_hat)

    @cached_property
    def blocks(self) -> int:
        """N: how many blocks of the input M is applied to."""
        return self.blocks_in if OPERATORS[self.kind].in_blocks else 1

    @cached_property
    def rotates(self) -> bool:
        """Whether blocks after the first, which turns by no angle, are rotated."""
        return OPERATORS[self.kind].rotates and self.blocks > 1

    def delta_weight(self, adapter_weight: Tensor) -> Tensor:
        return delta_weight(self, adapter_weight)

    def merge_into_(self, total: Tensor, adapter_weight: Tensor) -> Tensor:
        if self.blocks > 1:
            return add_blocks_(total, self, adapter_weight)
        return add_rows_(total, self, adapter_weight)

    def add_update_(self, y: Tensor, adapter_weight: Tensor, x: Tensor) -> Tensor:
        saved = fold_input(self, x) if self.blocks == 1 else x
        return add_update_(y, self, adapter_weight, saved)

    def add_input_gradient_(
        self, g_x: Tensor, adapter_weight: Tensor, g: Tensor
    ) -> Tensor:
        return add_input_gradient_(g_x, self, adapter_weight, g)

    def tables(self, device: torch.device) -> IndexTables:
        return tables_of(self, device)

    def low_rank(self, adapter_weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """A sums inputs, B holds rows of M; None where M is applied to several
        blocks."""
        if self.blocks > 1:
            return None
        spread = self.tables(adapter_weight.device).spread
        rows = rows_of_outputs(spread, adapter_weight)
        return fold_matrix(self, adapter_weight).T, rows

    def with_grouping(self, grouping: Grouping, seed: int) -> Self:
        return replace(self, grouping=grouping, seed=seed)

    def describe(self) -> str:
        return f"{self.kind.value}/{self.grouping.value}"

    def to_dict(self) -> JsonObject:
        values = asdict(self)
        return {**values, "kind": self.kind.value, "grouping": self.grouping.value}

    @classmethod
    def from_dict(cls, values: JsonObject) -> "OperatorSpec":
        # Unlike those of other adapters, its kind is a field
        spec: OperatorSpec = typed_fully(cls, values, "operator")
        return spec


def operator_of(spec: UpdateSpec, of_what: str) -> OperatorSpec:
    """`spec` itself, of which MoRA's operators are read. Raises `UserError` that begins
    with `of_what` for another."""
    if not isinstance(spec, OperatorSpec):
        known = ", ".join(kind.value for kind in OPERATORS)
        raise UserError(
            f"{of_what} has {spec.name}, which is none of the operators {known}"
        )
    return spec


def _member(enum: type[Enum], value: Any, what: str) -> Any:
    known = [member.value for member in enum]
    if value not in known:
        raise UserError(unknown(what, value, known))
    return enum(value)


class Maps(Protocol):
    """What the functions below read of an operator: of an `OperatorSpec`, or of the
    part of one that a process computes (`parallel.windows.Window`)."""

    @property
    def d_in(self) -> int: ...

    @property
    def d_out(self) -> int: ...

    @property
    def r_hat(self) -> int: ...

    @property
    def blocks(self) -> int: ...

    @property
    def rotates(self) -> bool: ...

    def tables(self, device: torch.device) -> IndexTables: ...


def compress(spec: Maps, x: Tensor) -> Tensor:
    """(..., D) -> (..., N, R)."""
    return _mapped("compress", spec, x)


def decompress(spec: Maps, z: Tensor) -> Tensor:
    """(..., N, R) -> (..., O)."""
    return _mapped("decompress", spec, z)


def _mapped(name: str, spec: Maps, x: Tensor) -> Tensor:
    """The map `name` of `MAPS`, with its transpose as gradient."""
    if torch.compiler.is_compiling() and isinstance(spec, OperatorSpec):
        sizes = [spec.d_in, spec.d_out, spec.r_hat]
        kind = spec.kind.value
        grouping = spec.grouping.value
        return operator_map(x, spec.seed_tensor, name, False, kind, sizes, grouping)
    apply, transpose = MAPS[name]
    return LinearMapFunction.apply(x, partial(apply, spec), partial(transpose, spec))


def compress_directly(spec: Maps, x: Tensor) -> Tensor:
    """`compress` without a backward."""
    return rotate_blocks(spec, fold_input(spec, x))


def compress_transpose(spec: Maps, z: Tensor) -> Tensor:
    """The transpose of `compress`, (..., N, R) -> (..., D)."""
    return unfold_input(spec, rotate_blocks(spec, z, back=True))


def spread_out(spec: Maps, z: Tensor) -> Tensor:
    """`decompress`, term by term."""
    return spec.tables(z.device).spread(z.flatten(-2))


def decompress_transpose(spec: Maps, g: Tensor) -> Tensor:
    """The transpose of `decompress`, (..., O) -> (..., N, R)."""
    collected = collect(spec, g)
    repeats = math.ceil(spec.blocks / collected.shape[-2])
    if repeats == 1:
        return collected
    return torch.cat([collected] * repeats, dim=-2)[..., : spec.blocks, :]


def collect(spec: Maps, g: Tensor) -> Tensor:
    """(..., O) -> (..., P, R): block b of `decompress_transpose` is block b mod P of
    it."""
    tables = spec.tables(g.device)
    collected = _sums(spec, g, tables.collect, tables.spread)
    return collected.unflatten(-1, (-1, spec.r_hat))


def fold_input(spec: Maps, x: Tensor) -> Tensor:
    """(..., D) -> (..., N, R): `compress` without the rotation of rotate."""
    tables = spec.tables(x.device)
    folded = _sums(spec, x, tables.fold, tables.unfold)
    return folded.unflatten(-1, (spec.blocks, spec.r_hat))


def unfold_input(spec: Maps, z: Tensor) -> Tensor:
    """The transpose of `fold_input`: (..., N, R) -> (..., D), for each input the sum of
    what lies at its positions."""
    return spec.tables(z.device).unfold(z.flatten(-2))


def _sums(spec: Maps, x: Tensor, sums: IndexMap, transpose: IndexMap) -> Tensor:
    """The map `sums` applied to x. Where M is applied once, sums have many terms: a CPU
    scatters them, in low precision by a product with ones and zeros, which it
    multiplies faster than it moves numbers one by one, and sums in fp32. (On a GPU
    scattered sums are atomic, so that their order would vary.)"""
    if spec.blocks > 1 or len(sums.table) == 1 or not on_cpu(x):
        return sums(x)
    if x.dtype in LOW_PRECISION:
        return x @ _matrix(transpose, spec.r_hat, x.dtype)
    flat = x.reshape(-1, x.shape[-1])
    total = flat.new_zeros(len(flat), spec.r_hat)
    groups = transpose.index[: flat.shape[1]].long()
    total.scatter_add_(1, groups.expand(len(flat), -1), flat)
    # Where the last group is filled up, some numbers are in two groups
    for members, terms in transpose.additions:
        total.index_add_(1, transpose.index[terms], flat[:, members])
    return total.view(*x.shape[:-1], spec.r_hat)


def _matrix(transpose: IndexMap, size: int, dtype: torch.dtype) -> Tensor:
    """(inputs, size): x @ it is the map whose transpose is given."""
    table = transpose.table.T
    ones = torch.zeros(len(table), size + 1, dtype=dtype, device=table.device)
    ones.scatter_(1, table.where(table >= 0, size).long(), 1)
    return ones[:, :size]


def mora_matrix_gradient(
    spec: Maps,
    saved: Tensor,
    g: Tensor,
    form_dense: bool = False,
) -> Tensor:
    """dL/dM (R, R), from the output's gradient g (..., O); equal to adjoint(g^T x).

    `saved`: as in `add_update_`. `form_dense`: several blocks do form g^T x (O, D),
    which in low precision may take less time. Else some tokens at a time, so that what
    is gathered of them is still in the CPU's cache when it is multiplied.
    """
    g = g.flatten(0, -2)
    saved = (
        saved.reshape(-1, 1, spec.r_hat) if spec.blocks == 1 else saved.flatten(0, -2)
    )
    if spec.blocks == 1 and sums_by_product(g):
        return collect(spec, saved.squeeze(1).T @ g).squeeze(-2).T
    if spec.blocks > 1 and form_dense:
        return adjoint(spec, g.T @ saved)
    tokens = tokens_in_cache(g, max(spec.d_in, spec.d_out))
    count = spec.tables(g.device).collect.table.shape[1] // spec.r_hat
    products = g.new_zeros(count, spec.r_hat, spec.r_hat)
    for saved_part, g_part in zip(saved.split(tokens), g.split(tokens), strict=True):
        z = saved_part if spec.blocks == 1 else fold_input(spec, saved_part)
        if count < spec.blocks:
            z = sum_alike(spec, z, count)
        c = collect(spec, g_part)
        products.baddbmm_(c.permute(1, 2, 0), z.transpose(0, 1))
    return products.sum(dim=0) if count < spec.blocks else sum_of_blocks(spec, products)


def sum_alike(spec: Maps, z: Tensor, count: int) -> Tensor:
    """(T, N, R) -> (T, P, R): blocks b, b + P, b + 2 P, ... rotated and summed.

    The same block of the output's gradient belongs to all of them: they are multiplied
    with it at once, which is N / P times less work.
    """
    total = z.new_zeros(len(z), count, spec.r_hat)
    for start in range(0, spec.blocks, count):
        chosen = slice(start, start + count)
        blocks = z[:, chosen]
        summed = total[:, : blocks.shape[1]]
        if spec.rotates:
            cos, sin = rotation_of(spec, z)
            add_rotated_(summed, blocks, cos[chosen], sin[chosen])
        else:
            summed += blocks
    return total


def sums_by_product(x: Tensor) -> bool:
    """Whether x is summed and spread by products with matrices of ones and zeros."""
    return x.dtype in LOW_PRECISION and on_cpu(x)


def on_cpu(x: Tensor) -> bool:
    """Whether x is on a CPU, which computes fastest from memory that stays in its
    cache."""
    return x.device.type == "cpu"


def fold_matrix(spec: Maps, like: Tensor) -> Tensor:
    """(D, R) for share and truncate: compress(x) == x @ fold_matrix."""
    return _matrix(spec.tables(like.device).unfold, spec.r_hat, like.dtype)


def rows_of_outputs(spread: IndexMap, mora_matrix: Tensor) -> Tensor:
    """(O, R) for share and truncate: decompress(M z) == z @ rows^T."""
    rows, slots = rows_and_slots(spread, mora_matrix)
    return rows.index_select(0, slots)


def rows_and_slots(spread: IndexMap, rows: Tensor) -> tuple[Tensor, Tensor]:
    """For share and truncate, of rows (R, ...): these, with one of zeros where truncate
    has outputs that read none, and for each output (O,) the row that it reads."""
    if spread.missing is not None:
        rows = torch.cat((rows, torch.zeros_like(rows[:1])))
    return rows, spread.table[0] % len(rows)


def rotate_blocks(spec: Maps, blocks: Tensor, back: bool = False) -> Tensor:
    """The rotation of each input block (..., N, R), or its inverse; for all operators
    but rotate, the blocks themselves."""
    if not spec.rotates:
        return blocks
    return rotate(blocks, *rotation_of(spec, blocks), back)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """RoPE of the last dimension in half-split pairs, as in Llama: (x1, x2) -> (x1 cos - x2
    sin, x2 cos + x1 sin); with `back` the inverse. `cos` and `sin` (..., 2, R / 2) of
    `signed`, for x (..., R). Few operations, as each of them costs more to start than to
    compute where matrices are small."""
    halves = x.unflatten(-1, (2, -1))
    turned = halves * cos
    crossed = halves.flip(-2) * sin
    return (turned.sub_(crossed) if back else turned.add_(crossed)).flatten(-2)


def add_rotated_(total: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """total (..., R) + `rotate` of x, in place. A device may round a product and its
    sum at once."""
    summed = total.unflatten(-1, (2, -1))
    halves = x.unflatten(-1, (2, -1))
    summed.addcmul_(halves, cos)
    first, second = halves.unbind(-2)
    minus_sin, plus_sin = sin.unbind(-2)
    summed.select(-2, 0).addcmul_(second, minus_sin)
    summed.select(-2, 1).addcmul_(first, plus_sin)


def rotation_of(spec: Maps, like: Tensor) -> tuple[Tensor, Tensor]:
    """What `rotate` needs for blocks (N, R), in the dtype and on the device of
    `like`."""
    return signed_rope_table(spec.blocks, spec.r_hat, like.dtype, like.device)


def block_matrices(spec: Maps, mora_matrix: Tensor) -> Tensor:
    """(N, R, R): M R_b for every input block b; contiguous where blocks are rotated."""
    if not spec.rotates:
        return mora_matrix.expand(spec.blocks, -1, -1)
    cos, sin = rotation_of(spec, mora_matrix)
    return rotate(mora_matrix, cos.unsqueeze(1), sin.unsqueeze(1), back=True)


def apply_block_matrices(mora_matrices: Tensor, z: Tensor) -> Tensor:
    """The product of each of the (N, R, R) with its block of z (T, N, R): (T, N, R)."""
    product = torch.empty_like(z)
    torch.bmm(
        z.transpose(0, 1), mora_matrices.transpose(1, 2), out=product.transpose(0, 1)
    )
    return product


def add_update_(y: Tensor, spec: Maps, mora_matrix: Tensor, saved: Tensor) -> Tensor:
    """y (..., O) + decompress(M compress(x)), in place, without a backward. `saved`: x
    (..., D) where M is applied to several blocks, else the folded x (..., 1, R)."""
    tables = spec.tables(y.device)
    if spec.blocks > 1:
        z = tables.fold(saved).view(-1, spec.blocks, spec.r_hat)
        u = apply_block_matrices(block_matrices(spec, mora_matrix), z)
        return y.add_(tables.spread(u.flatten(1)).view_as(y))
    if sums_by_product(y):
        rows = rows_of_outputs(tables.spread, mora_matrix)
        y.view(-1, spec.d_out).addmm_(saved.flatten(0, -2), rows.T)
        return y
    u = F.linear(saved, mora_matrix)
    return y.add_(tables.spread(u.flatten(-2)))


def add_input_gradient_(
    g_x: Tensor,
    spec: Maps,
    mora_matrix: Tensor,
    g: Tensor,
    sums: Tensor | None = None,
) -> Tensor:
    """g_x (..., D) + the transpose of `add_update_`'s linear map, applied to g
    (..., O); in place. `sums`: `decompress_transpose` of g, where it is there
    already."""
    if spec.blocks > 1:
        c = decompress_transpose(spec, g).flatten(0, -3)
        g_z = apply_block_matrices(block_matrices(spec, mora_matrix).transpose(1, 2), c)
        return g_x.add_(unfold_input(spec, g_z).view_as(g_x))
    if sums_by_product(g):
        rows = rows_of_outputs(spec.tables(g.device).spread, mora_matrix)
        g_z = g.reshape(-1, spec.d_out) @ rows
        g_x.view(-1, spec.d_in).addmm_(g_z, fold_matrix(spec, g).T)
        return g_x
    sums = decompress_transpose(spec, g) if sums is None else sums
    return g_x.add_(unfold_input(spec, sums @ mora_matrix))


class LinearMapFunction(torch.autograd.Function):
    """A linear map of x, `apply`, whose gradient is `transpose` of the output's. Recorded
    term by term, a backward pass of sums with many terms would copy the gradient of all
    that is gathered once a term."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        apply: Callable[[Tensor], Tensor],
        transpose: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ctx.transpose = transpose
        return apply(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transpose(gradients[0]), None, None


MAPS = {
    "compress": (compress_directly, compress_transpose),
    "decompress": (spread_out, decompress_transpose),
}
"""Each map of an operator, and its transpose."""


@torch.library.custom_op("mora_ds::operator_map", mutates_args=())
def operator_map(
    x: Tensor,
    seed: Tensor,
    name: str,
    transpose: bool,
    kind: str,
    sizes: Sequence[int],
    grouping: str,
) -> Tensor:
    """A map of `MAPS` as one operation of a graph of `torch.compile`, which cannot
    trace how the tables are made. `sizes`: D, O, R of the operator. The seed is a
    tensor, so that one graph serves layers and cycles with other permutations."""
    d_in, d_out, r_hat = sizes
    spec = OperatorSpec(
        OperatorKind(kind), d_in, d_out, r_hat, Grouping(grouping), int(seed)
    )
    kept_tables(spec, x.device)
    return MAPS[name][transpose](spec, x).contiguous()


@operator_map.register_fake
def _empty_result(
    x: Tensor,
    seed: Tensor,
    name: str,
    transpose: bool,
    kind: str,
    sizes: Sequence[int],
    grouping: str,
) -> Tensor:
    d_in, d_out, r_hat = sizes
    spec = OperatorSpec(OperatorKind(kind), d_in, d_out, r_hat, Grouping(grouping))
    blocks = (spec.blocks, spec.r_hat)
    of_map = {"compress": ((spec.d_in,), blocks), "decompress": (blocks, (spec.d_out,))}
    before, after = of_map[name][::-1] if transpose else of_map[name]
    return x.new_empty(*x.shape[: x.dim() - len(before)], *after)


def _keep_map(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, *ctx.map = inputs
    ctx.save_for_backward(seed)


def _apply_transpose(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    name, transpose, *operator = ctx.map
    g_x = operator_map(g, seed, name, not transpose, *operator)
    return g_x, *[None] * (1 + len(ctx.map))


operator_map.register_autograd(_apply_transpose, setup_context=_keep_map)


def mora_update(spec: OperatorSpec, mora_matrix: Tensor, x: Tensor) -> Tensor:
    """decompress(M compress(x)): (..., D) -> (..., O), what the adapter adds."""
    _check_mora_matrix(spec, mora_matrix, "mora_update")
    # Without the check a shorter input would be taken, and give other numbers
    if x.shape[-1:] != (spec.d_in,):
        raise UserError(
            f"mora_update: `x` must have {spec.d_in} features, got the shape {tuple(x.shape)}"
        )
    return decompress(spec, F.linear(compress(spec, x), mora_matrix))


def _check_mora_matrix(spec: OperatorSpec, mora_matrix: Tensor, function: str) -> None:
    if mora_matrix.shape != spec.adapter_weight_shape:
        raise UserError(
            f"{function}: `mora_matrix` must have the shape {spec.adapter_weight_shape}, got {tuple(mora_matrix.shape)}"
        )


def delta_weight(spec: OperatorSpec, mora_matrix: Tensor) -> Tensor:
    """The (O, D) change of the weight that M stands for, a new tensor in M's dtype.

    Made of separate elementwise operations and copies only, so that every device rounds
    it alike.
    """
    _check_mora_matrix(spec, mora_matrix, "delta_weight")
    tables = spec.tables(mora_matrix.device)
    if spec.blocks == 1:
        return rows_of_outputs(tables.spread, tables.unfold(mora_matrix))
    zeros = mora_matrix.new_zeros(spec.d_out, spec.d_in)
    return add_rows_of_blocks_(zeros, tables, block_matrices(spec, mora_matrix))


def add_rows_(total: Tensor, spec: Maps, mora_matrix: Tensor) -> Tensor:
    """total (O, D) + `delta_weight` of share and truncate, in place: on a CPU as many
    rows at a time as stay in its cache."""
    tables = spec.tables(mora_matrix.device)
    rows, slots = rows_and_slots(tables.spread, tables.unfold(mora_matrix))
    count = max(1, _CHUNK // spec.d_in) if on_cpu(total) else spec.d_out
    for start in range(0, spec.d_out, count):
        chunk = slice(start, start + count)
        total[chunk].add_(rows.index_select(0, slots[chunk]))
    return total


def add_blocks_(total: Tensor, spec: Maps, mora_matrix: Tensor) -> Tensor:
    """total (O, D) + `delta_weight` of an operator with several blocks, in place: only
    where an output reads a block of inputs, as the delta is zero elsewhere. Every
    number is changed once, so that it is rounded once."""
    tables = spec.tables(total.device)
    mora_matrices = block_matrices(spec, mora_matrix)
    if tables.overlap:
        return total.add_(
            add_rows_of_blocks_(torch.zeros_like(total), tables, mora_matrices)
        )
    return add_rows_of_blocks_(total, tables, mora_matrices)


def add_rows_of_blocks_(
    total: Tensor, tables: IndexTables, mora_matrices: Tensor
) -> Tensor:
    """total (O, D) + the rows of the M R_b (N, R, R) that each output reads, in
    place."""
    # In a window some columns of M have inputs of other windows
    if tables.fold.missing is not None:
        elsewhere = tables.fold.table.view(-1, 1, tables.r_hat) < 0
        mora_matrices = mora_matrices.masked_fill(elsewhere, 0)
    rows = mora_matrices.flatten(0, 1)
    # Outputs with fewer terms read the row of zeros after the last one
    if tables.spread.missing is not None or len(tables.spread.table) > 1:
        rows = F.pad(rows, (0, 0, 0, 1))
    inputs, terms = tables.scatters
    for rows_read, blocks in terms:
        columns = inputs.index_select(0, blocks)
        total.scatter_add_(1, columns, rows.index_select(0, rows_read))
    return total


def adjoint(spec: Maps, gradient: Tensor) -> Tensor:
    """The adjoint of `delta_weight`: dL/dM from G = dL/dW (O, D).

    <delta_weight(M), G> == <M, adjoint(G)> for all M and G.
    """
    tables = spec.tables(gradient.device)
    folded = fold_input(spec, gradient)  # (O, N, R)
    blocks = torch.arange(spec.blocks, device=gradient.device).unsqueeze(1)
    products = gradient.new_zeros(spec.blocks, spec.r_hat, spec.r_hat)
    collect_all = of_all_blocks(tables.collect.table, spec.blocks, spec.r_hat)
    for outputs in collect_all.unflatten(1, (-1, spec.r_hat)):
        # (N, R, R), in which the rows of index -1 are masked
        rows = folded[outputs, blocks]
        products += rows.masked_fill_((outputs < 0).unsqueeze(2), 0)
    return sum_of_blocks(spec, products)


def sum_of_blocks(spec: Maps, products: Tensor) -> Tensor:
    """dL/dM (R, R) from the gradients (N, R, R) of `block_matrices`."""
    if spec.rotates:
        cos, sin = rotation_of(spec, products)
        products = rotate(products, cos.unsqueeze(1), sin.unsqueeze(1))
    return products.sum(dim=0)


def tokens_in_cache(x: Tensor, width: int) -> int:
    """How many tokens of `width` numbers to gather and multiply at once: on a CPU, what
    stays in its cache; elsewhere all of x (tokens, ...)."""
    return max(512, 2**18 // width) if on_cpu(x) else max(1, len(x))
