"""Decouple and rotate over the weight, in a window of the operator: what one rank forms and multiplies.

Of every block the window has some lanes only, so that its part of the delta and of M's gradient cost its share of the
whole. Shape legend as in `windows`; Li, Lo: most inputs (outputs) that the window has in one block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mora_ds.adapters.ops.gather import gather
from mora_ds.adapters.ops.mora import (
    OperatorSpec,
    block_pairs,
    block_squares,
    input_blocks,
    output_slots,
    sum_of_blocks,
    sums_by_product,
    tokens_in_cache,
)
from mora_ds.parallel.windows import Window


def delta(part: Window, square: Tensor) -> Tensor:
    """(w_out, w_in) of `delta_weight`, from the whole square."""
    spec, tables = part.spec, _tables(part, square.device)
    inputs = tables.inputs
    values = block_squares(spec, square).gather(2, inputs.lanes.unsqueeze(1).expand(-1, spec.r_hat, -1))
    values = values.masked_fill(inputs.missing.unsqueeze(1), 0).flatten(0, 1)  # (N * R, Li)
    found = values.new_zeros(part.d_out * part.d_in)
    for meeting in tables.meetings:
        places = (meeting.outputs * part.d_in).unsqueeze(1) + inputs.numbers.index_select(0, meeting.blocks)
        found.scatter_add_(0, places.flatten(), values.index_select(0, meeting.rows).flatten())
    return found.view(part.d_out, part.d_in)


def square_gradient(part: Window, x: Tensor, g: Tensor) -> Tensor:
    """The window's part of dL/dM (R, R), from its input x (..., w_in) and the gradient g (..., w_out) of its output."""
    spec, tables = part.spec, _tables(part, g.device)
    inputs, outputs = tables.inputs, tables.outputs
    x, g = x.flatten(0, -2), g.flatten(0, -2)
    tokens = max(1, len(g)) if sums_by_product(g) else tokens_in_cache(g, max(part.d_in, part.d_out))
    runs = block_pairs(spec)
    products = [g.new_zeros(into.stop - into.start, outputs.width, inputs.width) for into, _ in runs]
    for x_part, g_part in zip(x.split(tokens), g.split(tokens), strict=True):
        z, c = inputs.of(x_part), outputs.of(g_part)
        for product, (into, out) in zip(products, runs, strict=True):
            product.baddbmm_(c[:, out].permute(1, 2, 0), z[:, into].transpose(0, 1))
    found = g.new_zeros(spec.blocks_in, spec.r_hat**2)
    for product, (into, out) in zip(products, runs, strict=True):
        places = outputs.lanes[out].unsqueeze(2) * spec.r_hat + inputs.lanes[into].unsqueeze(1)
        missing = outputs.missing[out].unsqueeze(2) | inputs.missing[into].unsqueeze(1)
        found[into].scatter_add_(1, places.flatten(1), product.masked_fill_(missing, 0).flatten(1))
    return sum_of_blocks(spec, found.unflatten(1, (spec.r_hat, spec.r_hat)))


# -- tables -----------------------------------------------------------------------------------------------------------


class _Side(NamedTuple):
    """The window's inputs or outputs by block: (blocks, L) each. Blocks with fewer than L of them are filled up."""

    lanes: Tensor
    """The place in the block."""
    numbers: Tensor
    """The input or output that lies there, counted from the window's first."""
    missing: Tensor
    """What only fills up."""

    @property
    def width(self) -> int:
        return self.lanes.shape[1]

    def of(self, x: Tensor) -> Tensor:
        """(T, w) -> (T, blocks, L). What fills up is any number."""
        return gather(x, self.numbers.flatten()).unflatten(-1, self.numbers.shape)


class _Meeting(NamedTuple):
    """The outputs that read an input block in one round, counted from the window's first; (n,) each."""

    outputs: Tensor
    blocks: Tensor
    """That block."""
    rows: Tensor
    """Their row of the N * R rows of all block squares."""


@dataclass(frozen=True)
class _Tables:
    inputs: _Side
    outputs: _Side
    meetings: tuple[_Meeting, ...]


@lru_cache(maxsize=1024)
def _tables(part: Window, device: torch.device) -> _Tables:
    with torch.inference_mode(False), torch.no_grad():
        spec, (first, last), (start, stop) = part.spec, part.inputs, part.outputs
        numbers = input_blocks(spec, torch.arange(1, spec.d_in + 1)) - 1  # (N, R): which input lies there
        in_blocks, in_lanes = ((numbers >= first) & (numbers < last)).nonzero(as_tuple=True)
        inputs = _side(in_blocks, in_lanes, numbers[in_blocks, in_lanes] - first, spec.blocks_in)
        slots = output_slots(spec)[start:stop]
        blocks, lanes = slots // spec.r_hat, slots % spec.r_hat
        outputs = _side(blocks, lanes, torch.arange(stop - start), spec.blocks_out)
        meetings = tuple(_Meeting(*_moved(meeting, device)) for meeting in _meetings(spec, blocks, lanes))
        return _Tables(_Side(*_moved(inputs, device)), _Side(*_moved(outputs, device)), meetings)


def _moved(tensors: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    return (tensor.to(device) for tensor in tensors)


def _meetings(spec: OperatorSpec, blocks: Tensor, lanes: Tensor) -> list[_Meeting]:
    found = []
    for into, out in block_pairs(spec):
        outputs = ((blocks >= out.start) & (blocks < out.stop)).nonzero().flatten()
        met = blocks[outputs] - out.start + into.start
        found.append(_Meeting(outputs, met, met * spec.r_hat + lanes[outputs]))
    return found


def _side(blocks: Tensor, lanes: Tensor, numbers: Tensor, count: int) -> _Side:
    order = blocks.argsort(stable=True)
    blocks, lanes, numbers = blocks[order], lanes[order], numbers[order]
    sizes = torch.bincount(blocks, minlength=count)
    column = torch.arange(len(blocks)) - (sizes.cumsum(0) - sizes)[blocks]
    width = max(int(sizes.max()), 1)
    lane_of, number_of = torch.zeros(2, count, width, dtype=torch.long)
    missing = torch.ones(count, width, dtype=torch.bool)
    lane_of[blocks, column], number_of[blocks, column], missing[blocks, column] = lanes, numbers, False
    return _Side(lane_of, number_of, missing)
