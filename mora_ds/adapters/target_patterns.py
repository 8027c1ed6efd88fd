"""Patterns of --target_modules: names, globs and regular expressions. Imports no
model."""

import fnmatch
import re

from mora_ds.common.errors import UserError

ALL_LINEAR = "all-linear"
"""Target that stands for every linear layer except the output head."""

_EXPERTS = re.compile(r"(?<![A-Za-z_])experts(?![A-Za-z_])")


def names_experts(pattern: str) -> bool:
    """Whether a pattern contains the word experts, which shared_experts is not."""
    return _EXPERTS.search(pattern) is not None


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern is the name of a module, or its end, or a glob or regular
    expression for it. Raises `UserError` for what is no expression."""
    if pattern.startswith("re:"):
        try:
            regex = re.compile(pattern[3:])
        except re.error as error:
            raise UserError(
                f"`target_modules` {pattern!r} is no regular expression: {error}"
            ) from error
        return regex.fullmatch(name) is not None
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def matches_experts(pattern: str, name: str) -> bool:
    """Whether a pattern is for a projection of experts, or for all of them."""
    return matches(pattern, name) or matches(pattern, name.rpartition(".")[0])
