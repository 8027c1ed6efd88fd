"""A frozen weight (O, D) and its products: a dense tensor, or numbers of fewer bits
that stand for one.

    dense(weight, dtype)                    the matrix to multiply by
    frozen_linear(x, weight, bias)          W x + b with a backward, for which it saves nothing

A `QuantizedWeight` forms its dense matrix for every product, in forward and in
backward: to save it would cost the memory that the fewer bits save. Plain torch,
because the libraries' products are made for inference, and because here the update may
be added to the weight first.

Shape legend:  O = d_out, D = d_in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_ds.common.errors import UserError


@dataclass(frozen=True)
class QuantizedWeight(ABC):
    """A frozen weight that is held in fewer bits."""

    bits: ClassVar[int]
    """Value of --base_bits."""
    values: Tensor
    scales: Tensor

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """(O, D), a new tensor."""

    @property
    @abstractmethod
    def largest_error(self) -> float:
        """By how much a number may be off."""

    @property
    @abstractmethod
    def maker(self) -> Maker:
        """Makes this weight of its values and scales; holds none of them."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """W x + b: (..., D) -> (..., O), without a backward."""
        return F.linear(x, self.dense(x.dtype), bias)

    def input_gradient(self, g: Tensor) -> Tensor:
        """g W: (..., O) -> (..., D)."""
        return g @ self.dense(g.dtype)


Maker: TypeAlias = Callable[[Tensor, Tensor], QuantizedWeight]

Weight: TypeAlias = Tensor | QuantizedWeight
"""A frozen weight (O, D)."""


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight (O, D) to multiply by: a dense one itself, or a new tensor."""
    return weight if isinstance(weight, Tensor) else weight.dense(dtype)


def frozen_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """W x + b for a frozen W: (..., D) -> (..., O)."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    return FrozenLinearFunction.apply(x, weight, bias)


def check_floating(x: Tensor, weight: Weight) -> None:
    """Raises `UserError` where a model has cast activations to integers."""
    if isinstance(weight, QuantizedWeight) and not x.is_floating_point():
        raise UserError(
            f"--base_bits {weight.bits}: this model casts activations to the dtype of a layer's weight, here {x.dtype}"
        )


class FrozenLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: QuantizedWeight,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.make = weight.maker
        ctx.save_for_backward(weight.values, weight.scales)
        y = weight.product(x, bias)
        # As in `linear.MoRALinearFunction`; a graph cannot ask
        if torch.compiler.is_compiling() or y._is_view():
            return torch.ops.aten._unsafe_view(y, y.shape)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.make(*ctx.saved_tensors).input_gradient(gradients[0]), None, None
