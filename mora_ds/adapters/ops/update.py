"""What a layer may learn beside its frozen weight, under one roof: a square with its operator (of `operators`, or the
subspace operator), or LoRA's factors.

A layer has one trainable tensor, its *value*, and a *spec* that says what the value means. Merge, ledger, export and
spectra ask here, and need not know which adapter it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mora_ds.adapters.ops import lora, mora, subspace
from mora_ds.adapters.ops.lora import LORA, LoRASpec
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.subspace import SUBSPACE, SubspaceSpec


class Side(str, Enum):
    """Which side of a layer a tensor-parallel group splits, and an aligned grouping is confined on."""

    IN = "in"
    OUT = "out"


SquareSpec: TypeAlias = OperatorSpec | SubspaceSpec
UpdateSpec: TypeAlias = SquareSpec | LoRASpec


def value_name(spec: UpdateSpec) -> str:
    """How the value is called, as the layer's parameter and in files."""
    return "factors" if isinstance(spec, LoRASpec) else "square"


def value_shape(spec: UpdateSpec) -> tuple[int, int]:
    """(r_hat, r_hat), or (rank, d_in + d_out) for LoRA."""
    return (spec.rank, spec.d_in + spec.d_out) if isinstance(spec, LoRASpec) else (spec.r_hat, spec.r_hat)


def first_value(spec: UpdateSpec, seed: int) -> Tensor:
    """What a cycle starts from, fp32 on the CPU; its delta is zero. `seed` is read by LoRA only."""
    return lora.first_factors(spec, seed) if isinstance(spec, LoRASpec) else torch.zeros(value_shape(spec))


def delta_weight(spec: UpdateSpec, value: Tensor) -> Tensor:
    """The (d_out, d_in) matrix that the value stands for, in its dtype and on its device, sharing no memory."""
    if isinstance(spec, LoRASpec):
        return lora.delta_weight(spec, value)
    return subspace.delta_weight(spec, value) if isinstance(spec, SubspaceSpec) else mora.delta_weight(spec, value)


def adjoint(spec: SquareSpec, gradient: Tensor) -> Tensor:
    """The adjoint of a square's `delta_weight`: (d_out, d_in) -> (r_hat, r_hat)."""
    return subspace.adjoint(spec, gradient) if isinstance(spec, SubspaceSpec) else mora.adjoint(spec, gradient)


def describe(spec: UpdateSpec) -> str:
    """For tables: rotate/permuted, subspace@0 (with the first of its singular vectors), lora."""
    if isinstance(spec, LoRASpec):
        return LORA
    if isinstance(spec, SubspaceSpec):
        return f"{SUBSPACE}@{spec.first}"
    return f"{spec.kind.value}/{spec.grouping.value}"


def spec_from_dict(values: Mapping[str, Any]) -> UpdateSpec:
    """Inverse of any spec's `to_dict`. Raises `UserError` for an unknown kind, `TypeError` for other keys."""
    kinds: dict[Any, type[LoRASpec] | type[SubspaceSpec]] = {LORA: LoRASpec, SUBSPACE: SubspaceSpec}
    if (found := kinds.get(values.get("kind"))) is None:
        return OperatorSpec.from_dict(dict(values))
    return found(**{key: value for key, value in values.items() if key != "kind"})
