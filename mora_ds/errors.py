"""What users can get wrong, told apart from what can break.

`launch/pretrain.py` turns these into exit codes: 2 for `UserError`, 75 for `Stopped`, 1 for `RunError` and all else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import Enum
from typing import TypeVar

Check = tuple[bool, str]
"""(whether it is wrong, what to say then)."""


def choice(flag: str, value: str, enum: type[Enum]) -> Check:
    """That a flag has one of the values that there are."""
    known = [member.value for member in enum]
    return value not in known, f"unknown --{flag} {value!r}; known: {', '.join(known)}.{nearest(value, known)}"


def at_least(flag: str, least: int, value: int | None) -> str:
    """What to say of a number that is too small."""
    return f"--{flag} must be at least {least}, got {value}"


Member = TypeVar("Member", bound=Enum)


class UserError(ValueError):
    """A mistake in a flag, a file or a setting. The message names what to change."""


class RunError(RuntimeError):
    """A failure while running (NaN loss, full disk, a damaged checkpoint met in mid-run)."""


class Stopped(BaseException):
    """Asked to stop, by a signal; the message says what was saved. No `Exception`: nobody on the way may swallow it."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as " Did you mean 'merge_every'?" for a misspelt `word`, or "" when nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def member_named(enum: type[Member], flag: str, name: str) -> Member:
    """The member of `enum` whose value is `name`. Raises `UserError` that names `--flag` and all values."""
    known = [str(member.value) for member in enum]
    if name not in known:
        raise UserError(f"unknown --{flag} {name!r}; known: {', '.join(known)}.{nearest(name, known)}")
    return enum(name)
