"""The four maps of an operator, as tables of indices that say which numbers are summed
at each result.

    fold     x (D) -> z (N R)   the inputs that are summed at each position          unfold   its transpose
    spread   u (N R) -> y (O)   the positions of u that are summed at each output    collect  its transpose

Compression is `fold`, for rotate followed by a rotation of each block (`rope_table`);
decompression is `spread`. The operator's delta and gradients (`mora`), its kernels and
its windows for tensor parallelism follow from the maps. Another operator is one more
entry of `OPERATORS`, with one function that makes its `fold` and `collect`.

The tables hold indices only, no arithmetic. Permutations are folded into them, so that
a permuted operator costs no more.

Shape legend:  D = d_in, O = d_out, R = r_hat, N = blocks that M is applied to, K = terms of the longest sum,
               P = blocks of u that `collect` makes: where outputs read the sum of several blocks, the transpose gives
               these the same numbers, and block b of u has those of block b mod P.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.adapters.ops.spec import R_HAT_MULTIPLE, Grouping, OperatorKind, round_side
from mora_ds.common.errors import UserError

LOW_PRECISION = (torch.bfloat16, torch.float16)

_POWERS = 28
"""Terms of the series of cosine and sine: the next ones are below 1 / 28!, 3e-30."""

if TYPE_CHECKING:  # `mora` makes the tables of its `OperatorSpec`
    from mora_ds.adapters.ops.mora import OperatorSpec


Results = slice | Tensor
"""Some results of a map: a run of neighbors, which is a view, or their indices."""


@dataclass(frozen=True)
class IndexMap:
    """A linear map: result q is the sum over k of the numbers at `table[k, q]`; -1:
    zero.

    All that is summed is gathered at once: the first term of every result, after it the
    other terms of those results that have them, which are then added to the first.
    """

    table: Tensor
    """(K, Q) int32, which takes less time to read than int64."""
    index: Tensor
    """What is gathered, with 0 in place of -1 in the first Q numbers."""
    missing: Results | None
    """The results whose first term is zero; None for none."""
    additions: tuple[tuple[Results, slice], ...]
    """For each other term the results that have it, and where it is among the
    gathered."""

    @classmethod
    def of(cls, table: Tensor, device: torch.device) -> IndexMap:
        """The map of a table on the CPU, for numbers on `device`."""
        table = table.int()
        first = table[0]
        missing = (first < 0).nonzero().flatten()
        gathered = [first.clamp(min=0)]
        additions: list[tuple[Results, slice]] = []
        stop = len(first)
        for term in table[1:]:
            results = (term >= 0).nonzero().flatten()
            if len(results):
                gathered.append(term[results])
                start = stop
                stop += len(results)
                additions.append((_run_or_indices(results, device), slice(start, stop)))
        table = table.to(device)
        index = table[0]
        if len(missing) or additions:
            index = torch.cat(gathered).to(device)
        unread = _run_or_indices(missing, device) if len(missing) else None
        return cls(table, index, unread, tuple(additions))

    def __call__(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., Q)."""
        shape = (*x.shape[:-1], self.table.shape[1])
        # A CPU gathers from a matrix up to five times faster
        x = x.reshape(-1, x.shape[-1])
        if len(self.additions) > 1 and x.dtype in LOW_PRECISION:
            return self._rounded_once(x).view(shape)
        gathered = x.index_select(1, self.index)
        if not self.additions and self.missing is None:
            return gathered.view(shape)
        total = gathered[:, : shape[-1]]
        if isinstance(self.missing, slice):
            total[:, self.missing] = 0
        elif self.missing is not None:
            total.index_fill_(1, self.missing, 0)
        for results, terms in self.additions:
            if isinstance(results, slice):
                # Not `+=`, which would then copy the sum onto itself
                total[:, results].add_(gathered[:, terms])
            else:
                # A copy for autograd, as `total` shares memory with the terms, and
                # changes
                total.index_add_(1, results, gathered[:, terms].clone())
        # A copy without the other terms, which a layer that saves the result would keep
        # too
        return total.contiguous().view(shape)

    def _rounded_once(self, x: Tensor) -> Tensor:
        """(T, size) -> (T, Q), as by the kernels: torch sums a dimension in fp32,
        without a copy of x in it."""
        indices = self.table.flatten()
        terms = x.index_select(1, indices.clamp(min=0)).masked_fill_(indices < 0, 0)
        return terms.unflatten(1, self.table.shape).sum(dim=1)


def _run_or_indices(results: Tensor, device: torch.device) -> Results:
    """Sorted indices, at least one, on a device; as a slice where they are
    neighbors."""
    start = int(results[0])
    stop = int(results[-1]) + 1
    return slice(start, stop) if len(results) == stop - start else results.to(device)


@dataclass(frozen=True)
class IndexTables:
    """The maps of one operator on one device."""

    fold: IndexMap
    unfold: IndexMap
    spread: IndexMap
    collect: IndexMap
    """(K, P R)"""
    r_hat: int
    overlap: bool = False
    """Whether an output reads some input in two blocks."""

    @cached_property
    def scatters(self) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """How a weight of several blocks is formed: the inputs of each block (N, R), int64
        as `scatter_add_` takes no other, 0 for those that a window does not have; and for
        each term of `spread` which row of the M R_b (N R, R) each output reads (O,), N R
        where it has no such term, and which block's inputs the row is added to (O,).

        Kept, as small operations take a CPU longer to start than to compute: done for each
        weight anew, they were a third of the time to form it.
        """
        with torch.inference_mode(False), torch.no_grad():
            inputs = self.fold.table.view(-1, self.r_hat).long()
            terms = [
                (rows % (inputs.numel() + 1), rows.clamp(min=0) // self.r_hat)
                for rows in self.spread.table
            ]
            return inputs.clamp(min=0), terms


_tables_in_use = WeakValueDictionary[tuple["OperatorSpec", torch.device], IndexTables]()
"""Tables that someone holds."""


@lru_cache(maxsize=64)
def tables_of(spec: OperatorSpec, device: torch.device) -> IndexTables:
    """The operator's tables, made on the CPU and kept on `device`: the few last used,
    and those that anyone holds. A layer holds its own; those of merged cycles are read
    once, and would only fill the memory."""
    key = spec, device
    tables = _tables_in_use.get(key)
    if tables is None:
        tables = _tables_in_use[key] = make_tables(spec, device)
    return tables


@lru_cache(maxsize=1024)
def kept_tables(spec: OperatorSpec, device: torch.device) -> IndexTables:
    """`tables_of`, kept for as many layers as a model has: for layers that do not hold
    their own, those of PEFT and of graphs of `torch.compile`."""
    return tables_of(spec, device)


def make_tables(spec: OperatorSpec, device: torch.device) -> IndexTables:
    """`tables_of` without its cache, for callers that keep the tables themselves."""
    with torch.inference_mode(False), torch.no_grad():
        fold, collect = OPERATORS[spec.kind].maps(spec)
        if spec.grouping is Grouping.PERMUTED:
            inputs, outputs = draw_permutations(spec.seed, spec.d_in, spec.d_out)
            fold = inputs[fold].where(fold >= 0, -1)
            collect = outputs[collect].where(collect >= 0, -1)
        spread = transposed(of_all_blocks(collect, spec.blocks, spec.r_hat), spec.d_out)
        return IndexTables(
            fold=IndexMap.of(fold, device),
            unfold=IndexMap.of(transposed(fold, spec.d_in), device),
            spread=IndexMap.of(spread, device),
            collect=IndexMap.of(collect, device),
            r_hat=spec.r_hat,
            overlap=spec.blocks > 1 and _overlap(fold.view(-1, spec.r_hat), spread),
        )


def _overlap(inputs: Tensor, spread: Tensor) -> bool:
    """Whether an output reads an input of `inputs` (N, R) twice, by `spread` (K, O)."""
    blocks = torch.where(spread < 0, -1, spread // inputs.shape[1])
    read_together = [
        inputs[read[read >= 0]].flatten() for read in blocks.unique(dim=1).T
    ]
    return any(len(numbers.unique()) < len(numbers) for numbers in read_together)


def of_all_blocks(collect: Tensor, blocks: int, r_hat: int) -> Tensor:
    """(K, P R) -> (K, N R)."""
    by_block = collect.unflatten(1, (-1, r_hat))
    repeated = torch.arange(blocks, device=collect.device) % by_block.shape[1]
    return by_block[:, repeated].flatten(1)


def transposed(table: Tensor, size: int) -> Tensor:
    """(K, Q) -> (K', size): the results that read each of `size` numbers, in order."""
    reads = table >= 0
    results = torch.arange(table.shape[1]).expand_as(table)
    return lists(table[reads], results[reads], size)


def lists(keys: Tensor, values: Tensor, size: int) -> Tensor:
    """(K, size): in column k the values whose key is k, in their order, and -1 up to
    the length K of the longest column (at least 1)."""
    order = keys.argsort(stable=True)
    keys = keys[order]
    values = values[order]
    counts = torch.bincount(keys, minlength=size)
    rank = torch.arange(len(keys)) - (counts.cumsum(0) - counts)[keys]
    longest = int(rank.max()) + 1 if len(rank) else 1
    table = torch.full((longest, size), -1)
    table[rank, keys] = values
    return table


# -- fold (K, N R) and collect (K, P R) of each operator, without permutations ---------


def _truncate(spec: OperatorSpec) -> tuple[Tensor, Tensor]:
    positions = torch.arange(spec.r_hat).unsqueeze(0)
    fold = positions.where(positions < spec.d_in, -1)
    return fold, positions.where(positions < spec.d_out, -1)


def _share(spec: OperatorSpec) -> tuple[Tensor, Tensor]:
    in_runs = spec.grouping in (Grouping.CONTIGUOUS, Grouping.CONTIGUOUS_STRIDED)
    out_runs = spec.grouping in (Grouping.CONTIGUOUS, Grouping.STRIDED_CONTIGUOUS)
    collect = _groups(spec.d_out, spec.r_hat, out_runs)
    if in_runs:
        return _groups(spec.d_in, spec.r_hat, contiguous=True), collect
    return _filled(spec.d_in, spec.r_hat), collect


def _blocks(spec: OperatorSpec) -> tuple[Tensor, Tensor]:
    """Output block p reads block p of M's output; where there are fewer of these, from
    the first again; where there are more, those that are left are added from the first
    output block on (P is then the number of output blocks)."""
    fold = _filled(spec.d_in, spec.r_hat).view(1, -1)
    outputs = torch.arange(spec.blocks_out * spec.r_hat)
    outputs = outputs.where(outputs < spec.d_out, -1).view(spec.blocks_out, spec.r_hat)
    blocks_read = min(spec.blocks_in, spec.blocks_out)
    unread = -spec.blocks_out % blocks_read
    outputs = F.pad(outputs, (0, 0, 0, unread), value=-1)
    return fold, outputs.view(-1, blocks_read * spec.r_hat)


@dataclass(frozen=True)
class Operator:
    """What tells one operator from another."""

    maps: Callable[[OperatorSpec], tuple[Tensor, Tensor]]
    """Makes `fold` and `collect`; of several blocks, each position folds one input."""
    in_blocks: bool = False
    """Whether M is applied to each block of R inputs, instead of once."""
    rotates: bool = False
    """Whether the blocks are rotated, each by other angles."""
    has_groups: bool = False
    """Whether every `Grouping` chooses what is summed."""

    @property
    def groupings(self) -> tuple[Grouping, ...]:
        """The groupings that the operator can be given."""
        return (
            tuple(Grouping) if self.has_groups else (Grouping.PLAIN, Grouping.PERMUTED)
        )

    @property
    def smallest_side(self) -> int:
        """The number of which all sides are multiples: a rotation pairs dimensions."""
        return 2 if self.rotates else 1


OPERATORS: dict[OperatorKind, Operator] = {
    OperatorKind.TRUNCATE: Operator(_truncate),
    OperatorKind.SHARE: Operator(_share, has_groups=True),
    OperatorKind.DECOUPLE: Operator(_blocks, in_blocks=True),
    OperatorKind.ROTATE: Operator(_blocks, in_blocks=True, rotates=True),
}


def mora_matrix_size(
    d_in: int,
    d_out: int,
    rank: int,
    kind: OperatorKind,
    multiple: int = R_HAT_MULTIPLE,
) -> int:
    """r_hat = floor(sqrt((d_in + d_out) rank)), of LoRA's parameters
    (paper, section 3).

    Rounded down by `round_side`; for rotate it may be 0. Raises `UserError` for a rank
    below 1.
    """
    if rank < 1:
        raise UserError(f"`rank` must be at least 1, got {rank}")
    side = math.isqrt((d_in + d_out) * rank)
    return round_side(side, multiple, OPERATORS[kind].smallest_side)


def _filled(size: int, r_hat: int) -> Tensor:
    """(ceil(size / R), R): the indices in rows, of which the last is filled up from
    0."""
    return (torch.arange(math.ceil(size / r_hat) * r_hat) % size).view(-1, r_hat)


def _groups(size: int, groups: int, contiguous: bool) -> Tensor:
    """(K, groups): the indices in each group.

    Groups are residues modulo their number, or contiguous runs of which the first are
    longer by one.
    """
    indices = torch.arange(size)
    if contiguous:
        lengths = torch.full((groups,), size // groups)
        lengths[: size % groups] += 1
        group_of_index = torch.repeat_interleave(torch.arange(groups), lengths)
    else:
        group_of_index = indices % groups
    return lists(group_of_index, indices, groups)


def draw_permutations(seed: int, d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
    """Permutations of inputs and outputs.

    numpy's RandomState is the one generator whose stream is frozen for ever (NEP 19): a
    merge ledger that is read years later, or on another device, must draw the same
    permutations.
    """
    stream = np.random.RandomState(seed)
    inputs = torch.from_numpy(stream.permutation(d_in))
    return inputs, torch.from_numpy(stream.permutation(d_out))


def clear_tables() -> None:
    """Forgets all cached tables; those in use stay with the layers that use them."""
    _tables_in_use.clear()
    tables_of.cache_clear()
    kept_tables.cache_clear()
    rope_table.cache_clear()
    signed_rope_table.cache_clear()


@lru_cache(maxsize=512)
def signed_rope_table(
    blocks: int,
    r_hat: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """`rope_table` as `mora.rotate` reads it."""
    with torch.inference_mode(False), torch.no_grad():
        return signed(*rope_table(blocks, r_hat, dtype, device))


def signed(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(..., R / 2) each -> what `mora.rotate` multiplies both halves by,
    (..., 2, R / 2): the cosines twice, as a CPU multiplies by one long run faster than
    by two short ones."""
    return torch.stack((cos, cos), dim=-2), torch.stack((-sin, sin), dim=-2)


@lru_cache(maxsize=512)
def rope_table(
    blocks: int,
    r_hat: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (blocks, R / 2): block i, pair j turn by i * 10000^(-2j / R).

    Rounded to fp32 once, whatever the dtype, and the same bits on every machine,
    because a merge ledger that is read elsewhere must give the same weights. The
    vectorized `cos` of torch and numpy, and libm's, round the last bit as the CPU's
    instructions lead them. So no such function is called: the turns of block 1 come
    from decimal arithmetic, which is software, and those of the other blocks from
    products and sums in fp64, which IEEE 754 defines to the bit. Each is an operation
    of its own, as a fused product and sum rounds otherwise. Errors grow by about 1e-16
    a block, and stay far below the rounding to fp32.
    """
    with torch.inference_mode(False), torch.no_grad():
        turns = [_turn(pair, r_hat // 2) for pair in range(r_hat // 2)]
        first_cos, first_sin = torch.tensor(turns, dtype=torch.float64).unbind(1)
        cos = torch.ones(blocks, r_hat // 2, dtype=torch.float64)
        sin = torch.zeros_like(cos)
        for block in range(1, blocks):
            before_cos = cos[block - 1]
            before_sin = sin[block - 1]
            cos[block] = before_cos * first_cos - before_sin * first_sin
            sin[block] = before_sin * first_cos + before_cos * first_sin
        return cos.float().to(device, dtype), sin.float().to(device, dtype)


def _turn(pair: int, pairs: int) -> tuple[float, float]:
    """Cosine and sine of 10000^(-pair / pairs), correctly rounded to fp64 but for
    ties."""
    with localcontext(prec=34):
        angle = (-pair * Decimal(10000).ln() / pairs).exp()
        sums = [Decimal(0), Decimal(0)]
        term = Decimal(1)
        # 1, x, -x^2/2, -x^3/6, x^4/24, ... in turn to the cosine and the sine
        for power in range(_POWERS):
            sums[power % 2] += -term if power % 4 > 1 else term
            term = term * angle / (power + 1)
        return float(sums[0]), float(sums[1])
