"""LoRA, for comparison: a frozen layer with two thin factors in place of a MoRA matrix.

    h = W0 x + (alpha / r) B A x            LoRA, arXiv 2106.09685, section 4.1;  A (r, D), B (O, r)

Merged at intervals and started afresh it is ReLoRA (arXiv 2307.05695). Both factors are
one tensor, [A | B^T] of shape (r, D + O), so that a layer has one trainable parameter,
whichever adapter it carries, and ZeRO gathers it at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.adapters.ops.frozen import Weight
from mora_ds.adapters.ops.spec import AdditiveSpec
from mora_ds.common.errors import UserError
from mora_ds.common.untrusted import MAX_SIDE

LORA = "lora"


@dataclass(frozen=True)
class LoRASpec(AdditiveSpec):
    """The sizes and the scale of a layer's factors."""

    name: ClassVar[str] = LORA
    adapter_weight_name: ClassVar[str] = "factors"
    d_in: int
    d_out: int
    rank: int
    alpha: float

    def __post_init__(self) -> None:
        sizes = (self.d_in, self.d_out, self.rank)
        if min(sizes) < 1 or max(sizes) > MAX_SIDE or not 0 < self.alpha < math.inf:
            raise UserError(
                f"LoRA needs positive sizes and a positive alpha, got {self}"
            )

    @property
    def adapter_weight_shape(self) -> tuple[int, int]:
        return self.rank, self.d_in + self.d_out

    def init_weight(self, base_weight: Weight, seed: int) -> Tensor:
        """A uniform in +-1 / sqrt(D), B zero, so that the update is zero and its
        gradient is not; on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        down = torch.rand(self.rank, self.d_in, generator=generator) * 2 - 1
        factors = torch.zeros(self.adapter_weight_shape)
        factors[:, : self.d_in] = down / math.sqrt(self.d_in)
        return factors

    def factors(self, adapter_weight: Tensor) -> tuple[Tensor, Tensor]:
        """A (r, D), and alpha / r times B^T (r, O)."""
        down, up = adapter_weight.split((self.d_in, self.d_out), dim=1)
        return down, up * (self.alpha / self.rank)

    def add_update_(self, y: Tensor, adapter_weight: Tensor, x: Tensor) -> Tensor:
        return y.add_(lora_update(self, adapter_weight, x))

    def add_input_gradient_(
        self, g_x: Tensor, adapter_weight: Tensor, g: Tensor
    ) -> Tensor:
        down, up = self.factors(adapter_weight)
        return g_x.add_(F.linear(g, up) @ down)

    def of_sum(self, count: int) -> LoRASpec:
        """A larger rank with the same scale."""
        return replace(self, rank=self.rank * count, alpha=self.alpha * count)

    def joined(self, adapter_weights: Sequence[Tensor]) -> tuple[LoRASpec, Tensor]:
        """Factors lined up."""
        return self.of_sum(len(adapter_weights)), torch.cat(list(adapter_weights))

    def scaled(self, adapter_weight: Tensor, factor: float) -> Tensor:
        """B alone is multiplied: the delta is a product of both."""
        down, up = adapter_weight.split((self.d_in, self.d_out), dim=1)
        return torch.cat((down, up * factor), dim=1)

    def delta_weight(self, adapter_weight: Tensor) -> Tensor:
        down, up = self.factors(adapter_weight)
        return outer_sum(up, down)

    def low_rank(self, adapter_weight: Tensor) -> tuple[Tensor, Tensor]:
        down, up = self.factors(adapter_weight)
        return down, up.T


def outer_sum(left: Tensor, right: Tensor) -> Tensor:
    """left^T right (A, B), of (k, A) and (k, B): one row after another by separate
    elementwise products and sums, which every number of threads rounds alike (a matrix
    product does not)."""
    left = left.unsqueeze(2)
    total = left[0] * right[0]
    for row, column in zip(right[1:], left[1:], strict=True):
        total += column * row
    return total


def lora_update(spec: LoRASpec, adapter_weight: Tensor, x: Tensor) -> Tensor:
    """(alpha / r) B A x: (..., D) -> (..., O), what the adapter adds."""
    down, up = spec.factors(adapter_weight)
    return F.linear(x, down) @ up
