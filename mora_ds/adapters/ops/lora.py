"""LoRA, the control: a frozen layer with two thin factors in place of a square. Pure functions of tensors.

    h = W0 x + (alpha / r) B A x            LoRA, arXiv 2106.09685, section 4.1;  A (r, D), B (O, r)

Merged at intervals and started afresh it is ReLoRA (arXiv 2307.05695). Both factors are one tensor, [A | B^T] of shape
(r, D + O), so that a layer has one trainable parameter, whichever adapter it carries, and ZeRO gathers it at once.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.errors import UserError

LORA = "lora"


@dataclass(frozen=True)
class LoRASpec:
    """Everything that fixes what a layer's factors mean: the ledger stores it beside them."""

    d_in: int
    d_out: int
    rank: int
    alpha: float

    def __post_init__(self) -> None:
        if min(self.d_in, self.d_out, self.rank) < 1 or not 0 < self.alpha < math.inf:
            raise UserError(f"LoRA needs positive sizes and a positive alpha, got {self}")

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    def to_dict(self) -> dict[str, Any]:
        return {"kind": LORA, **asdict(self)}


def lora_update(spec: LoRASpec, factors: Tensor, x: Tensor) -> Tensor:
    """(alpha / r) B A x: (..., D) -> (..., O), what the adapter adds to the frozen layer's output."""
    down, up = factors.split((spec.d_in, spec.d_out), dim=1)
    return F.linear(x, down) @ (up * spec.scale)


def delta_weight(spec: LoRASpec, factors: Tensor) -> Tensor:
    """The (O, D) matrix that the factors stand for: rank after rank, by separate elementwise products and sums, which
    every number of threads rounds alike (a matrix product does not)."""
    down, up = factors.split((spec.d_in, spec.d_out), dim=1)
    up = (up * spec.scale).unsqueeze(2)
    total = up[0] * down[0]
    for row, column in zip(down[1:], up[1:], strict=True):
        total += column * row
    return total


def first_factors(spec: LoRASpec, seed: int) -> Tensor:
    """What a cycle starts from, fp32 on the CPU: A uniform in +-1 / sqrt(D), B zero, so that the update is zero and its
    gradient is not. A pure function of its arguments, on every rank and after every resume."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.zeros(spec.rank, spec.d_in + spec.d_out)
    factors[:, : spec.d_in] = (torch.rand(spec.rank, spec.d_in, generator=generator) * 2 - 1) / math.sqrt(spec.d_in)
    return factors


def singular_values(spec: LoRASpec, factors: Tensor) -> Tensor:
    """All min(O, D) singular values of delta_weight, descending, float64: from the triangles of two thin QRs."""
    down, up = factors.double().split((spec.d_in, spec.d_out), dim=1)
    triangles = (torch.linalg.qr(side.T, mode="r").R for side in (up * spec.scale, down))
    left, right = triangles
    values = torch.linalg.svdvals(left @ right.T)
    size = min(spec.d_in, spec.d_out)
    return torch.cat((values[:size], values.new_zeros(max(0, size - len(values)))))
