"""Flattens nested mappings; keys become dotted paths."""

from collections.abc import Mapping
from typing import Any


def flattened(
    content: Mapping[str, Any], prefix: str = "", separator: str = "."
) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"<prefix>a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat.update(flattened(value, f"{prefix}{key}{separator}", separator))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def different_keys(one: Mapping[str, Any], another: Mapping[str, Any]) -> list[str]:
    """The sorted keys whose values differ. A missing key counts as None."""
    return sorted(key for key in {*one, *another} if one.get(key) != another.get(key))
