"""Any spec from its dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mora_ds.adapters.ops.lora import LoRASpec
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import UpdateSpec
from mora_ds.adapters.ops.subspace import SubspaceSpec
from mora_ds.common.untrusted import typed


def spec_from_dict(values: Mapping[str, Any]) -> UpdateSpec:
    """Inverse of any spec's `to_dict`. Raises `UserError` for an unknown kind, other keys and wrong types."""
    for kind in (LoRASpec, SubspaceSpec):
        if values.get("kind") == kind.name:
            spec: UpdateSpec = typed(kind, {key: value for key, value in values.items() if key != "kind"}, "operator")
            return spec
    spec = typed(OperatorSpec, dict(values), "operator")
    return spec
