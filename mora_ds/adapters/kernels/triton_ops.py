"""The operations of `ops` as Triton kernels. Only this module imports triton.

Each function has a `Launch` that says which kernel is started, with which sizes; it
needs shapes and dtypes only, so that the kernels of a 7B model are compiled, and their
machine code inspected, without a GPU (tests/adapters/kernels).

Memory is read and written in 128-bit words. What is gathered in a random order is one
row, first copied to shared memory (`tl.gather`): in global memory every number would
cost a transaction of 32 bytes. Rows of more than `_SHARED` bytes are gathered from
global memory all the same.

Products and sums are not fused into one rounding (`enable_fp_fusion`), so that fp32 has
the bits of plain torch.
"""

# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False
# The kernels have no types: triton reads their arguments' annotations as its own.

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mora_ds.adapters.kernels.tables import TILE, empty_product

_SHARED = 1 << 16
"""Bytes of a row that is copied to shared memory; a program has 99 KiB at least."""

_PART = 2048
_FORM_PART = 512
"""Most columns of a program: of `gather_sum` and of `effective_weight` for share, and of `effective_weight` for
the other operators."""

_TOKENS = 4
"""Tokens of one program of `gather_sum`, which all read the same part of the table."""

_NONE = 0
_FORTH = 1
_BACK = 2
"""Which rotation `_gather_sum` makes: of what it gathered, or of what it gathers
from."""


@dataclass(frozen=True)
class Launch:
    """One start of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> None:
        tensors = (
            value for value in self.arguments.values() if isinstance(value, Tensor)
        )
        with _current(next(tensors).device):
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


def gather_sum(
    x: Tensor,
    table: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    back: bool,
) -> Tensor:
    """See `ops.gather_sum`."""
    out = x.new_empty(x.shape[0], table.shape[1])
    gather_sum_launch(out, x.contiguous(), table, cos, sin, back, add=False)()
    return out


def gather_add_(
    y: Tensor,
    x: Tensor,
    table: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    back: bool,
) -> None:
    """See `ops.gather_add_`."""
    assert y.is_contiguous()
    gather_sum_launch(y, x.contiguous(), table, cos, sin, back, add=True)()


def gather_sum_launch(
    out: Tensor,
    x: Tensor,
    table: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    back: bool,
    add: bool,
) -> Launch:
    """`gather_sum` into out (T, Q), or added to it."""
    tokens, size = x.shape
    terms, columns = table.shape
    turn = _NONE if cos is None else _BACK if back else _FORTH
    row = triton.next_power_of_2(size)
    chunk = min(triton.next_power_of_2(columns), _PART)
    # A row that is rotated back lies in shared memory as it is summed, unrounded
    number_bytes = x.element_size()
    if turn == _BACK:
        number_bytes = _accumulator(x.dtype).primitive_bitwidth // 8
    shared = row * number_bytes <= _SHARED
    width = max(row if shared else 0, chunk)
    half = 0 if cos is None else cos.shape[1]
    # In units of 8, as Triton sees that 16 divides an argument, not that 8 does
    unit = 8 if half % 8 == 0 else 1
    return Launch(
        _gather_sum,
        (triton.cdiv(tokens, _TOKENS) * triton.cdiv(columns, chunk),),
        {"out": out, "x": x, "table": table, "cos": cos, "sin": sin, "tokens": tokens, "size": size,
         "columns": columns, "units": half // unit},
        {"TERMS": terms, "TURN": turn, "ADD": add, "SHARED": shared, "ROW": row, "PART": chunk,
         "TOKENS": _TOKENS, "UNIT": unit, "SUM": _accumulator(x.dtype)},
        {"num_warps": min(16, max(4, width // 512)), "enable_fp_fusion": False},
    )  # fmt: skip


def effective_weight(
    weight: Tensor, scales: Tensor | None, mora_matrix: Tensor, *maps: Any
) -> Tensor:
    """See `ops.effective_weight`."""
    out = mora_matrix.new_empty(weight.shape)
    form_launch(out, weight, scales, mora_matrix.contiguous(), *maps)()
    return out


def form_launch(
    out: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    mora_matrix: Tensor,
    unfold: Tensor,
    slots: Tensor,
    members: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    blocks: int,
) -> Launch:
    """`effective_weight` into out (O, D). For share a program gathers a row of M once, and adds it
    to all rows of the weight that read it. For the other operators most elements of the
    delta are zero, and of M only the others are read."""
    rows, columns = weight.shape
    r_hat = len(mora_matrix)
    arguments = {
        "out": out,
        "weight": weight,
        "scales": scales,
        "mora_matrix": mora_matrix,
        "unfold": unfold,
        "columns": columns,
        "row_stride": weight.stride(0),
        "column_stride": weight.stride(1),
        "r_hat": r_hat,
    }
    most = _FORM_PART if members is None else _PART
    chunk = min(triton.next_power_of_2(columns), most)
    chunks = triton.cdiv(columns, chunk)
    constants = {
        "TERMS": len(unfold),
        "PART": chunk,
        "SUM": _accumulator(mora_matrix.dtype),
    }
    if members is not None:
        row = triton.next_power_of_2(r_hat)
        return Launch(
            _form_groups,
            (chunks, r_hat),
            {**arguments, "members": members, "most_members": len(members)},
            {
                **constants,
                "SHARED": row * mora_matrix.element_size() <= _SHARED,
                "ROW": row,
            },
            {"num_warps": 8, "enable_fp_fusion": False},
        )
    lines = 8
    # Without a rotation ptxas gives each of 8 warps' threads 64 registers, and spills
    # with an int8 base on sm_90.
    warps = 4 if cos is None else 8
    return Launch(
        _form_blocks,
        (triton.cdiv(rows, lines), chunks),
        {
            **arguments,
            "slots": slots,
            "cos": cos,
            "sin": sin,
            "rows": rows,
            "blocks": blocks,
        },
        {**constants, "SLOTS": len(slots), "ROWS": lines},
        {"num_warps": warps, "enable_fp_fusion": False},
    )


def product(c: Tensor, z: Tensor) -> Tensor:
    """See `ops.product`. In fp32 and fp64 by torch, as tensor cores would round."""
    if c.dtype not in (torch.bfloat16, torch.float16):
        blocks = torch.arange(z.shape[1], device=c.device) % c.shape[1]
        rows = c.index_select(1, blocks).flatten(0, 1)
        return (rows.T @ z.flatten(0, 1)).unsqueeze(0)
    out = empty_product(c, z, 2 * _processors(c.device))
    product_launch(out, c.contiguous(), z.contiguous())()
    return out


def product_launch(out: Tensor, c: Tensor, z: Tensor) -> Launch:
    """`product` into out (parts, R, R), of which each is summed in a fixed order."""
    part_count, r_hat, _ = out.shape
    tokens, blocks, _ = z.shape
    terms = tokens * blocks
    tile = max(16, min(TILE, triton.next_power_of_2(r_hat)))
    deep = 64
    tiles = triton.cdiv(r_hat, tile)
    return Launch(
        _product,
        (tiles * tiles, part_count),
        {"out": out, "c": c, "z": z, "terms": terms, "r_hat": r_hat,
         "terms_of_part": deep * triton.cdiv(triton.cdiv(terms, part_count), deep)},
        {"BLOCKS_C": c.shape[1], "BLOCKS": blocks, "TILE": tile, "DEEP": deep},
        {"num_warps": 8 if tile == TILE else 4, "num_stages": 3},
    )  # fmt: skip


def sum_parts(partial_sums: Tensor, dtype: torch.dtype) -> Tensor:
    """See `ops.sum_parts`."""
    out = torch.empty(partial_sums.shape[1:], dtype=dtype, device=partial_sums.device)
    sum_parts_launch(out, partial_sums)()
    return out


def sum_parts_launch(out: Tensor, partial_sums: Tensor) -> Launch:
    """`sum_parts` into out (R, R), part after part."""
    return Launch(
        _sum_parts,
        (triton.cdiv(out.numel(), 1024),),
        {
            "out": out,
            "partial_sums": partial_sums,
            "count": len(partial_sums),
            "size": out.numel(),
        },
        {"PART": 1024},
        {"num_warps": 4},
    )


def _accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        # In triton's interpreter
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton starts kernels on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# -- kernels ---------------------------------------------------------------------------


@triton.jit
def _rotation(cos, sin, position, half, inside):
    """Of positions in blocks of 2 * half: the one that each is paired with, and cosine
    and signed sine, so that the rotated x at p is x[p] * cosine + x[pair] * sine;
    rotated back with the other sign of the sine."""
    lane = position % (2 * half)
    first = lane < half
    angle = position // (2 * half) * half + tl.where(first, lane, lane - half)
    pair = tl.where(first, position + half, position - half)
    cosine = tl.load(cos + angle, mask=inside, other=0)
    sine = tl.load(sin + angle, mask=inside, other=0)
    return pair, cosine, tl.where(first, -sine, sine)


@triton.jit
def _numbers_at(position, row, source, SHARED: tl.constexpr, SUM: tl.constexpr):
    """Numbers of a row at positions (0 at -1): in shared memory `row`, or at
    `source`."""
    if SHARED:
        value = tl.gather(row, tl.maximum(position, 0), 0).to(SUM)
        value = tl.where(position >= 0, value, 0)
    else:
        value = tl.load(source + position, mask=position >= 0, other=0).to(SUM)
    return value


@triton.jit
def _gather_sum(
    out, x, table, cos, sin, tokens, size, columns, units,
    TERMS: tl.constexpr, TURN: tl.constexpr, ADD: tl.constexpr, SHARED: tl.constexpr,
    ROW: tl.constexpr, PART: tl.constexpr, TOKENS: tl.constexpr, UNIT: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    half = units * UNIT
    # The chunks of a row run next to each other, so that the row comes from L2
    chunks = tl.cdiv(columns, PART)
    column = tl.program_id(0) % chunks * PART + tl.arange(0, PART)
    inside = column < columns
    lane = tl.arange(0, ROW)
    if TURN == 1:
        pair, cosine, sine = _rotation(cos, sin, column, half, inside)
        paired = tl.load(table + pair, mask=inside, other=-1)
    if TURN == 2 and SHARED:
        pair, cosine, sine = _rotation(cos, sin, lane, half, lane < size)
    first = (tl.program_id(0) // chunks).to(tl.int64) * TOKENS
    for token in range(first, tl.minimum(first + TOKENS, tokens)):
        source = x + token * size
        target = out + token * columns + column
        row = source
        if SHARED:
            row = tl.load(source + lane, mask=lane < size, other=0)
            if TURN == 2:
                partner = tl.load(source + pair, mask=lane < size, other=0)
                row = row.to(SUM) * cosine - partner.to(SUM) * sine
        total = tl.zeros((PART,), SUM)
        # Not unrolled, as 20 terms would spill
        for term in range(TERMS):
            position = tl.load(table + term * columns + column, mask=inside, other=-1)
            value = _numbers_at(position, row, source, SHARED, SUM)
            if TURN == 2 and not SHARED:
                present = position >= 0
                pair, cosine, sine = _rotation(cos, sin, position, half, present)
                partner = tl.load(source + pair, mask=present, other=0).to(SUM)
                value = value * cosine - partner * sine
            total += value
        if TURN == 1:
            partner = _numbers_at(paired, row, source, SHARED, SUM)
            total = total * cosine + partner * sine
        if ADD:
            total += tl.load(target, mask=inside, other=0).to(SUM)
        tl.store(target, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _form_groups(
    out, weight, scales, mora_matrix, unfold, members, columns, row_stride, column_stride, r_hat, most_members,
    TERMS: tl.constexpr, SHARED: tl.constexpr, ROW: tl.constexpr, PART: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    column = tl.program_id(0) * PART + tl.arange(0, PART)
    inside = column < columns
    source = mora_matrix + group * r_hat
    row = source
    if SHARED:
        lane = tl.arange(0, ROW)
        row = tl.load(source + lane, mask=lane < r_hat, other=0)
    delta = tl.zeros((PART,), SUM)
    for term in tl.static_range(TERMS):
        position = tl.load(unfold + term * columns + column, mask=inside, other=-1)
        value = _numbers_at(position, row, source, SHARED, SUM)
        delta = value if term == 0 else delta + value
    for member in range(most_members):
        output = tl.load(members + member * r_hat + group)
        if output >= 0:
            line = output.to(tl.int64)
            address = weight + line * row_stride + column * column_stride
            base = tl.load(address, mask=inside, other=0).to(SUM)
            if scales is not None:
                base = base * tl.load(scales + output).to(SUM)
            formed = (base + delta).to(out.dtype.element_ty)
            tl.store(out + line * columns + column, formed, mask=inside)


@triton.jit
def _form_blocks(
    out, weight, scales, mora_matrix, unfold, slots, cos, sin, rows, columns, row_stride, column_stride, r_hat, blocks,
    TERMS: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * PART + tl.arange(0, PART)
    in_rows = output < rows
    in_columns = column < columns
    inside = in_rows[:, None] & in_columns[None, :]
    line = output.to(tl.int64)[:, None]
    address = weight + line * row_stride + column[None, :] * column_stride
    base = tl.load(address, mask=inside, other=0).to(SUM)
    if scales is not None:
        base = base * tl.load(scales + output, mask=in_rows, other=0)[:, None].to(SUM)
    delta = tl.zeros((ROWS, PART), SUM)
    for term in tl.static_range(TERMS):
        position = tl.load(unfold + term * columns + column, mask=in_columns, other=-1)
        present = position >= 0
        column_block = tl.where(present, position // r_hat % blocks, -2)
        start = position // r_hat * r_hat
        if cos is not None:
            pair, cosine, sine = _rotation(cos, sin, position, r_hat // 2, present)
        for read in tl.static_range(SLOTS):
            slot = tl.load(slots + read * rows + output, mask=in_rows, other=-1)
            block = tl.where(slot >= 0, slot // r_hat, -1)
            meets = block[:, None] == column_block[None, :]
            row = mora_matrix + (slot % r_hat)[:, None] * r_hat
            address = row + (position - start)[None, :]
            value = tl.load(address, mask=meets, other=0).to(SUM)
            if cos is not None:
                address = row + (pair - start)[None, :]
                partner = tl.load(address, mask=meets, other=0).to(SUM)
                value = value * cosine[None, :] - partner * sine[None, :]
            delta = value if term == 0 and read == 0 else delta + value
    formed = (base + delta).to(out.dtype.element_ty)
    tl.store(out + line * columns + column[None, :], formed, mask=inside)


@triton.jit
def _product(
    out, c, z, terms, r_hat, terms_of_part,
    BLOCKS_C: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(r_hat, TILE)
    row = tl.program_id(0) // tiles * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    part_index = tl.program_id(1)
    start = part_index * terms_of_part
    stop = tl.minimum(start + terms_of_part, terms)
    total = tl.zeros((TILE, TILE), tl.float32)
    for first in range(start, stop, DEEP):
        term = first + tl.arange(0, DEEP)
        line = term.to(tl.int64)[:, None] * r_hat
        term_of_c = term
        if BLOCKS_C != BLOCKS:
            term_of_c = term // BLOCKS * BLOCKS_C + term % BLOCKS % BLOCKS_C
        line_of_c = term_of_c.to(tl.int64)[:, None] * r_hat
        inside = (term < stop)[:, None]
        in_c = inside & (row < r_hat)[None, :]
        in_z = inside & (column < r_hat)[None, :]
        left = tl.load(c + line_of_c + row[None, :], mask=in_c, other=0)
        right = tl.load(z + line + column[None, :], mask=in_z, other=0)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
    inside = (row < r_hat)[:, None] & (column < r_hat)[None, :]
    address = out + (part_index * r_hat + row)[:, None] * r_hat + column[None, :]
    tl.store(address, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_parts(out, partial_sums, count, size, PART: tl.constexpr):
    element = tl.program_id(0) * PART + tl.arange(0, PART)
    inside = element < size
    total = tl.zeros((PART,), partial_sums.dtype.element_ty)
    for _ in range(count):
        total += tl.load(partial_sums + element, mask=inside, other=0)
        partial_sums += size
    tl.store(out + element, total.to(out.dtype.element_ty), mask=inside)
