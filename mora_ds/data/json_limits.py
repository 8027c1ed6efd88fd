"""Where in a JSON text the limits of Python's parser are exceeded, which its errors do not say."""

from __future__ import annotations

import re

_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'


def lines_before(data: bytes, offset: int) -> int:
    """Line ends before `offset`."""
    return data.count(b"\n", 0, offset)


def longest_number(data: bytes) -> tuple[int, int]:
    """Offset and length of the longest run of digits outside of strings."""
    runs = ((match.start(), len(match.group())) for match in re.finditer(_STRING + rb"|[0-9]+", data))
    return max((run for run in runs if data[run[0]] != ord('"')), key=lambda run: run[1], default=(0, 0))


def deepest_bracket(data: bytes) -> int:
    """The offset at which brackets outside of strings are nested deepest."""
    depth = deepest = where = 0
    for match in re.finditer(_STRING + rb"|[\[\]{}]", data):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(match.group(), 0)
        if depth > deepest:
            deepest, where = depth, match.start()
    return where
