"""The part of an operator that one rank computes: a window on its inputs or its outputs, as tables of indices.

    y[outputs] = part of decompress(M compress(x)) that inputs [start, stop) give to outputs [start, stop)

Windows on the outputs, side by side, make up the whole output (colwise); windows on the inputs, summed, do too
(rowwise). `lanes` are rows and columns of M. The tables come of running the operator on the numbers of its own inputs,
so that there is one definition of it. Every map has its transpose beside it, both made of gathers and sums only.

Shape legend as in `operators`; w_in, w_out: inputs and outputs in the window; rows, columns: lanes of M in use.

    fold      (..., w_in) -> (..., N, columns)           unfold    back, transposed
    deal      (..., N, rows) -> (..., w_out)             collect   back, transposed
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.adapters.ops.gather import regroup_blocks
from mora_ds.adapters.ops.mora import OperatorSpec, input_blocks, output_slots, rotate_blocks

Range = tuple[int, int]
"""[start, stop)."""


@dataclass(frozen=True)
class Window:
    """Inputs and outputs of an operator, and the lanes of M that they may use: all, or with an aligned grouping those
    of the window's own segments."""

    spec: OperatorSpec
    inputs: Range
    outputs: Range
    columns: Range
    rows: Range

    @property
    def d_in(self) -> int:
        return self.inputs[1] - self.inputs[0]

    @property
    def d_out(self) -> int:
        return self.outputs[1] - self.outputs[0]


def window(
    spec: OperatorSpec,
    inputs: Range | None = None,
    outputs: Range | None = None,
    columns: Range | None = None,
    rows: Range | None = None,
) -> Window:
    """All of what is not given."""
    lanes = (0, spec.r_hat)
    return Window(spec, inputs or (0, spec.d_in), outputs or (0, spec.d_out), columns or lanes, rows or lanes)


def fold(part: Window, x: Tensor) -> Tensor:
    """`operators.fold_input` of the window: rotate's turning is left to `turned`."""
    tables = _tables(part, x.device)
    if part.spec.blockwise:
        return _gather(x, tables.sources[0]).unflatten(-1, (part.spec.blocks_in, -1))
    return _gather_sum(x, tables.sources).unsqueeze(-2)


def unfold(part: Window, z: Tensor) -> Tensor:
    return _gather_sum(z.flatten(-2), _tables(part, z.device).places)


def deal_out(part: Window, u: Tensor) -> Tensor:
    spec = part.spec
    lanes = regroup_blocks(u, spec.blocks_out).flatten(-2) if spec.blockwise else u.squeeze(-2)
    return _gather(lanes, _tables(part, u.device).slots)


def collect(part: Window, g: Tensor) -> Tensor:
    spec = part.spec
    lanes = _gather_sum(g, _tables(part, g.device).members)
    if not spec.blockwise:
        return lanes.unsqueeze(-2)
    return regroup_blocks(lanes.unflatten(-1, (spec.blocks_out, spec.r_hat)), spec.blocks_in)


def turned(part: Window, z: Tensor, back: bool = False) -> Tensor:
    """Rotate's turning of each block, or its inverse; of other operators nothing."""
    return rotate_blocks(part.spec, z, back)


def rows_used(part: Window, device: torch.device) -> Tensor | None:
    """Rows of M, counted from the first of `part.rows`, that the window's outputs read; None for all. `deal_out` and
    `collect` speak of these only."""
    return _tables(part, device).used


def delta(part: Window, square: Tensor) -> Tensor:
    """(w_out, w_in) of `delta_weight`, for share and truncate. `square` has the used rows and the window's columns."""
    assert not part.spec.blockwise, "of decouple and rotate: block_windows.delta"
    tables = _tables(part, square.device)
    columns = _gather_sum(square, tables.places)
    return F.pad(columns, (0, 0, 0, 1)).index_select(0, tables.slots)


# -- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tables:
    """Indices; one past the last stands for zero."""

    sources: Tensor
    """(K, lanes) into the window's inputs: a lane is the sum of them."""
    places: Tensor
    """(K, w_in) into lanes: the transpose."""
    slots: Tensor
    """(w_out,) into lanes: what each output reads."""
    members: Tensor
    """(K, lanes) into the window's outputs: the transpose."""
    used: Tensor | None


@lru_cache(maxsize=1024)
def _tables(part: Window, device: torch.device) -> _Tables:
    with torch.inference_mode(False), torch.no_grad():
        sources, places = _input_tables(part)
        slots, members, used = _output_tables(part)
        sources, places, slots, members = (table.to(device) for table in (sources, places, slots, members))
        return _Tables(sources, places, slots, members, None if used is None else used.to(device))


def _input_tables(part: Window) -> tuple[Tensor, Tensor]:
    spec, (start, stop), (first, last) = part.spec, part.inputs, part.columns
    numbers = input_blocks(spec, torch.arange(1, spec.d_in + 1)) - 1  # (blocks, R): which input lies there, -1 for none
    numbers = numbers[:, first:last]
    inside = (numbers >= start) & (numbers < stop)
    local, width = numbers - start, stop - start
    positions = torch.arange(numbers.numel()).view_as(numbers)
    if spec.blockwise:
        sources = torch.where(inside, local, width).flatten().unsqueeze(0)
        return sources, _lists(local[inside], positions[inside], width, numbers.numel())
    lanes = positions % (last - first)
    sources = _lists(lanes[inside], local[inside], last - first, width)
    return sources, _lists(local[inside], lanes[inside], width, last - first)


def _output_tables(part: Window) -> tuple[Tensor, Tensor, Tensor | None]:
    spec, (start, stop) = part.spec, part.outputs
    slots = output_slots(spec)[start:stop]
    if spec.blockwise:
        lanes, used = spec.blocks_out * spec.r_hat, None
    else:
        slots = torch.where(slots < 0, slots, slots - part.rows[0])
        used = slots[slots >= 0].unique()
        lanes = len(used)
        slots = torch.where(slots < 0, slots, torch.searchsorted(used, slots))
        used = None if lanes == part.rows[1] - part.rows[0] else used
    held = slots >= 0
    members = _lists(slots[held], torch.arange(stop - start)[held], lanes, stop - start)
    return torch.where(held, slots, lanes), members, used


def _lists(keys: Tensor, values: Tensor, size: int, none: int) -> Tensor:
    """(K, size): under each key in [0, size) its values, filled up with `none`."""
    order = keys.argsort(stable=True)
    keys, values = keys[order], values[order]
    counts = torch.bincount(keys, minlength=size)
    rank = torch.arange(len(keys)) - (counts.cumsum(0) - counts)[keys]
    table = torch.full((max(int(counts.max()) if len(counts) else 0, 1), size), none)
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
