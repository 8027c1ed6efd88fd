"""In how many parts the gradient of M is summed, so that a GPU has work for all of its
processors."""

import math

import torch
from torch import Tensor

TILE = 128
"""Side of the tiles of M's gradient that one program of `product` sums."""

_TERMS = 512
"""Terms of a sum that a part of `product` has at least."""

_READ_A_SUM = 16
"""Numbers that a part of `product` reads for each of its partial sums, at least: in 16
bits eight times their bytes."""


def parts_of(c: Tensor, z: Tensor, programs: int) -> int:
    """In how many parts `product` sums c^T z, to give about `programs` programs
    work."""
    tokens, blocks, r_hat = z.shape
    tiles = math.ceil(r_hat / TILE) ** 2
    worth = (c.numel() + z.numel()) // (_READ_A_SUM * r_hat**2)
    return max(1, min(programs // tiles, tokens * blocks // _TERMS, worth))


def empty_product(c: Tensor, z: Tensor, programs: int) -> Tensor:
    """(parts, R, R) for `product`: in fp32 where several parts are added up later."""
    part_count = parts_of(c, z, programs)
    dtype = c.dtype if part_count == 1 else torch.promote_types(c.dtype, torch.float32)
    return c.new_empty(part_count, c.shape[2], z.shape[2], dtype=dtype)
