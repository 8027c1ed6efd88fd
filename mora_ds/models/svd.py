"""Leading singular vectors of a matrix.

Exact (LAPACK, float64) where the matrix is small or most of its vectors are needed;
otherwise by randomized subspace iteration (Halko, Martinsson & Tropp 2011,
`torch.svd_lowrank`), whose vectors are orthonormal too, but mix those of singular
values that are close together. The sign of a pair is arbitrary: the largest entry of
the right vector is made positive. Seeds are hashes of names, so that one machine computes the same bits
again.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mora_ds.adapters.layer import AdaptedLinear
from mora_ds.common.errors import UserError
from mora_ds.common.tensor_files import Tensors
from mora_ds.models.base import BaseCheckpoint
from mora_ds.runtime.ranks import Ranks

EXACT_NUMBERS = 2**22
"""Largest number of elements (2048 x 2048) of a matrix that is decomposed exactly."""

OVERSAMPLED = 32
"""Number of additional vectors in the randomized iteration."""
_ITERATIONS = 4


def from_base_weights(
    layers: Mapping[str, AdaptedLinear],
    base: BaseCheckpoint,
    keys: Mapping[str, str],
    ranks: Ranks,
    shape: Callable[[AdaptedLinear], Sequence[int]],
    work: Callable[[str, AdaptedLinear, Tensor], Tensor],
) -> Tensors:
    """{module: work(module, layer, base weight (d_out, d_in) in fp64)} of `layers`, each
    of `shape(layer)`, in fp32 on the CPU. One rank computes it, so that all have the
    same bits. Collective.

    `keys`: parameter name -> key in `base`. Raises `UserError` for a weight that is not
    finite, and what `work` raises.
    """

    def compute(name: str) -> Tensor:
        layer = layers[name]
        key = keys[layer.spec.weight_name(name)]
        weight = base.read(key).to(layer.device, torch.float64)
        if not weight.isfinite().all():
            raise UserError(
                f"{base.folder}: {key}: NaN and infinity have no singular vectors"
            )
        weight = weight.mT if layer.transposed else weight
        return work(name, layer, weight)

    if not layers:
        return {}
    shapes = {name: shape(layer) for name, layer in layers.items()}
    return on_one_rank(shapes, compute, ranks)


def on_one_rank(
    shapes: Mapping[str, Sequence[int]], work: Callable[[str], Tensor], ranks: Ranks
) -> Tensors:
    """{name: work(name)} in fp32 on the CPU. Each is computed by one rank, so that all
    have the same bits. Collective."""
    names = list(shapes)[ranks.rank :: ranks.world]
    computed = ranks.agree(
        "singular vectors",
        lambda: {name: work(name).float().cpu() for name in names},
        long=True,
    )
    # Zeros of all other ranks leave a sum as it is
    return {
        name: ranks.sum(computed.get(name, torch.zeros(*shape)))
        for name, shape in shapes.items()
    }


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
