"""Deltas added to a weight without being formed: what a merge, a replay and an export spend their time on.

    share, truncate      rows of the weight += the rows of M's columns that they read, some hundred KB at a time and
                         many cycles at once
    decouple, rotate     only the squares are touched: a delta is zero wherever no block of inputs meets its outputs

Every sum has the same two numbers in it as `total + delta_weight(spec, value)`, so the bits are the same.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mora_ds.adapters.ops.index_tables import wiring
from mora_ds.adapters.ops.mora import OperatorSpec, block_squares, input_columns, output_slots
from mora_ds.adapters.ops.update import UpdateSpec, delta_weight

_CHUNK = 1 << 18
"""Elements of the weight worked on at a time on a CPU: 1 MiB, which stays in a core's cache."""

_PENDING = 1 << 24
"""Elements of columns that may wait for their pass over the weight: 64 MiB."""

_Rows = tuple[Tensor, Tensor]
"""Columns of a square (R, D), and for every output the row of them that its row of the weight takes up."""


def add_deltas_(total: Tensor, updates: Iterable[tuple[UpdateSpec, Tensor]]) -> None:
    """total += delta_weight(spec, value) for each of `updates` in turn, in place.

    `total`: contiguous (d_out, d_in); the values come to its device and dtype.
    """
    pending: list[_Rows] = []
    for spec, value in updates:
        value = value.to(total.device, total.dtype)
        if isinstance(spec, OperatorSpec) and not spec.blockwise:
            pending.append(_rows(spec, value))
            if sum(columns.numel() for columns, _ in pending) < _PENDING:
                continue
        _add_rows(total, pending)
        pending.clear()
        if not isinstance(spec, OperatorSpec) or (spec.blockwise and spec.r_hat > spec.d_in):
            total.add_(delta_weight(spec, value))
        elif spec.blockwise:
            _add_blocks(total, spec, block_squares(spec, value))
    _add_rows(total, pending)


def _rows(spec: OperatorSpec, square: Tensor) -> _Rows:
    columns, slots = input_columns(spec, square), output_slots(spec).to(square.device)
    if (slots < 0).any():  # truncate: outputs that read nothing
        columns = torch.cat((columns, columns.new_zeros(1, spec.d_in)))
    return columns, slots % len(columns)


def _add_rows(total: Tensor, pending: list[_Rows]) -> None:
    if not pending:
        return
    d_out, d_in = total.shape
    rows = max(1, _CHUNK // d_in) if total.device.type == "cpu" else d_out
    for start in range(0, d_out, rows):
        part = total[start : start + rows]
        for columns, slots in pending:
            part.add_(columns.index_select(0, slots[start : start + rows]))


def _add_blocks(total: Tensor, spec: OperatorSpec, squares: Tensor) -> None:
    """`squares` (N, R, R): that of input block i is added wherever block i meets an output block."""
    side, blocks_in, blocks_out = spec.r_hat, spec.blocks_in, spec.blocks_out
    inputs, outputs = _orders(spec, total.device)
    wrapped = blocks_in * side - spec.d_in
    last = blocks_in - 1
    meets_first = wrapped > 0 and last > 0 and last % blocks_out == 0
    flat = total.view(-1)
    for pair in range(max(blocks_in, blocks_out)):
        row, column = pair % blocks_out, pair % blocks_in
        square, width = squares[column], side
        if meets_first and column == last:
            width -= wrapped  # block 0 has had them: two sums into one place would round twice
        elif meets_first and column == 0:
            square = square.clone()
            square[:, :wrapped] += squares[last][:, side - wrapped :]
        reads = outputs[row * side : (row + 1) * side]
        feeds = inputs[column * side : column * side + width]
        places = (reads.unsqueeze(1) * spec.d_in + feeds).flatten()
        flat.index_add_(0, places, square[: len(reads), :width].flatten())


def _orders(spec: OperatorSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which input each position of the padded input holds, (N * R,), and which output each slot goes to, (O,)."""
    found = wiring(spec, device)
    return found.sources.index, found.members.index[: spec.d_out]


@torch.no_grad()
def live_weight(
    original: Tensor,
    updates: Iterable[tuple[UpdateSpec, Tensor]],
    transposed: bool,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> Tensor:
    """The original weight plus the deltas of `updates`, summed in fp32 in their order, rounded to `dtype` once.

    `original`: (d_out, d_in), or (d_in, d_out) when `transposed`; it is not written to. `updates`: (operator, square).
    Elementwise operations only, so every number of threads gives the same bits. The result lies on `device` (by
    default where `original` does) and shares no memory with it.
    """
    device = torch.device(device) if device is not None else original.device
    original = original.T if transposed else original
    total = torch.empty(original.shape, dtype=torch.float32, device=device).copy_(original)
    add_deltas_(total, updates)
    return (total.T.contiguous() if transposed else total).to(dtype)
