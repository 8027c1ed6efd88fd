"""The subspace operator: a MoRA matrix between leading singular vectors of the frozen weight.

    h = W0 x + U M V^T x          U (O, R), V (D, R): left and right singular vectors of W0, frozen, no parameters

The update reads the directions that W0 reads most strongly, and writes those that it writes most strongly. U and V
belong to the base: they are neither trained nor sharded, are computed once (`models.svd`), and the spec names their
file (`singular_vectors`).

Shape legend:  D = d_in, O = d_out, R = r_hat.

    delta_weight  (R, R) -> (O, D)             adjoint  (O, D) -> (R, R)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.adapters.ops.singular_vectors import read
from mora_ds.adapters.ops.spec import SquareSpec
from mora_ds.common.errors import UserError
from mora_ds.common.untrusted import MAX_SIDE

SUBSPACE = "subspace"

Sides = tuple[Tensor, Tensor]
"""(U^T (R, O), V^T (R, D))."""


@dataclass(frozen=True)
class SubspaceSpec(SquareSpec):
    """The sizes of a layer's matrix, and the leading singular vectors around it."""

    name: ClassVar[str] = SUBSPACE
    d_in: int
    d_out: int
    r_hat: int
    module: str
    """The module whose weight the vectors belong to."""
    vectors: str
    """Name of the file that holds them (`VectorsRecord.name`)."""

    def __post_init__(self) -> None:
        sizes = (self.d_in, self.d_out, self.r_hat)
        if min(sizes) < 1 or max(sizes) > MAX_SIDE:
            raise UserError(f"the subspace operator needs positive sizes, got {self}")
        if self.r_hat > min(self.d_in, self.d_out):
            raise UserError(f"a weight has no more singular vectors than its shorter side, got {self}")

    def sides(self, device: torch.device, dtype: torch.dtype) -> Sides:
        """The vectors, read from their file. Raises as `singular_vectors.read`."""
        if device.type == "meta":  # a plan needs shapes only
            left, right = (torch.empty(self.r_hat, d, dtype=dtype, device=device) for d in (self.d_out, self.d_in))
            return left, right
        with torch.inference_mode(False), torch.no_grad():
            left, right = read(self.vectors, self.module, self.r_hat)
            return left.to(device, dtype), right.to(device, dtype)

    def delta_weight(self, value: Tensor) -> Tensor:
        """U M V^T, computed in float64 and rounded once: another order of its sums, by another number of threads or
        another device, changes the last bits of float64, and hardly ever a number of the result."""
        left, right = self.sides(value.device, torch.float64)
        return ((left.T @ value.double()) @ right).to(value.dtype)

    def low_rank(self, value: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self.sides(value.device, value.dtype)
        return right, left.T @ value

    def adjoint(self, gradient: Tensor) -> Tensor:
        """U^T G V, in the gradient's dtype."""
        left, right = self.sides(gradient.device, gradient.dtype)
        return left @ gradient @ right.T


def subspace_update(square: Tensor, vectors: Sides, x: Tensor) -> Tensor:
    """U M V^T x: (..., D) -> (..., O). Saves V^T x and M V^T x for backward, (..., R) each."""
    left, right = vectors
    return F.linear(F.linear(x, right), square) @ left
