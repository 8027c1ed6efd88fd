"""Which input lies at which place of an operator, and which place each output reads: tables of indices, no arithmetic.

Everything an operator moves, it moves by these; permutations are folded into them, so that none is a step of its own.

Shape legend:  D = d_in, O = d_out, R = r_hat, N = input blocks, K = most members of a group.

    places   columns of M for truncate and share; positions in the N input blocks, one behind the other, for others
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mora_ds.adapters.ops.spec import Grouping, OperatorKind, OperatorSpec


def run_lengths(size: int, groups: int) -> tuple[int, int]:
    """Lengths of the longer and the shorter runs when `size` neighbours are cut into `groups` runs."""
    return size // groups + 1, size // groups


@lru_cache(maxsize=512)
def rope_table(blocks: int, r_hat: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Float32 as in the reference, and always taken on the CPU, so that every device reads the same table."""
    with torch.inference_mode(False), torch.no_grad():
        frequencies = 1.0 / (10000 ** (torch.arange(0, r_hat, 2).float() / r_hat))
        angles = torch.outer(torch.arange(blocks), frequencies)
        return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


@lru_cache(maxsize=512)
def strided_groups(size: int, groups: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(size, device=device) % groups


@lru_cache(maxsize=512)
def contiguous_groups(size: int, groups: int, device: torch.device) -> Tensor:
    """(size,): index -> group, runs of neighbours, the first ones longer by one."""
    long, short = run_lengths(size, groups)
    with torch.inference_mode(False):
        lengths = torch.tensor([long] * (size % groups) + [short] * (groups - size % groups))
        return torch.repeat_interleave(torch.arange(groups), lengths).to(device)


@lru_cache(maxsize=512)
def segment_lanes(size: int, groups: int, segments: int, contiguous: bool, device: torch.device) -> Tensor:
    """(size,): index -> group, where `segments` runs of indices have a run of groups each; within a run strided or
    contiguous."""
    within = contiguous_groups if contiguous else strided_groups
    if segments == 1:
        return within(size, groups, device)
    with torch.inference_mode(False):
        runs = zip(segment_bounds(size, segments), segment_bounds(groups, segments), strict=True)
        return torch.cat([first + within(stop - start, last - first, device) for (start, stop), (first, last) in runs])


@lru_cache(maxsize=512)
def lane_members(size: int, groups: int, segments: int, contiguous: bool, device: torch.device) -> Tensor:
    """(K, groups): the indices in each group, filled up with `size`."""
    with torch.inference_mode(False):
        lanes = segment_lanes(size, groups, segments, contiguous, torch.device("cpu"))
        order, counts = lanes.argsort(stable=True), torch.bincount(lanes, minlength=groups)
        rank = torch.arange(size) - (counts.cumsum(0) - counts)[lanes[order]]
        table = torch.full((int(counts.max()), groups), size)
        table[rank, lanes[order]] = order
        return table.to(device)


def segment_bounds(size: int, segments: int) -> list[tuple[int, int]]:
    """[start, stop) of each run."""
    return [(size * index // segments, size * (index + 1) // segments) for index in range(segments)]


def permutation_tables(
    seed: int, d_in: int, d_out: int, device: torch.device, in_segments: int = 1, out_segments: int = 1
) -> tuple[Tensor, ...]:
    """Permutations of inputs and outputs, within segments, and their inverses.

    numpy's RandomState is the one generator whose stream is frozen for ever (NEP 19): a ledger replayed years later,
    or on another device, must draw the same permutations.
    """
    stream = np.random.RandomState(seed)
    with torch.inference_mode(False):
        forward = [
            torch.cat([start + torch.from_numpy(stream.permutation(stop - start)) for start, stop in bounds])
            for bounds in (segment_bounds(d_in, in_segments), segment_bounds(d_out, out_segments))
        ]
        inverse = [_inverse(permutation) for permutation in forward]
        return tuple(table.to(device) for table in (*forward, *inverse))


def _inverse(permutation: Tensor) -> Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation))
    return inverse


@dataclass(frozen=True)
class Index:
    """What to take for each of (rows, R) places, for `lanes.gather`."""

    index: Tensor
    """(rows * R,)."""
    missing: Tensor | None
    """Places that stay zero, if there are any."""
    rows: int


@dataclass(frozen=True)
class Wiring:
    """The tables of one operator on one device."""

    sources: Index
    """The input at each place, before groups are summed: (N, R), or (K, R) for segments and runs."""
    places: Tensor
    """(D,): where each input lies; R for nowhere (truncate)."""
    more_sources: Tensor
    """(E,): inputs that lie at a second place, because the last block wraps round to the first inputs ..."""
    more_places: Tensor
    """(E,): ... and that place."""
    slots: Tensor
    """(O,): what each output reads: a row of M (R for none), or a position in the output blocks."""
    members: Index
    """The output at each row of M or position in the output blocks, before groups are summed."""


@lru_cache(maxsize=1024)  # a 70B model has 560 layers
def wiring(spec: OperatorSpec, device: torch.device) -> Wiring:
    """Made on the CPU, kept on the device."""
    return fresh_wiring(spec, device)


def fresh_wiring(spec: OperatorSpec, device: torch.device) -> Wiring:
    """The same, made anew: for those who keep what they need of it themselves."""
    with torch.inference_mode(False), torch.no_grad():
        inputs, outputs, places_of, outputs_of = _permutations(spec)
        places, more = _places(spec), torch.arange(spec.d_in, _wrapped(spec))
        found = Wiring(
            sources=_sources(spec, inputs),
            places=places[places_of],
            more_sources=inputs[more % spec.d_in],
            more_places=more if spec.blockwise else more % spec.r_hat,
            slots=_slots(spec)[outputs_of],
            members=_members(spec, outputs),
        )
        return _moved(found, device)


def _moved(tables: Wiring, device: torch.device) -> Wiring:
    def index(table: Index) -> Index:
        return Index(table.index.to(device), None if table.missing is None else table.missing.to(device), table.rows)

    plain = (tables.places, tables.more_sources, tables.more_places, tables.slots)
    places, more_sources, more_places, slots = (table.to(device) for table in plain)
    return Wiring(index(tables.sources), places, more_sources, more_places, slots, index(tables.members))


def _permutations(spec: OperatorSpec) -> tuple[Tensor, ...]:
    """Of inputs and outputs, and their inverses."""
    if spec.grouping is not Grouping.PERMUTED:
        inputs, outputs = torch.arange(spec.d_in), torch.arange(spec.d_out)
        return inputs, outputs, inputs, outputs
    cpu = torch.device("cpu")
    return permutation_tables(spec.seed, spec.d_in, spec.d_out, cpu, spec.in_segments, spec.out_segments)


def _in_runs(spec: OperatorSpec) -> bool:
    return spec.kind is OperatorKind.SHARE and (spec.in_segments > 1 or spec.grouping.contiguous_in)


def _wrapped(spec: OperatorSpec) -> int:
    """Places that inputs fill, one after the other and from the first again: at least D."""
    wraps = spec.kind is not OperatorKind.TRUNCATE and not _in_runs(spec)
    return spec.blocks_in * spec.r_hat if wraps else spec.d_in


def _places(spec: OperatorSpec) -> Tensor:
    """(D,), before the permutation."""
    positions = torch.arange(spec.d_in)
    if spec.blockwise:
        return positions
    if spec.kind is OperatorKind.TRUNCATE:
        return positions.clamp(max=spec.r_hat)
    if not _in_runs(spec):
        return positions % spec.r_hat
    return segment_lanes(spec.d_in, spec.r_hat, spec.in_segments, spec.grouping.contiguous_in, positions.device)


def _slots(spec: OperatorSpec) -> Tensor:
    """(O,), before the permutation."""
    positions = torch.arange(spec.d_out)
    if spec.blockwise:
        return positions
    if spec.kind is OperatorKind.TRUNCATE:
        return positions.clamp(max=spec.r_hat)
    return segment_lanes(spec.d_out, spec.r_hat, spec.out_segments, spec.grouping.contiguous_out, positions.device)


def _sources(spec: OperatorSpec, permutation: Tensor) -> Index:
    if spec.kind is OperatorKind.TRUNCATE:
        return _index(permutation, torch.arange(spec.r_hat), spec.r_hat)
    if _in_runs(spec):
        return _index(permutation, _groups(spec.d_in, spec, spec.in_segments, spec.grouping.contiguous_in), spec.r_hat)
    return _index(permutation, torch.arange(_wrapped(spec)) % spec.d_in, spec.r_hat)


def _members(spec: OperatorSpec, permutation: Tensor) -> Index:
    if spec.kind is OperatorKind.TRUNCATE:
        return _index(permutation, torch.arange(spec.r_hat), spec.r_hat)
    if spec.kind is OperatorKind.SHARE and (spec.out_segments > 1 or spec.grouping.contiguous_out):
        groups = _groups(spec.d_out, spec, spec.out_segments, spec.grouping.contiguous_out)
        return _index(permutation, groups, spec.r_hat)
    return _index(permutation, torch.arange(spec.blocks_out * spec.r_hat), spec.r_hat)


def _groups(size: int, spec: OperatorSpec, segments: int, contiguous: bool) -> Tensor:
    return lane_members(size, spec.r_hat, segments, contiguous, torch.device("cpu")).flatten()


def _index(permutation: Tensor, positions: Tensor, r_hat: int) -> Index:
    """positions >= len(permutation) are missing."""
    missing = (positions >= len(permutation)).nonzero().flatten()
    index = permutation[positions.clamp(max=len(permutation) - 1)]
    return Index(index, missing if len(missing) else None, len(positions) // r_hat)
