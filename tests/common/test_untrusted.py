"""Values that come from files, at the edges of what is allowed."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mora_ds.common import untrusted
from mora_ds.common.errors import UserError
from mora_ds.common.untrusted import (
    MAX_DEPTH,
    MAX_SIDE,
    MAX_TEXT,
    AnyPath,
    Count,
    FileName,
    RelativePath,
    Side,
    plain_json,
    read_text,
    require_memory,
    typed,
)


class ColourKind(str, Enum):
    RED = "red"


@dataclass
class Entry:
    number: int
    name: FileName = "a"


LONG = "\u00e4" * 120
"""240 bytes in UTF-8."""

ALLOWED: list[tuple[Any, Any]] = [
    (int, 2**63 - 1), (int, -(2**63)), (float, 1), (float, -0.5), (bool, True), (str, "x" * MAX_TEXT),
    (Count, 0), (Side, 1), (Side, MAX_SIDE), (int | None, None), (int | None, 3),
    (FileName, LONG), (FileName, "model.layers.0"), (RelativePath, "a/b/c"), (RelativePath, f"a/{LONG}"),
    (AnyPath, "/"), (AnyPath, "../../base"), (AnyPath, "/" + "a" * 255), (AnyPath, "/a" * 1999),
    (AnyPath, "/\u0645\u062f\u0644\u200c\u0647\u0627/\u30e2\u30c7\u30eb\u3000\u57fa"),
    (AnyPath, "a\u00a0b/\U0001f468\u200d\U0001f469"),
    (list[int], []), (dict[str, float], {"a": 1}), (Any, {"x": [None]}),
]  # fmt: skip


@pytest.mark.parametrize(("hint", "value"), ALLOWED, ids=[f"{index}" for index in range(len(ALLOWED))])
def test_what_is_allowed_is_returned_as_it_is(hint: Any, value: Any) -> None:
    assert typed(hint, value, "file") == value


def test_instances_are_made_of_dataclasses_enums_and_tuples() -> None:
    assert typed(Entry, {"number": 3}, "file") == Entry(3)
    assert typed(ColourKind, "red", "file") is ColourKind.RED
    assert typed(tuple[int, str], [1, "a"], "file") == (1, "a") and typed(tuple[int, ...], [], "file") == ()


REFUSED: list[tuple[Any, Any, str]] = [
    (int, 2**63, "out of bounds"), (int, -(2**63) - 1, "out of bounds"), (int, True, "a whole number"),
    (int, 1.0, "a whole number"), (float, False, "a number"), (float, "1", "a number"), (bool, 1, "true or false"),
    (str, None, "a text"), (str, "x" * (MAX_TEXT + 1), "too long"), (str, "\ud800", "no Unicode text"),
    (Count, -1, "at least 0"), (Side, 0, "at least 1"), (Side, MAX_SIDE + 1, "at most"), (int | None, "3", "number"),
    (FileName, LONG + "b", "too long"), (FileName, "", "name of a file"), (FileName, "..", "name of a file"),
    (FileName, "a/b", "name of a file"), (FileName, "a\nb", "name of a file"), (RelativePath, "a//b", "name of a file"),
    (RelativePath, "/a", "name of a file"), (RelativePath, "a/../b", "name of a file"), (AnyPath, "", "be a path"),
    (AnyPath, "a\0b", "be a path"), (AnyPath, "a\x1b[2Jb", "be a path"), (AnyPath, "a\u202eb", "be a path"),
    (AnyPath, "/" + "a" * 256, "be a path"), (AnyPath, "/a" * 2001, "be a path"),
    (list[int], "12", "a list"), (list[int], [1, "2"], r"file\[1\] must be a whole number"),
    (tuple[int, int], [1], "2 entries"), (tuple[int, int], [1, 2, 3], "2 entries"), (dict[str, int], [], "a mapping"),
    (dict[str, int], {"a": "b"}, "file: 'a' must be a whole number"), (dict[FileName, int], {"a/b": 1}, "a key"),
    (Entry, [], "a mapping"), (Entry, {}, "'number' is missing"),
    (Entry, {"number": 1, "nam": "a"}, "unknown key 'nam'. Did you mean 'name'"),
    (ColourKind, "rad", "unknown colour 'rad'; known: red. Did you mean 'red'"),
    (ColourKind, ["red"], "unknown colour"),
]  # fmt: skip


@pytest.mark.parametrize(("hint", "value", "words"), REFUSED, ids=[f"{index}" for index in range(len(REFUSED))])
def test_what_is_refused_is_named_with_its_place(hint: Any, value: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        typed(hint, value, "file")
    assert str(caught.value).startswith("file") and len(str(caught.value)) < 300


def test_a_file_has_at_most_so_many_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("\u00e4bc", encoding="utf-8")
    assert read_text(path, 4) == "\u00e4bc"
    with pytest.raises(UserError, match=r"a\.json is larger than the 3 bytes"):
        read_text(path, 3)
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"a\.json is damaged"):
        read_text(path)


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (nested(MAX_DEPTH + 1), "nested more than"),
        (nested(100_000), "nested too deeply"),
        ('{"a": ["\\ud800"]}', "no Unicode text"),
        ('{"\\ud800": 1}', "no Unicode text"),
        ("1" * 10_000, "digits"),
        ("", "is damaged"),
    ],
)
def test_json_that_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        plain_json(text, "file")


def test_json_that_is_as_deep_as_it_may_be() -> None:
    assert plain_json(nested(MAX_DEPTH), "file") == json.loads(nested(MAX_DEPTH))


@pytest.mark.parametrize(("free", "limit"), [(1000, resource.RLIM_INFINITY), (10**6, 1300)])
def test_memory_that_a_file_asks_for(free: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1000 bytes that are left: on the machine, or to the process, which holds 300 of the 1300 that it may have."""
    psutil: Any = SimpleNamespace(
        virtual_memory=lambda: SimpleNamespace(available=free),
        Process=lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(vms=300)),
    )
    limits: Callable[[int], tuple[int, int]] = lambda what: (limit, limit)  # noqa: E731
    monkeypatch.setattr(untrusted, "psutil", psutil)
    monkeypatch.setattr(untrusted.resource, "getrlimit", limits)
    require_memory(1000, "a layer")
    with pytest.raises(UserError, match="a layer takes"):
        require_memory(1001, "a layer")
