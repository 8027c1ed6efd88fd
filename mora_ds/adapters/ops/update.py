"""Any spec from its dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mora_ds.adapters.ops.lora import LoRASpec
from mora_ds.adapters.ops.mora import OperatorSpec
from mora_ds.adapters.ops.spec import UpdateSpec
from mora_ds.adapters.ops.subspace import SubspaceSpec


def spec_from_dict(values: Mapping[str, Any]) -> UpdateSpec:
    """Inverse of any spec's `to_dict`. Raises `UserError` for an unknown kind, `TypeError` for other keys."""
    for kind in (LoRASpec, SubspaceSpec):
        if values.get("kind") == kind.name:
            return kind(**{key: value for key, value in values.items() if key != "kind"})
    return OperatorSpec(**values)
