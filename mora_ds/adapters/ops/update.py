"""Any spec from its dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mora_ds.adapters.ops.lora import LoRASpec
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import UpdateSpec
from mora_ds.adapters.ops.stack import StackSpec
from mora_ds.adapters.ops.subspace import SubspaceSpec
from mora_ds.common.untrusted import typed


@dataclass(frozen=True)
class _Stack:
    """The JSON of a `StackSpec`."""

    count: int
    each: dict[str, Any]


def spec_from_dict(values: Mapping[str, Any]) -> UpdateSpec:
    """Inverse of any spec's `to_dict`. Raises `UserError` for an unknown kind, other keys and wrong types."""
    if values.get("kind") == StackSpec.name:
        stack = typed(_Stack, {key: value for key, value in values.items() if key != "kind"}, "operator")
        return StackSpec(stack.count, typed(OperatorSpec, stack.each, "operator"))
    for kind in (LoRASpec, SubspaceSpec):
        if values.get("kind") == kind.name:
            spec: UpdateSpec = typed(kind, {key: value for key, value in values.items() if key != "kind"}, "operator")
            return spec
    spec = typed(OperatorSpec, dict(values), "operator")
    return spec
