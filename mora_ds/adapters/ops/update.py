"""Any spec from its dictionary."""

from dataclasses import dataclass

from mora_ds.adapters.ops.lora import LoRASpec
from mora_ds.adapters.ops.mora import OperatorSpec, operator_of
from mora_ds.adapters.ops.spec import UpdateSpec
from mora_ds.adapters.ops.stack import StackSpec
from mora_ds.common.files import JsonObject
from mora_ds.common.untrusted import typed_fully


@dataclass(frozen=True)
class _Stack:
    """The JSON of a `StackSpec`."""

    count: int
    operator: JsonObject


def spec_from_dict(values: JsonObject) -> UpdateSpec:
    """Inverse of any spec's `to_dict`. Raises `UserError` for unknown kinds, other keys
    and wrong types."""
    without_kind = {key: value for key, value in values.items() if key != "kind"}
    spec: UpdateSpec
    match values.get("kind"):
        case StackSpec.name:
            stack = typed_fully(_Stack, without_kind, "operator")
            operator = typed_fully(OperatorSpec, stack.operator, "operator")
            spec = StackSpec(stack.count, operator)
        case LoRASpec.name:
            spec = typed_fully(LoRASpec, without_kind, "operator")
        case _:
            spec = typed_fully(OperatorSpec, dict(values), "operator")
    return spec


def operator_from_dict(values: JsonObject) -> OperatorSpec:
    """`spec_from_dict` for MoRA's operators alone."""
    return operator_of(spec_from_dict(values), "a domain")
