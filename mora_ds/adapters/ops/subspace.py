"""The subspace operator: a square between leading singular vectors of the frozen weight. Functions of tensors.

    h = W0 x + U M V^T x          U (O, R), V (D, R): left and right singular vectors of W0, frozen, no parameters

The update reads what W0 reads most strongly, and writes where it writes most strongly. U and V belong to the base:
neither trained nor sharded, computed once by `base_svd`, and named by the spec (`singular_vectors`).

Shape legend:  D = d_in, O = d_out, R = r_hat.

    delta_weight  (R, R) -> (O, D)             adjoint  (O, D) -> (R, R)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.adapters.ops.singular_vectors import read
from mora_ds.errors import UserError

SUBSPACE = "subspace"

Sides = tuple[Tensor, Tensor]
"""(U^T (R, O), V^T (R, D))."""


@dataclass(frozen=True)
class SubspaceSpec:
    """Everything that fixes what a layer's square means: the ledger stores it beside the square."""

    d_in: int
    d_out: int
    r_hat: int
    module: str
    """Whose vectors they are."""
    vectors: str
    """The file that holds them (`VectorsRecord.name`)."""
    first: int = 0
    """U and V are vectors first .. first + r_hat - 1, beginning anew behind the last."""

    def __post_init__(self) -> None:
        if min(self.d_in, self.d_out, self.r_hat) < 1 or self.first < 0:
            raise UserError(f"the subspace operator needs positive sizes, got {self}")
        if self.r_hat > min(self.d_in, self.d_out):
            raise UserError(f"a weight has no more singular vectors than its shorter side, got {self}")

    def to_dict(self) -> dict[str, Any]:
        return {"kind": SUBSPACE, **asdict(self)}


def sides(spec: SubspaceSpec, device: torch.device, dtype: torch.dtype) -> Sides:
    """The vectors, read from their file. Raises as `singular_vectors.read`."""
    if device.type == "meta":  # a plan: shapes are enough
        shapes = ((spec.r_hat, spec.d_out), (spec.r_hat, spec.d_in))
        left, right = (torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
        return left, right
    with torch.inference_mode(False), torch.no_grad():
        left, right = read(spec.vectors, spec.module, spec.first, spec.r_hat)
        return left.to(device, dtype), right.to(device, dtype)


def subspace_update(square: Tensor, vectors: Sides, x: Tensor) -> Tensor:
    """U M V^T x: (..., D) -> (..., O). For backward it keeps V^T x and M V^T x, (..., R) each."""
    left, right = vectors
    return F.linear(F.linear(x, right), square) @ left


def delta_weight(spec: SubspaceSpec, square: Tensor) -> Tensor:
    """The (O, D) matrix U M V^T, in the square's dtype and on its device, sharing no memory.

    Formed in float64 and rounded once: another order of its sums, by another number of threads or another device,
    changes the last bits of float64, and with them next to no number of the result.
    """
    left, right = sides(spec, square.device, torch.float64)
    return ((left.T @ square.double()) @ right).to(square.dtype)


def adjoint(spec: SubspaceSpec, gradient: Tensor) -> Tensor:
    """U^T G V (R, R), in the gradient's dtype: <delta_weight(M), G> == <M, adjoint(G)> for all M and G."""
    left, right = sides(spec, gradient.device, gradient.dtype)
    return left @ gradient @ right.T


def singular_values(spec: SubspaceSpec, square: Tensor) -> Tensor:
    """All min(O, D) singular values of delta_weight, descending, float64: from the triangles of two thin QRs, as the
    vectors are orthonormal to fp32 only."""
    left, right = (torch.linalg.qr(each.T, mode="r").R for each in sides(spec, square.device, torch.float64))
    values = torch.linalg.svdvals(left @ square.double() @ right.T)
    return torch.cat((values, values.new_zeros(min(spec.d_in, spec.d_out) - len(values))))
