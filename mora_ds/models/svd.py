"""Leading singular vectors of a matrix.

Exact (LAPACK, float64) where the matrix is small or most of its vectors are needed;
otherwise by randomized subspace iteration (Halko, Martinsson & Tropp 2011,
`torch.svd_lowrank`), whose vectors are orthonormal too, but mix those of singular
values that are close together. The sign of a pair is arbitrary: the largest entry of
the right vector is made positive. Seeds are hashes of names, so that one machine computes the same bits
again.
"""

import hashlib

import torch
from torch import Tensor

EXACT_NUMBERS = 2**22
"""Largest number of elements (2048 x 2048) of a matrix that is decomposed exactly."""

OVERSAMPLED = 32
"""Number of additional vectors in the randomized iteration."""
_ITERATIONS = 4


@torch.no_grad()
def leading_vectors(matrix: Tensor, count: int, name: str) -> tuple[Tensor, Tensor]:
    """The `count` leading singular vectors of a float64 matrix (d_out, d_in) called
    `name`, one a row: the left ones (count, d_out), and the right ones (count, d_in)."""
    wanted = count + OVERSAMPLED
    if matrix.numel() <= EXACT_NUMBERS or 2 * wanted >= min(matrix.shape):
        left, _, rows = torch.linalg.svd(matrix, full_matrices=False)
    else:
        devices = [] if matrix.device.type == "cpu" else [matrix.device]
        with torch.random.fork_rng(devices, device_type=matrix.device.type):
            digest = hashlib.sha256(name.encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:4], "little"))
            left, _, columns = torch.svd_lowrank(
                matrix.float(), wanted, niter=_ITERATIONS
            )
        rows = columns.T
    right = rows[:count]
    largest = right.abs().argmax(dim=1, keepdim=True)
    signs = right.gather(1, largest).sign()
    return (left.T[:count] * signs).contiguous(), (right * signs).contiguous()
