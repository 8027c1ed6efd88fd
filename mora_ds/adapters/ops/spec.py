"""What every kind of update has in common: the interface of its spec, names of
operators, sizes and seeds.

A layer has one trained tensor, its *value*, and a *spec* that says which change of the
frozen weight the value stands for. Merges, the merge ledger, exports and spectra use
specs through `UpdateSpec` alone.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from mora_ds.common.errors import UserError
from mora_ds.common.files import JsonObject

ROTATE_BELOW_RANK = 64
"""Below this LoRA rank `default_kind` is rotate, as at rank 8 in the paper, else
share."""


R_HAT_MULTIPLE = 16
"""Sides of new MoRA matrices are multiples of this: for rows of bf16 or fp16 numbers
that are no multiple of 16 bytes cuBLAS takes kernels for unaligned rows, which are
slower."""


class OperatorKind(str, Enum):
    """The paper's four pairs of compression and decompression (arXiv 2405.12130)."""

    TRUNCATE = "truncate"
    SHARE = "share"
    DECOUPLE = "decouple"
    ROTATE = "rotate"


class Grouping(str, Enum):
    """Which inputs (outputs) are summed into (copied from) one place. PLAIN and
    PERMUTED suit every operator, the others only share."""

    PLAIN = "plain"
    PERMUTED = "permuted"
    STRIDED = "strided"
    CONTIGUOUS = "contiguous"
    CONTIGUOUS_STRIDED = "contiguous-strided"
    STRIDED_CONTIGUOUS = "strided-contiguous"


class Style(str, Enum):
    """How a tensor-parallel group computes a linear layer."""

    COLWISE = "colwise"
    """Each rank a slice of the outputs."""
    ROWWISE = "rowwise"
    """Each rank a slice of the inputs."""
    WHOLE = "whole"


class UpdateSpec(ABC):
    """Says which (d_out, d_in) change of a weight a value stands for. Immutable,
    hashable.

    Everything that only one kind of update does is a method or a property here, so that
    no caller asks for the kind.
    """

    name: ClassVar[str]
    """Value of "kind" in `to_dict`, where the class has only one."""
    value_name: ClassVar[str] = "square"
    """Name of the value: the layer's parameter, and in files."""
    values_title: ClassVar[str] = "MoRA matrices"
    """What tables call the values of all layers."""
    is_linear: ClassVar[bool] = True
    """Whether the delta of a sum of values is the sum of their deltas."""
    is_stack: ClassVar[bool] = False
    """Whether a layer has a value for each matrix of a stack."""
    has_factors: ClassVar[bool] = False
    """Whether the value is two matrices side by side, the second one transposed."""
    d_in: int
    d_out: int

    @property
    @abstractmethod
    def value_shape(self) -> tuple[int, ...]:
        """(r_hat, r_hat); (E, r_hat, r_hat) of a stack; (rank, d_in + d_out) of
        LoRA."""

    @property
    def table_bytes(self) -> int:
        """Bytes of the index tables that the update of one cycle has for itself."""
        return 0

    def first_value(self, seed: int) -> Tensor:
        """The value that a cycle starts from, fp32 on the CPU, without a delta."""
        return torch.zeros(self.value_shape)

    @abstractmethod
    def delta_weight(self, value: Tensor) -> Tensor:
        """The (d_out, d_in) change of the weight, a new tensor in the value's dtype."""

    def add_delta_(self, total: Tensor, value: Tensor) -> Tensor:
        """total (d_out, d_in) + `delta_weight`, in place, with the bits of that sum."""
        return total.add_(self.delta_weight(value))

    def add_update_(self, y: Tensor, value: Tensor, x: Tensor) -> Tensor:
        """y (..., d_out) + delta x for x (..., d_in), in place, without forming the
        delta and without a backward. A stack, which 4 bits do not hold, has none."""
        raise NotImplementedError

    def add_input_gradient_(self, g_x: Tensor, value: Tensor, g: Tensor) -> Tensor:
        """g_x (..., d_in) + the transpose of `add_update_` of g (..., d_out), in
        place."""
        raise NotImplementedError

    def tables(self, device: torch.device) -> object:
        """What these products read besides the value: cached while a caller has it."""
        return None

    def joined(self, values: Sequence[Tensor]) -> Term:
        """One spec and value whose delta is the sum of those of `values`, in fp32."""
        total = values[0]
        for value in values[1:]:
            total = total + value
        return self, total

    def scaled(self, value: Tensor, factor: float) -> Tensor:
        """The value whose delta is `factor` times that of `value`."""
        return value * factor

    def low_rank(self, value: Tensor) -> tuple[Tensor, Tensor] | None:
        """A (k, d_in) and B (d_out, k) with B @ A == `delta_weight(value)`, as LoRA has
        them, where the kind of update bounds the rank by k; None where it does not."""
        return None

    def weight_name(self, module: str) -> str:
        """The name of the frozen weight of the layer `module` in the base's files."""
        return f"{module}.weight"

    def members(
        self, module: str, value: Tensor
    ) -> Iterator[tuple[str, UpdateSpec, Tensor]]:
        """(name, operator, value) of each matrix that it changes: of experts, all."""
        yield module, self, value

    def single(self, value: Tensor, index: int) -> Term:
        """(operator, value) of one matrix of a stack. Raises `UserError` for a spec
        that is none: a file's."""
        raise UserError(f"{self.describe()} is no operator of a stack of experts")

    def describe(self) -> str:
        """A short name for tables: rotate/permuted, lora."""
        return self.name

    def to_dict(self) -> JsonObject:
        """The fields as JSON values. Inverse: `update.spec_from_dict`."""
        return {"kind": self.name, **asdict(self)}  # type: ignore[call-overload]


Term = tuple[UpdateSpec, Tensor]
"""A spec with its value."""


def default_kind(rank: int) -> OperatorKind:
    """The operator for a LoRA rank when none is named."""
    return OperatorKind.ROTATE if rank < ROTATE_BELOW_RANK else OperatorKind.SHARE


def round_side(side: int, multiple: int, smallest: int) -> int:
    """`side` rounded down to a multiple of `multiple`, or of 2 where it is below twice
    `multiple`; always one of `smallest`, which itself stays. `multiple` 1 leaves every
    such side as it is."""
    step = max(smallest, multiple if side >= 2 * multiple else min(2, multiple))
    return side if side == smallest else side - side % step


def permutation_seed(run_seed: int, layer: str, cycle: int) -> int:
    """The seed of a layer's permutations in a cycle, whatever the order of layers."""
    digest = hashlib.sha256(f"{run_seed}/{layer}/{cycle}".encode()).digest()
    return int.from_bytes(digest[:4], "little")
