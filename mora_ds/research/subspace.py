"""The adapter `subspace`: a MoRA matrix between leading singular vectors of the frozen
weight, or of its gradient.

    h = W0 x + U M V^T x          U (O, R), V (D, R): the leading left and right singular vectors of W0

The update reads the directions that W0 reads most strongly, and writes those that it
writes most strongly. U and V are computed once, at the start of a run, from the base's
files, or in every cycle from the gradient (`gradient_sides`); they are neither trained
nor sharded. The adapter weight of a layer is [M | V^T | U^T], of
which M alone is trained (`UpdateSpec.trained_shape`): checkpoints, and each cycle of the
merge ledger, hold U and V to the bit. Where all cycles have the same sides, the rank of
their sum is at most R.

Shape legend:  D = d_in, O = d_out, R = r_hat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mora_ds.adapters.config import MoRAConfig
from mora_ds.adapters.layer import AdaptedLinear
from mora_ds.adapters.ops.lora import LoRASpec, outer_sum
from mora_ds.adapters.ops.spec import AdditiveSpec, OperatorKind
from mora_ds.common.errors import UserError
from mora_ds.common.untrusted import MAX_SIDE
from mora_ds.models.svd import leading_vectors

SUBSPACE = "subspace"


@dataclass(frozen=True)
class SubspaceSpec(AdditiveSpec):
    """The sizes of a layer's matrix and of its sides."""

    name: ClassVar[str] = SUBSPACE
    d_in: int
    d_out: int
    r_hat: int

    def __post_init__(self) -> None:
        shorter = min(self.d_in, self.d_out)
        if not 1 <= self.r_hat <= shorter or max(self.d_in, self.d_out) > MAX_SIDE:
            raise UserError(
                f"a weight has as many singular vectors as its shorter side, got {self}"
            )

    @property
    def adapter_weight_shape(self) -> tuple[int, ...]:
        return self.r_hat, self.r_hat + self.d_in + self.d_out

    @property
    def trained_shape(self) -> tuple[int, ...]:
        return self.r_hat, self.r_hat

    def parts(self, adapter_weight: Tensor) -> tuple[Tensor, ...]:
        """M (R, R), V^T (R, D), U^T (R, O)."""
        return adapter_weight.split((self.r_hat, self.d_in, self.d_out), dim=1)

    def as_lora(self, adapter_weight: Tensor) -> tuple[LoRASpec, Tensor]:
        """LoRA's factors with the same update: [V^T | (U M)^T], with a scale of 1."""
        mora_matrix, right, left = self.parts(adapter_weight)
        spec = LoRASpec(self.d_in, self.d_out, self.r_hat, self.r_hat)
        return spec, torch.cat((right, outer_sum(mora_matrix, left)), dim=1)

    def delta_weight(self, adapter_weight: Tensor) -> Tensor:
        spec, factors = self.as_lora(adapter_weight)
        return spec.delta_weight(factors)

    def of_sum(self, count: int) -> LoRASpec:
        """LoRA of as many times the rank: cycles may have different sides."""
        rank = self.r_hat * count
        return LoRASpec(self.d_in, self.d_out, rank, rank)

    def joined(self, adapter_weights: Sequence[Tensor]) -> tuple[LoRASpec, Tensor]:
        factors = [
            self.as_lora(adapter_weight)[1] for adapter_weight in adapter_weights
        ]
        return self.of_sum(len(adapter_weights)), torch.cat(factors)

    def scaled(self, adapter_weight: Tensor, factor: float) -> Tensor:
        """M alone is multiplied."""
        mora_matrix, right, left = self.parts(adapter_weight)
        return torch.cat((mora_matrix * factor, right, left), dim=1)

    def low_rank(self, adapter_weight: Tensor) -> tuple[Tensor, Tensor]:
        mora_matrix, right, left = self.parts(adapter_weight)
        return right, left.T @ mora_matrix


class SubspaceLinear(AdaptedLinear):
    """y = W0 x + b + U M V^T dropout(x), with M (r_hat, r_hat) trained."""

    spec: SubspaceSpec
    mora_matrix: nn.Parameter

    def update(self, x: Tensor) -> Tensor:
        assert self.fixed is not None
        sides = self.fixed.to(x.dtype)
        right, left = sides.split((self.spec.d_in, self.spec.d_out), dim=1)
        # For backward V^T x and M V^T x (..., R) are saved
        return F.linear(F.linear(x, right), self.mora_matrix.to(x.dtype)) @ left

    def fixed_of(self, original: Tensor) -> Tensor:
        """[V^T | U^T]."""
        left, right = leading_vectors(original, self.spec.r_hat, SUBSPACE)
        return torch.cat((right, left), dim=1).float()


@dataclass(frozen=True)
class SubspaceConfig(MoRAConfig):
    """Which layers get a matrix between singular vectors, and its size: MoRA's, at most
    the layer's shorter side."""

    adapter: ClassVar[str] = SUBSPACE

    def _validation_errors(self) -> Iterator[str]:
        yield from super()._validation_errors()
        defaults = {field.name: field.default for field in fields(MoRAConfig)}
        for name in ("operator", "grouping", "compute", "domains"):
            if getattr(self, name) != defaults[name]:
                yield f"`{name}` is not for {SUBSPACE}: leave it out"

    @property
    def kind(self) -> OperatorKind:
        """The operator whose sizes the matrices have."""
        return OperatorKind.SHARE

    @property
    def title(self) -> str:
        return SUBSPACE

    def layer_options(self, layer: str) -> dict[str, Any]:
        return {}

    def largest_size(self, d_in: int, d_out: int) -> int:
        """The number of singular vectors: the shorter side."""
        return min(d_in, d_out)

    def operator_for(  # type: ignore[override]
        self, layer: str, d_in: int, d_out: int, cycle: int
    ) -> SubspaceSpec:
        return SubspaceSpec(d_in, d_out, self.size_of(layer, d_in, d_out))
