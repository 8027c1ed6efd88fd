"""The tables of indices that an operator gathers with: which input lies at which position, and what each output reads.

They hold indices only, no arithmetic. Permutations are folded into them, so that a permuted operator costs no more.

Shape legend:  D = d_in, O = d_out, R = r_hat, N = input blocks, K = members of the largest group.

    position   of an input: a column of M for truncate and share; for decouple and rotate, an index into the N input
               blocks laid one after the other
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from decimal import Decimal, localcontext
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from mora_ds.adapters.ops.gather import gather, gather_sum
from mora_ds.adapters.ops.spec import Grouping, OperatorKind, Side

_POWERS = 28
"""Terms of the series of cosine and sine: the next ones are below 1 / 28!, 3e-30."""

if TYPE_CHECKING:  # `mora` makes the tables of its `OperatorSpec`
    from mora_ds.adapters.ops.mora import OperatorSpec


@dataclass(frozen=True)
class GatherIndex:
    """What to take for each of (rows, R) positions."""

    index: Tensor
    """(rows * R,)."""
    missing: Tensor | None
    """Positions that stay zero; None where there are none."""
    rows: int

    @cached_property
    def narrow(self) -> Tensor:
        """`index` in int32, which takes less time to read."""
        with torch.inference_mode(False):  # it may be training that takes it next
            return self.index.int()

    def take(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., rows, R)."""
        return gather(x, self.narrow, self.missing).unflatten(-1, (self.rows, -1))

    def sum(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., 1, R): `take`, summed over rows."""
        return gather_sum(x, self.narrow, self.missing, self.rows)

    def to(self, device: torch.device) -> GatherIndex:
        missing = None if self.missing is None else self.missing.to(device)
        return GatherIndex(self.index.to(device), missing, self.rows)


@dataclass(frozen=True)
class IndexTables:
    """All tables of one operator on one device."""

    sources: GatherIndex
    """The input at each position, before groups are summed: (N, R), or (K, R) for segments and contiguous groups."""
    places: Tensor
    """(D,): the position of each input; R for none (truncate)."""
    more_sources: Tensor
    """(E,): inputs that have a second position, as the last block is filled up with the first inputs ..."""
    more_places: Tensor
    """(E,): ... and that position."""
    slots: Tensor
    """(O,): what each output reads: a row of M (R for none), or an index into the output blocks."""
    members: GatherIndex
    """The output at each row of M or index into the output blocks, before groups are summed."""

    def to(self, device: torch.device) -> IndexTables:
        return IndexTables(*(getattr(self, field.name).to(device) for field in fields(self)))


_held: WeakValueDictionary[tuple[OperatorSpec, torch.device], IndexTables] = WeakValueDictionary()
"""Tables that someone holds."""


@lru_cache(maxsize=1024)
def tables_of(spec: OperatorSpec, device: torch.device) -> IndexTables:
    """The operator's tables, made on the CPU and kept on `device`: those last used, and those that anyone holds. A
    layer holds its own, as a model of 70B with domains has 1,120 operators, used one after the other."""
    key = spec, device
    tables = _held.get(key)
    if tables is None:
        tables = _held[key] = make_tables(spec, device)
    return tables


def make_tables(spec: OperatorSpec, device: torch.device) -> IndexTables:
    """`tables_of` without its cache, for callers that keep the tables themselves."""
    with torch.inference_mode(False), torch.no_grad():
        inputs, outputs, places_of, outputs_of = _permutations(spec)
        places, sources = _side_tables(spec, Side.IN)
        slots, members = _side_tables(spec, Side.OUT)
        wraps = spec.kind is not OperatorKind.TRUNCATE and not _in_runs(spec, Side.IN)
        more = torch.arange(spec.d_in, len(sources) if wraps else spec.d_in)
        return IndexTables(
            sources=_index(inputs, sources, spec.r_hat),
            places=places[places_of],
            more_sources=inputs[more % spec.d_in],
            more_places=more if spec.blockwise else more % spec.r_hat,
            slots=slots[outputs_of],
            members=_index(outputs, members, spec.r_hat),
        ).to(device)


def _side_tables(spec: OperatorSpec, side: Side) -> tuple[Tensor, Tensor]:
    """Before the permutation: the position of each input (output), and the input (output) at each position; of inputs
    the first ones again where the last block is not full, of outputs an index that is none."""
    size, segments = (spec.d_in, spec.in_segments) if side is Side.IN else (spec.d_out, spec.out_segments)
    contiguous = spec.grouping.contiguous_in if side is Side.IN else spec.grouping.contiguous_out
    positions = torch.arange(size)
    if spec.kind is OperatorKind.TRUNCATE:
        return positions.clamp(max=spec.r_hat), torch.arange(spec.r_hat)
    if not spec.blockwise:
        positions = group_of_each(size, spec.r_hat, segments, contiguous)
    if _in_runs(spec, side):
        return positions, group_members(size, spec.r_hat, segments, contiguous).flatten()
    filled = torch.arange(math.ceil(size / spec.r_hat) * spec.r_hat)
    return positions, filled % size if side is Side.IN else filled


def _in_runs(spec: OperatorSpec, side: Side) -> bool:
    """Whether groups are not the residues of the index modulo R."""
    if spec.kind is not OperatorKind.SHARE:
        return False
    if side is Side.IN:
        return spec.in_segments > 1 or spec.grouping.contiguous_in
    return spec.out_segments > 1 or spec.grouping.contiguous_out


def _index(permutation: Tensor, positions: Tensor, r_hat: int) -> GatherIndex:
    """Positions from len(permutation) on are missing."""
    missing = (positions >= len(permutation)).nonzero().flatten()
    index = permutation[positions.clamp(max=len(permutation) - 1)]
    return GatherIndex(index, missing if len(missing) else None, len(positions) // r_hat)


def _permutations(spec: OperatorSpec) -> tuple[Tensor, ...]:
    if spec.grouping is Grouping.PERMUTED:
        return draw_permutations(spec.seed, spec.d_in, spec.d_out, spec.in_segments, spec.out_segments)
    inputs, outputs = torch.arange(spec.d_in), torch.arange(spec.d_out)
    return inputs, outputs, inputs, outputs


def draw_permutations(
    seed: int, d_in: int, d_out: int, in_segments: int = 1, out_segments: int = 1
) -> tuple[Tensor, ...]:
    """Permutations of inputs and outputs, each within its segments, and their inverses.

    numpy's RandomState is the one generator whose stream is frozen for ever (NEP 19): a merge ledger that is replayed
    years later, or on another device, must draw the same permutations.
    """
    stream = np.random.RandomState(seed)
    forward = [
        torch.cat([start + torch.from_numpy(stream.permutation(stop - start)) for start, stop in bounds])
        for bounds in (segment_bounds(d_in, in_segments), segment_bounds(d_out, out_segments))
    ]
    return (*forward, *(permutation.argsort() for permutation in forward))


def segment_bounds(size: int, segments: int) -> list[tuple[int, int]]:
    """[start, stop) of each segment."""
    return [(size * index // segments, size * (index + 1) // segments) for index in range(segments)]


def group_of_each(size: int, groups: int, segments: int = 1, contiguous: bool = False) -> Tensor:
    """(size,): the group of each index. A segment of the indices has a segment of the groups.

    Within a segment groups are residues modulo their number, or contiguous runs of which the first are longer by one.
    """
    parts = []
    index_bounds, group_bounds = segment_bounds(size, segments), segment_bounds(groups, segments)
    for (start, stop), (first, last) in zip(index_bounds, group_bounds, strict=True):
        indices, count = torch.arange(stop - start), last - first
        if contiguous:
            lengths = torch.full((count,), len(indices) // count)
            lengths[: len(indices) % count] += 1
            parts.append(first + torch.repeat_interleave(torch.arange(count), lengths))
        else:
            parts.append(first + indices % count)
    return torch.cat(parts)


def clear_tables() -> None:
    """Forgets all cached tables; those that are held stay with their holders alone."""
    _held.clear()
    for cached in (tables_of, group_members, rope_table):
        cached.cache_clear()


@lru_cache(maxsize=512)
def group_members(size: int, groups: int, segments: int, contiguous: bool) -> Tensor:
    """(K, groups): the indices in each group, filled up with `size`."""
    group = group_of_each(size, groups, segments, contiguous)
    order, counts = group.argsort(stable=True), torch.bincount(group, minlength=groups)
    row = torch.arange(size) - (counts.cumsum(0) - counts)[group[order]]
    table = torch.full((int(counts.max()), groups), size)
    table[row, group[order]] = order
    return table


@lru_cache(maxsize=512)
def rope_table(blocks: int, r_hat: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (blocks, R / 2) of the paper's rotation: block i, pair j turn by i * 10000^(-2j / R).

    Rounded to fp32 once, whatever the dtype, and the same bits on every machine, because a merge ledger that is
    replayed elsewhere must give the same weights. The vectorised `cos` of torch and numpy, and libm's, round the last
    bit as the CPU's instructions lead them. So no such function is called: the turns of block 1 come from decimal
    arithmetic, which is software, and those of the other blocks from products and sums in fp64, which IEEE 754 defines
    to the bit. Each is an operation of its own, as a fused product and sum rounds otherwise. Errors grow by about 1e-16
    a block, and stay far below the rounding to fp32.
    """
    with torch.inference_mode(False), torch.no_grad():
        first = torch.tensor([_turn(pair, r_hat // 2) for pair in range(r_hat // 2)], dtype=torch.float64)
        first_cos, first_sin = first.unbind(1)
        cos = torch.ones(blocks, r_hat // 2, dtype=torch.float64)
        sin = torch.zeros_like(cos)
        for block in range(1, blocks):
            before_cos, before_sin = cos[block - 1], sin[block - 1]
            cos[block] = before_cos * first_cos - before_sin * first_sin
            sin[block] = before_sin * first_cos + before_cos * first_sin
        return cos.float().to(device, dtype), sin.float().to(device, dtype)


def _turn(pair: int, pairs: int) -> tuple[float, float]:
    """Cosine and sine of 10000^(-pair / pairs), an angle from 0 to 1, correctly rounded to fp64 (but for ties)."""
    with localcontext(prec=34):
        angle = (-pair * Decimal(10000).ln() / pairs).exp()
        sums = [Decimal(0), Decimal(0)]
        term = Decimal(1)
        for power in range(_POWERS):  # 1, x, -x^2/2, -x^3/6, x^4/24, ... in turn to the cosine and the sine
            sums[power % 2] += -term if power % 4 > 1 else term
            term = term * angle / (power + 1)
        return float(sums[0]), float(sums[1])
