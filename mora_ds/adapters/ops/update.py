"""Any spec from its dictionary."""

from mora_ds.adapters.ops.mora import OperatorSpec, operator_of
from mora_ds.adapters.ops.spec import UpdateSpec
from mora_ds.adapters.registry import spec_kinds
from mora_ds.common.errors import UserError, unknown
from mora_ds.common.files import JsonObject
from mora_ds.common.untrusted import entry


def spec_from_dict(values: JsonObject) -> UpdateSpec:
    """Inverse of any spec's `to_dict`. Raises `UserError` for unknown kinds, other keys
    and wrong types."""
    kind = entry(values, "kind", str, "operator")
    adapters = spec_kinds()
    if kind not in adapters:
        raise UserError(unknown("operator", kind, adapters))
    return adapters[kind].spec_class(kind).from_dict(values)


def operator_from_dict(values: JsonObject) -> OperatorSpec:
    """`spec_from_dict` for MoRA's operators alone."""
    return operator_of(spec_from_dict(values), "a domain")
