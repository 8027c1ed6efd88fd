"""The four maps of an operator, as tables of indices that say which numbers are summed at each result.

    fold     x (D) -> z (N R)   the inputs that are summed at each position          unfold   its transpose
    deal     u (N R) -> y (O)   the positions of u that are summed at each output    collect  its transpose

Compression is `fold`, for rotate followed by a rotation of each block (`rope_table`); decompression is `deal`. All else
follows from the maps: the operator's delta and gradients (`mora`), its kernels, its windows for tensor parallelism.
Another operator is one more function in `_PLAIN_MAPS`, which says its `fold` and `collect`.

The tables hold indices only, no arithmetic. Permutations are folded into them, so that a permuted operator costs no
more.

Shape legend:  D = d_in, O = d_out, R = r_hat, N = blocks that M is applied to, K = terms of the longest sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.adapters.ops.gather import gather
from mora_ds.adapters.ops.spec import Grouping, OperatorKind

_POWERS = 28
"""Terms of the series of cosine and sine: the next ones are below 1 / 28!, 3e-30."""

if TYPE_CHECKING:  # `mora` makes the tables of its `OperatorSpec`
    from mora_ds.adapters.ops.mora import OperatorSpec


@dataclass(frozen=True)
class IndexMap:
    """A linear map: result q is the sum over k of the numbers at `table[k, q]`, where -1 stands for zero."""

    table: Tensor
    """(K, Q) int32, which takes less time to read than int64."""
    index: Tensor
    """The terms that are gathered and summed at once, flat, with 0 in place of -1."""
    missing: Tensor | None
    """Where `index` stands for zero; None for nowhere."""
    additions: tuple[tuple[Tensor, Tensor], ...]
    """(results, indices) of the terms that are added to few results afterwards, one to each."""

    @classmethod
    def of(cls, table: Tensor, at_once: bool = True) -> IndexMap:
        """`at_once` False: terms after the first are additions, because few results have any."""
        table = table.int()
        gathered = (table if at_once else table[:1]).flatten()
        missing = (gathered < 0).nonzero().flatten()
        later = [] if at_once else [((row >= 0).nonzero().flatten(), row) for row in table[1:]]
        additions = tuple((results, row[results]) for results, row in later)
        if not len(missing):
            return cls(table, gathered, None, additions)
        return cls(table, gathered.clamp(min=0), missing, additions)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., Q)."""
        total = gather(x, self.index, self.missing)
        if total.shape[-1] > self.table.shape[1]:
            total = total.unflatten(-1, self.table.shape).sum(dim=-2)
        for results, index in self.additions:
            total.index_add_(-1, results, gather(x, index))
        return total

    def to(self, device: torch.device) -> IndexMap:
        table = self.table.to(device)
        additions = tuple((results.to(device), index.to(device)) for results, index in self.additions)
        if self.missing is None:
            return IndexMap(table, table.flatten()[: len(self.index)], None, additions)
        return IndexMap(table, self.index.to(device), self.missing.to(device), additions)


@dataclass(frozen=True)
class IndexTables:
    """The maps of one operator on one device."""

    fold: IndexMap
    unfold: IndexMap
    deal: IndexMap
    collect: IndexMap

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
        fold, collect = _PLAIN_MAPS[spec.kind](spec)
        if spec.grouping is Grouping.PERMUTED:
            inputs, outputs = draw_permutations(spec.seed, spec.d_in, spec.d_out, spec.in_segments, spec.out_segments)
            fold = inputs[fold].where(fold >= 0, -1)
            collect = outputs[collect].where(collect >= 0, -1)
        return IndexTables(
            fold=IndexMap.of(fold),
            # An input has more than one position only where the last group or block is filled up with first inputs.
            unfold=IndexMap.of(transposed(fold, spec.d_in), at_once=False),
            deal=IndexMap.of(transposed(collect, spec.d_out)),
            collect=IndexMap.of(collect),
        ).to(device)


def transposed(table: Tensor, size: int) -> Tensor:
    """(K, Q) -> (K', size): the results that read each of `size` numbers, in the order of the table's rows."""
    reads = table >= 0
    results = torch.arange(table.shape[1]).expand_as(table)
    return lists(table[reads], results[reads], size)


def lists(keys: Tensor, values: Tensor, size: int) -> Tensor:
    """(K, size): in column k the values whose key is k, in their order, and -1 up to the length K of the longest column
    (at least 1)."""
    order = keys.argsort(stable=True)
    keys, values = keys[order], values[order]
    counts = torch.bincount(keys, minlength=size)
    rank = torch.arange(len(keys)) - (counts.cumsum(0) - counts)[keys]
    longest = int(rank.max()) + 1 if len(rank) else 1
    table = torch.full((longest, size), -1)
    table[rank, keys] = values
    return table


# -- fold (K, N R) and collect (K, N R) of each operator, without permutations ---------------------------------------


def _truncate(spec: OperatorSpec) -> tuple[Tensor, Tensor]:
    positions = torch.arange(spec.r_hat).unsqueeze(0)
    return positions.where(positions < spec.d_in, -1), positions.where(positions < spec.d_out, -1)


def _share(spec: OperatorSpec) -> tuple[Tensor, Tensor]:
    in_runs, out_runs = spec.grouping.contiguous_in, spec.grouping.contiguous_out
    if in_runs or spec.in_segments > 1:
        fold = _groups(spec.d_in, spec.r_hat, spec.in_segments, in_runs)
    else:
        fold = _filled(spec.d_in, spec.r_hat)
    return fold, _groups(spec.d_out, spec.r_hat, spec.out_segments, out_runs)


def _blocks(spec: OperatorSpec) -> tuple[Tensor, Tensor]:
    """Output block p reads block p of M's output; where there are fewer of these, from the first again; where there are
    more, those that are left are added from the first output block on."""
    fold = _filled(spec.d_in, spec.r_hat).view(1, -1)
    outputs = torch.arange(spec.blocks_out * spec.r_hat)
    outputs = outputs.where(outputs < spec.d_out, -1).view(spec.blocks_out, spec.r_hat)
    if spec.blocks_in >= spec.blocks_out:
        return fold, outputs[torch.arange(spec.blocks_in) % spec.blocks_out].view(1, -1)
    unread = -spec.blocks_out % spec.blocks_in
    return fold, F.pad(outputs, (0, 0, 0, unread), value=-1).view(-1, spec.blocks_in * spec.r_hat)


_PLAIN_MAPS: dict[OperatorKind, Callable[[OperatorSpec], tuple[Tensor, Tensor]]] = {
    OperatorKind.TRUNCATE: _truncate,
    OperatorKind.SHARE: _share,
    OperatorKind.DECOUPLE: _blocks,
    OperatorKind.ROTATE: _blocks,
}


def _filled(size: int, r_hat: int) -> Tensor:
    """(ceil(size / R), R): the indices in rows of R; the last row is filled up with the first ones."""
    return (torch.arange(math.ceil(size / r_hat) * r_hat) % size).view(-1, r_hat)


def _groups(size: int, groups: int, segments: int, contiguous: bool) -> Tensor:
    """(K, groups): the indices in each group."""
    return lists(group_of_each(size, groups, segments, contiguous), torch.arange(size), groups)


def draw_permutations(
    seed: int, d_in: int, d_out: int, in_segments: int = 1, out_segments: int = 1
) -> tuple[Tensor, Tensor]:
    """Permutations of inputs and outputs, each within its segments.

    numpy's RandomState is the one generator whose stream is frozen for ever (NEP 19): a merge ledger that is replayed
    years later, or on another device, must draw the same permutations.
    """
    stream = np.random.RandomState(seed)
    inputs, outputs = (
        torch.cat([start + torch.from_numpy(stream.permutation(stop - start)) for start, stop in bounds])
        for bounds in (segment_bounds(d_in, in_segments), segment_bounds(d_out, out_segments))
    )
    return inputs, outputs


def segment_bounds(size: int, segments: int) -> list[tuple[int, int]]:
    """[start, stop) of each segment."""
    return [(size * index // segments, size * (index + 1) // segments) for index in range(segments)]


def group_of_each(size: int, groups: int, segments: int, contiguous: bool) -> Tensor:
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
    tables_of.cache_clear()
    rope_table.cache_clear()


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
