"""The shuffled order of an epoch, computed and never stored, and the order of the sources
of a mixture.

    position in the epoch  --keyed permutation of 0 ... size - 1-->  block

A Feistel network permutes pairs (left, right) of numbers below ceil(sqrt(size)). A
result that is no block is permuted again, until it is one (cycle walking: Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). All arithmetic is that of
64-bit integers, so the order is the same on every machine.
"""

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import islice

import numpy as np

_ROUNDS = 8
_SHIFTS = (30, 27, 31)
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 1)
"""The finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""

LONGEST_PERIOD = 1 << 16
"""Weights whose common denominator is larger are rounded to multiples of 1 / this."""


def shuffled(
    seed: int | str, epoch: int, size: int, positions: np.ndarray
) -> np.ndarray:
    """The blocks at `positions` (int64, each below `size`) in the order of an epoch of
    `size` blocks, int64. Takes memory for `positions` only."""
    digest = hashlib.sha512(f"{seed}/{epoch}".encode()).digest()
    keys = np.frombuffer(digest, dtype="<u8", count=_ROUNDS).astype(np.uint64)
    side = np.uint64(math.isqrt(size - 1) + 1)
    blocks = _permuted(positions.astype(np.uint64), side, keys)
    while (outside := blocks >= size).any():
        blocks[outside] = _permuted(blocks[outside], side, keys)
    return blocks.astype(np.int64)


def _permuted(numbers: np.ndarray, side: np.uint64, keys: np.ndarray) -> np.ndarray:
    """A permutation of the numbers below `side`^2."""
    left, right = np.divmod(numbers, side)
    for key in keys:
        previous = left
        left = right
        right = (previous + _mixed(right + key) % side) % side
    return left * side + right


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Hashes of 64 bits. Products wrap around."""
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=True):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return numbers


# -- sources of a mixture ---------------------------------------------------------------


def integer_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest integers in the proportions of `weights`, taken as exact decimals
    (0.1 is 1/10).

    If their sum would exceed `LONGEST_PERIOD`, they are rounded to that sum (largest
    remainder method; at least 1 each), which changes a fraction by less than 1/65,536.
    """
    decimals = [Fraction(repr(weight)) for weight in weights]
    total = sum(decimals)
    exact = [weight / total for weight in decimals]
    period = math.lcm(*(weight.denominator for weight in exact))
    if period <= LONGEST_PERIOD:
        return tuple(int(weight * period) for weight in exact)
    scaled = [weight * LONGEST_PERIOD for weight in exact]
    rounded = [max(int(weight), 1) if weight else 0 for weight in scaled]
    missing = LONGEST_PERIOD - sum(rounded)
    sign = 1 if missing > 0 else -1
    adjustable = [
        (sign * (rounded[k] - scaled[k]), k)
        for k, count in enumerate(rounded)
        if count > (0 if missing > 0 else 1)
    ]
    heapify(adjustable)
    for _ in range(abs(missing)):
        error, k = heappop(adjustable)
        rounded[k] += sign
        if rounded[k] > 1:
            heappush(adjustable, (error + 1, k))
    return tuple(rounded)


@lru_cache(maxsize=64)
def source_order(weights: tuple[int, ...]) -> np.ndarray:
    """(period,): the source of every sample. In every prefix, the count of each source
    differs from its exact proportion by less than one sample."""
    counts = np.array(weights, dtype=np.int64)
    period = sum(weights)
    source = np.repeat(np.arange(len(weights)), counts)
    number = np.arange(period) - (np.cumsum(counts) - counts)[source]
    # Tijdeman's rule for the chairman assignment problem (1980). The deficit of a source
    # is its exact number of samples minus the number drawn. Among the K sources with a
    # deficit of at least 1 / (2 K - 2), draw the one whose deficit would be the first to
    # exceed 1 - 1 / (2 K - 2). Then no deficit ever exceeds that. So every sample of a
    # source has a first sample at which it may be drawn, and a deadline.
    slack = max(2 * int((counts > 0).sum()) - 2, 1)
    earliest = (number * slack + 1) * period
    released = -(-earliest // (slack * counts[source])) - 1
    # Integers far below 2^53, divided once: the comparison is exact.
    deadline = ((number + 1) * slack - 1) * period / counts[source]
    by_deadline = np.lexsort((source, deadline))
    rank = np.empty_like(by_deadline)
    rank[by_deadline] = np.arange(period)
    ranks = iter(rank[np.argsort(released, kind="stable")].tolist())
    waiting: list[int] = []
    drawn = []
    for newly_released in np.bincount(released, minlength=period).tolist():
        for released_rank in islice(ranks, newly_released):
            heappush(waiting, released_rank)
        drawn.append(heappop(waiting))
    return source[by_deadline[drawn]]
