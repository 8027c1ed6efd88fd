"""What checks of settings are made of."""

from __future__ import annotations

from enum import Enum

from mora_ds.errors import nearest

Check = tuple[bool, str]
"""(whether it is wrong, what to say then)."""


def choice(flag: str, value: str, enum: type[Enum]) -> Check:
    """That a flag has one of the values that there are."""
    known = [member.value for member in enum]
    return value not in known, f"unknown --{flag} {value!r}; known: {', '.join(known)}.{nearest(value, known)}"


def at_least(flag: str, least: int, value: int | None) -> str:
    """What to say of a number that is too small."""
    return f"--{flag} must be at least {least}, got {value}"
