"""One operator for a stack of MoRA matrices: the update of a projection of a mixture's
experts, whose weights lie in one tensor.

    delta_weight(M)[e] == operator.delta_weight(M[e])

Shape legend:  E = experts, O = d_out, D = d_in, R = r_hat.

    delta_weight  (E, R, R) -> (E, O, D)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import AdditiveSpec, Grouping
from mora_ds.common.errors import UserError
from mora_ds.common.files import JsonObject
from mora_ds.common.untrusted import MAX_SIDE, typed_fully


@dataclass(frozen=True)
class _Stack:
    """The JSON of a `StackSpec`."""

    count: int
    operator: JsonObject


@dataclass(frozen=True)
class StackSpec(AdditiveSpec):
    """The operator that all matrices of a stack share, and their number."""

    name: ClassVar[str] = "stack"
    count: int
    """E, the number of experts."""
    operator: OperatorSpec
    """The operator of each matrix; all experts have the same index tables."""

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MAX_SIDE:
            raise UserError(
                f"a stack has from 1 to {MAX_SIDE:,} matrices, got {self.count}"
            )

    @property
    def d_in(self) -> int:  # type: ignore[override]
        return self.operator.d_in

    @property
    def d_out(self) -> int:  # type: ignore[override]
        return self.operator.d_out

    @property
    def adapter_weight_shape(self) -> tuple[int, ...]:
        return self.count, *self.operator.adapter_weight_shape

    @property
    def multiplications(self) -> int:
        """Of one expert."""
        return self.operator.multiplications

    def weight_name(self, module: str) -> str:
        """A stack is a parameter of its own, not the `weight` of a module."""
        return module

    def delta_weight(self, adapter_weight: Tensor) -> Tensor:
        return torch.stack(
            [self.operator.delta_weight(mora_matrix) for mora_matrix in adapter_weight]
        )

    def members(
        self, module: str, adapter_weight: Tensor
    ) -> Iterator[tuple[str, OperatorSpec, Tensor]]:
        for index, mora_matrix in enumerate(adapter_weight):
            yield f"{module}.{index}", self.operator, mora_matrix

    def single(self, adapter_weight: Tensor, index: int) -> tuple[OperatorSpec, Tensor]:
        return self.operator, adapter_weight[index]

    def with_grouping(self, grouping: Grouping, seed: int) -> Self:
        return replace(self, operator=self.operator.with_grouping(grouping, seed))

    def describe(self) -> str:
        return self.operator.describe()

    def to_dict(self) -> JsonObject:
        return {
            "kind": self.name,
            "count": self.count,
            "operator": self.operator.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: JsonObject) -> StackSpec:
        own = {key: value for key, value in values.items() if key != "kind"}
        stack = typed_fully(_Stack, own, "operator")
        return cls(stack.count, OperatorSpec.from_dict(stack.operator))
