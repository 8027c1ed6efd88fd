"""What every kind of update has in common: the interface of its spec, names of operators, sizes and seeds.

A layer has one trained tensor, its *value*, and a *spec* that says which change of the frozen weight the value stands
for. Merges, the merge ledger, exports and spectra use specs through `UpdateSpec` alone.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor

from mora_ds.common.errors import UserError

ROTATE_BELOW_RANK = 64
"""Below this LoRA rank `default_kind` is rotate, from it on share (the paper rotates at rank 8 and shares at 256)."""


R_HAT_MULTIPLE = 16
"""Sides of new MoRA matrices are multiples of this: for rows of bf16 or fp16 numbers that are no multiple of 16 bytes
cuBLAS takes kernels for unaligned rows, which are slower."""


REMOVED_OPERATORS = {
    "subspace": "was removed, since its sides hold less of a pretrained model's gradient than random ones: take rotate"
}
"""Operator of an earlier version -> what to do instead, to be read after its name."""


class OperatorKind(str, Enum):
    """The four pairs of compression and decompression of the paper (arXiv 2405.12130, section 3)."""

    TRUNCATE = "truncate"
    SHARE = "share"
    DECOUPLE = "decouple"
    ROTATE = "rotate"


class Grouping(str, Enum):
    """Which inputs (outputs) are summed into (copied from) one place. PLAIN and PERMUTED suit every operator, the
    others only share."""

    PLAIN = "plain"
    PERMUTED = "permuted"
    STRIDED = "strided"
    CONTIGUOUS = "contiguous"
    CONTIGUOUS_STRIDED = "contiguous-strided"
    STRIDED_CONTIGUOUS = "strided-contiguous"

    @property
    def contiguous_in(self) -> bool:
        return self in (Grouping.CONTIGUOUS, Grouping.CONTIGUOUS_STRIDED)

    @property
    def contiguous_out(self) -> bool:
        return self in (Grouping.CONTIGUOUS, Grouping.STRIDED_CONTIGUOUS)


class Side(str, Enum):
    """The inputs or the outputs of a layer: what tensor parallelism splits, and what segments confine groups on."""

    IN = "in"
    OUT = "out"


class UpdateSpec(ABC):
    """Says which (d_out, d_in) change of a frozen weight a layer's value stands for. Immutable and hashable."""

    name: ClassVar[str]
    """Value of "kind" in `to_dict`, where the class has only one."""
    value_name: ClassVar[str] = "square"
    """Name of the value: the layer's parameter, and in files."""
    d_in: int
    d_out: int

    @property
    @abstractmethod
    def value_shape(self) -> tuple[int, ...]:
        """(r_hat, r_hat) of a MoRA matrix, (E, r_hat, r_hat) of a stack, (rank, d_in + d_out) of LoRA's factors."""

    def first_value(self, seed: int) -> Tensor:
        """The value that a cycle starts from, fp32 on the CPU; its delta is zero. Only LoRA draws with `seed`."""
        return torch.zeros(self.value_shape)

    @abstractmethod
    def delta_weight(self, value: Tensor) -> Tensor:
        """The (d_out, d_in) change of the weight, in the value's dtype and on its device, sharing no memory with it."""

    def scaled(self, value: Tensor, factor: float) -> Tensor:
        """The value whose delta is `factor` times that of `value`."""
        return value * factor

    def low_rank(self, value: Tensor) -> tuple[Tensor, Tensor] | None:
        """A (k, d_in) and B (d_out, k) with B @ A == `delta_weight(value)`, as LoRA has them, where the kind of update
        bounds the rank by k; None where it does not."""
        return None

    def weight_name(self, module: str) -> str:
        """The name of the frozen weight, before injection and in the base's files, of the layer `module`."""
        return f"{module}.weight"

    def members(self, module: str, value: Tensor) -> Iterator[tuple[str, UpdateSpec, Tensor]]:
        """(name, operator, value) of everything that changes one matrix (d_out, d_in): a stack's experts one by one."""
        yield module, self, value

    def describe(self) -> str:
        """A short name for tables: rotate/permuted, lora."""
        return self.name

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values. Inverse: `update.spec_from_dict`."""
        return {"kind": self.name, **asdict(self)}  # type: ignore[call-overload]


class SquareSpec(UpdateSpec):
    """An `UpdateSpec` whose value is a MoRA matrix (r_hat, r_hat)."""

    r_hat: int

    @property
    def blocks(self) -> int:
        """N: how many blocks of the input M is applied to."""
        return 1

    @property
    def value_shape(self) -> tuple[int, ...]:
        return self.r_hat, self.r_hat

    @abstractmethod
    def adjoint(self, gradient: Tensor) -> Tensor:
        """The adjoint of `delta_weight`, (d_out, d_in) -> (r_hat, r_hat): <delta_weight(M), G> == <M, adjoint(G)>."""


def default_kind(rank: int) -> OperatorKind:
    """The operator for a LoRA rank when none is named: rotate for small ranks, share for large ones."""
    return OperatorKind.ROTATE if rank < ROTATE_BELOW_RANK else OperatorKind.SHARE


def square_size(d_in: int, d_out: int, rank: int, kind: OperatorKind, multiple: int = R_HAT_MULTIPLE) -> int:
    """r_hat = floor(sqrt((d_in + d_out) * rank)): a MoRA matrix with the parameters of LoRA's factors (paper, section
    3).

    Rounded down by `round_side`; for rotate it may be 0. Raises `UserError` for a rank below 1.
    """
    if rank < 1:
        raise UserError(f"--mora_rank must be at least 1, got {rank}")
    return round_side(math.isqrt((d_in + d_out) * rank), multiple, smallest_side(kind))


def smallest_side(kind: OperatorKind) -> int:
    """The smallest side of a MoRA matrix, of which all sides are multiples: rotate pairs dimensions."""
    return 2 if kind is OperatorKind.ROTATE else 1


def round_side(side: int, multiple: int, smallest: int) -> int:
    """`side` rounded down to a multiple of `multiple`, or of 2 where it is below twice `multiple`; always one of
    `smallest`, which itself stays. `multiple` 1 leaves every such side as it is."""
    step = max(smallest, multiple if side >= 2 * multiple else min(2, multiple))
    return side if side == smallest else side - side % step


def permutation_seed(run_seed: int, layer: str, cycle: int) -> int:
    """The seed of a layer's permutations in a cycle: a hash, which does not depend on the order of the layers."""
    digest = hashlib.sha256(f"{run_seed}/{layer}/{cycle}".encode()).digest()
    return int.from_bytes(digest[:4], "little")
