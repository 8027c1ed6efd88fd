"""One operator for a stack of MoRA matrices: the update of a projection of a mixture's experts, whose weights lie in
one tensor.

    delta_weight(M)[e] == each.delta_weight(M[e])          every expert by itself, all with the same index tables

Shape legend:  E = experts, O = d_out, D = d_in, R = r_hat.

    delta_weight  (E, R, R) -> (E, O, D)             adjoint  (E, O, D) -> (E, R, R)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import SquareSpec, UpdateSpec
from mora_ds.common.errors import UserError
from mora_ds.common.untrusted import MAX_SIDE


@dataclass(frozen=True)
class StackSpec(SquareSpec):
    """The operator that all matrices of a stack share, and their number."""

    name: ClassVar[str] = "stack"
    count: int
    """E, the number of experts."""
    each: OperatorSpec

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MAX_SIDE:
            raise UserError(f"a stack has from 1 to {MAX_SIDE:,} matrices, got {self.count}")

    @property
    def d_in(self) -> int:  # type: ignore[override]
        return self.each.d_in

    @property
    def d_out(self) -> int:  # type: ignore[override]
        return self.each.d_out

    @property
    def r_hat(self) -> int:  # type: ignore[override]
        return self.each.r_hat

    @property
    def blocks(self) -> int:
        return self.each.blocks

    @property
    def value_shape(self) -> tuple[int, ...]:
        return self.count, *self.each.value_shape

    def weight_name(self, module: str) -> str:
        """A stack is a parameter of its own, not the `weight` of a module."""
        return module

    def delta_weight(self, value: Tensor) -> Tensor:
        return torch.stack([self.each.delta_weight(square) for square in value])

    def adjoint(self, gradient: Tensor) -> Tensor:
        return torch.stack([self.each.adjoint(matrix) for matrix in gradient])

    def members(self, module: str, value: Tensor) -> Iterator[tuple[str, OperatorSpec, Tensor]]:
        for index, square in enumerate(value):
            yield f"{module}.{index}", self.each, square

    def describe(self) -> str:
        return self.each.describe()

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.name, "count": self.count, "each": self.each.to_dict()}


def single(spec: UpdateSpec, value: Tensor, index: int) -> tuple[UpdateSpec, Tensor]:
    """(operator, value) of one matrix of a stack. Raises `UserError` for a spec that is none: a file's."""
    if not isinstance(spec, StackSpec):
        raise UserError(f"{spec.describe()} is no operator of a stack of experts")
    return spec.each, value[index]
