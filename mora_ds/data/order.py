"""The shuffled order of an epoch, computed and never stored.

    position in the epoch  --keyed permutation of 0 ... size - 1-->  block

A Feistel network permutes pairs (left, right) of numbers below ceil(sqrt(size)). A
result that is no block is permuted again, until it is one (cycle walking: Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). All arithmetic is that of
64-bit integers, so the order is the same on every machine.
"""

import hashlib
import math

import numpy as np

_ROUNDS = 8
_SHIFTS = (30, 27, 31)
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 1)
"""The finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""


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
