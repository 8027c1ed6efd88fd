"""Tables that operators read: angles, groups, permutations. Made once, kept on the device, shared by layers of a shape.

All are pure functions of their arguments and come out of the CPU, so every device and every later year has the same.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


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
