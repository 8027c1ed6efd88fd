"""Any spec from its dictionary."""

from mora_ds.adapters.ops.mora import OperatorSpec, operator_of
from mora_ds.adapters.ops.spec import UpdateSpec
from mora_ds.adapters.registry import loaded, spec_classes
from mora_ds.common.errors import UserError, unknown
from mora_ds.common.files import JsonObject
from mora_ds.common.untrusted import entry


def spec_from_dict(values: JsonObject) -> UpdateSpec:
    """Inverse of any spec's `to_dict`. Raises `UserError` for unknown kinds, other keys
    and wrong types."""
    kind = entry(values, "kind", str, "operator")
    classes = spec_classes()
    if kind not in classes:
        raise UserError(unknown("operator", kind, classes))
    spec: UpdateSpec = loaded(classes[kind]).from_dict(values)
    return spec


def operator_from_dict(values: JsonObject) -> OperatorSpec:
    """`spec_from_dict` for MoRA's operators alone."""
    return operator_of(spec_from_dict(values), "a domain")
