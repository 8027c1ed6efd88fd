"""What every kind of update has in common: the interface of its spec, names of
operators, sizes and seeds.

A layer has one trained tensor, its *adapter weight*, and a *spec* that says what the frozen
weight becomes with it. Merges, the merge ledger, exports and spectra use specs through
`UpdateSpec` and `AdditiveSpec` alone.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from enum import Enum
from typing import ClassVar, Self

import torch
from torch import Tensor

from mora_ds.adapters.ops.frozen import Weight
from mora_ds.common.errors import UserError
from mora_ds.common.files import JsonObject
from mora_ds.common.untrusted import typed_fully

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
    FULL = "full"


class UpdateSpec(ABC):
    """How a layer's adapter weight changes its frozen weight: what every adapter
    defines. Immutable, hashable.

    A layer has one trained tensor, the *adapter weight*. An adapter with several tensors packs
    them into one, as LoRA does with [A | B^T]: then ZeRO gathers a layer's adapter at
    once, and merge ledgers and checkpoints hold one tensor a layer. Its last columns may
    be fixed (`trained_shape`): they are not trained, and all ranks have them.

    Everything that only one kind of update does is a method or a property here, so that
    no caller asks for the kind. What an adapter supports beyond this class it declares
    in `adapters.registry`.
    """

    name: ClassVar[str]
    """Value of "kind" in `to_dict`, where the class has only one."""
    adapter_weight_name: ClassVar[str] = "mora_matrix"
    """Name of the adapter weight: the layer's parameter, and in files."""
    is_additive: ClassVar[bool] = False
    """Whether it is an `AdditiveSpec`."""
    d_in: int
    d_out: int

    @property
    @abstractmethod
    def adapter_weight_shape(self) -> tuple[int, ...]:
        """(r_hat, r_hat); (E, r_hat, r_hat) of a stack; (rank, d_in + d_out) of
        LoRA."""

    @property
    def trained_shape(self) -> tuple[int, ...]:
        """The shape of what is trained of the adapter weight: its first columns, or
        all."""
        return self.adapter_weight_shape

    def trained(self, adapter_weight: Tensor) -> Tensor:
        """What is trained of an adapter weight."""
        return adapter_weight[..., : self.trained_shape[-1]].contiguous()

    @abstractmethod
    def init_weight(self, base_weight: Weight, seed: int) -> Tensor:
        """The `trained` part of the adapter weight that a cycle starts from, in fp32:
        with it the layer computes as
        `base_weight` (d_out, d_in), its frozen weight, does. That is the merged weight
        of the cycle before; in the first cycle the original one, before `base_bits`
        rounds it. A pure function of its arguments: the same on every rank and after
        every resume."""

    @abstractmethod
    def merged_weight(self, base_weight: Tensor, adapter_weight: Tensor) -> Tensor:
        """The (d_out, d_in) weight without adapter that computes as `base_weight` with
        this one, a new tensor. `base_weight` and `adapter_weight` have one dtype: merges,
        resumes and exports give fp32.

        Of several cycles each one has the merged weight of the one before as its base.
        The result must have the same bits for every number of threads: elementwise
        operations and sums of one row at a time, no matrix products.
        """

    def merge_into_(self, total: Tensor, adapter_weight: Tensor) -> Tensor:
        """`merged_weight` of total (d_out, d_in), in its place, with the same bits."""
        return total.copy_(self.merged_weight(total, adapter_weight))

    def weight_change(
        self, base_weight: Tensor | None, adapter_weight: Tensor
    ) -> Tensor:
        """`merged_weight` less `base_weight`, a new tensor. An `AdditiveSpec`, whose
        change does not depend on the base, takes None for it."""
        assert base_weight is not None
        return self.merged_weight(base_weight, adapter_weight) - base_weight

    def with_grouping(self, grouping: Grouping, seed: int) -> Self:
        """The spec of the same sizes with this grouping, for operators that have one."""
        return self

    @property
    def size(self) -> int:
        """The number that reports show: r_hat, or a rank."""
        return self.adapter_weight_shape[-2]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(d_out, d_in); (E, d_out, d_in) of a stack of experts, whose adapter weight has three
        dimensions too."""
        return *self.adapter_weight_shape[:-2], self.d_out, self.d_in

    @property
    def multiplications(self) -> int:
        """Multiplications by trained numbers that a token costs in forward."""
        return math.prod(self.adapter_weight_shape)

    @property
    def table_bytes(self) -> int:
        """Bytes of the index tables that the update of one cycle has for itself."""
        return 0

    def weight_name(self, module: str) -> str:
        """The name of the frozen weight of the layer `module` in the base's files."""
        return f"{module}.weight"

    def members(
        self, module: str, adapter_weight: Tensor
    ) -> Iterator[tuple[str, UpdateSpec, Tensor]]:
        """(name, operator, adapter weight) of each matrix that it changes: of experts, all."""
        yield module, self, adapter_weight

    def single(self, adapter_weight: Tensor, index: int) -> Update:
        """(operator, adapter weight) of one matrix of a stack. Raises `UserError` for a spec
        that is none: a file's."""
        raise UserError(f"{self.describe()} is no operator of a stack of experts")

    def describe(self) -> str:
        """A short name for tables: rotate/permuted, lora."""
        return self.name

    def to_dict(self) -> JsonObject:
        """The fields as JSON values. Inverse: `update.spec_from_dict`."""
        return {"kind": self.name, **asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: JsonObject) -> UpdateSpec:
        """Inverse of `to_dict`. Raises `UserError` for other keys and wrong types."""
        own = {key: value for key, value in values.items() if key != "kind"}
        spec: UpdateSpec = typed_fully(cls, own, "operator")
        return spec


class AdditiveSpec(UpdateSpec):
    """An update that adds a delta to the weight, whatever that weight is:

        merged_weight(W, adapter_weight) == W + delta_weight(adapter_weight)

    Such updates can be summed, scaled, added to other models, and applied to the
    activations of a layer whose frozen weight is packed.
    """

    is_additive: ClassVar[bool] = True

    def init_weight(self, base_weight: Weight, seed: int) -> Tensor:
        """Zeros, on the CPU."""
        return torch.zeros(self.trained_shape)

    @abstractmethod
    def delta_weight(self, adapter_weight: Tensor) -> Tensor:
        """The (d_out, d_in) change of the weight, a new tensor in the adapter weight's dtype."""

    def merge_into_(self, total: Tensor, adapter_weight: Tensor) -> Tensor:
        """total (d_out, d_in) + `delta_weight`, in place, with the bits of that sum."""
        return total.add_(self.delta_weight(adapter_weight))

    def merged_weight(self, base_weight: Tensor, adapter_weight: Tensor) -> Tensor:
        return self.merge_into_(base_weight.clone(), adapter_weight)

    def weight_change(
        self, base_weight: Tensor | None, adapter_weight: Tensor
    ) -> Tensor:
        return self.delta_weight(adapter_weight)

    def add_update_(self, y: Tensor, adapter_weight: Tensor, x: Tensor) -> Tensor:
        """y (..., d_out) + delta x for x (..., d_in), in place, without forming the
        delta and without a backward. A stack, which 4 bits do not hold, has none."""
        raise NotImplementedError

    def add_input_gradient_(
        self, g_x: Tensor, adapter_weight: Tensor, g: Tensor
    ) -> Tensor:
        """g_x (..., d_in) + the transpose of `add_update_` of g (..., d_out), in
        place."""
        raise NotImplementedError

    def tables(self, device: torch.device) -> object:
        """What these products read besides the adapter weight: cached while a caller has it."""
        return None

    def of_sum(self, count: int) -> AdditiveSpec:
        """The spec of the sum of `count` adapter weights: itself where these are summed
        elementwise."""
        return self

    def joined(self, adapter_weights: Sequence[Tensor]) -> AdditiveTerm:
        """`of_sum` and one adapter weight, whose delta is the sum of those of `adapter_weights`, in
        fp32."""
        total = adapter_weights[0]
        for adapter_weight in adapter_weights[1:]:
            total = total + adapter_weight
        return self, total

    def scaled(self, adapter_weight: Tensor, factor: float) -> Tensor:
        """The adapter weight whose delta is `factor` times that of `adapter_weight`."""
        return adapter_weight * factor

    def low_rank(self, adapter_weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """A (k, d_in) and B (d_out, k) with B @ A == `delta_weight(adapter_weight)`, as LoRA has
        them, where the kind of update bounds the rank by k; None where it does not."""
        return None


def additive(spec: UpdateSpec) -> AdditiveSpec:
    """`spec` itself. Raises `UserError` for one whose updates cannot be summed."""
    if not isinstance(spec, AdditiveSpec):
        raise UserError(
            f"{spec.describe()}: its updates are no deltas that could be summed"
        )
    return spec


Update = tuple[UpdateSpec, Tensor]
"""A spec with its adapter weight."""

AdditiveTerm = tuple[AdditiveSpec, Tensor]


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
