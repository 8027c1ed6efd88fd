"""Values that come from files, at the edges of what is allowed."""

import json
import os
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import mora_ds
from mora_ds.common import untrusted
from mora_ds.common.errors import UserError
from mora_ds.common.untrusted import (
    MAX_DEPTH,
    MAX_SIDE,
    AnyPath,
    Count,
    FileName,
    RelativePath,
    Side,
    entry,
    lines_of,
    plain_json,
    read_text,
    require_plain,
    typed,
)
from tests.helpers.errors import user_error
from tests.helpers.tables import each_row, parsed, rows


class Color(str, Enum):
    RED = "red"


@dataclass
class Entry:
    number: int
    name: FileName = "a"
    sides: list[int] = field(default_factory=list)
    made: int = field(default=0, init=False)

    def __post_init__(self):
        if self.number == 13:
            raise UserError("13 is no number of an entry")


LONG = "\u00e4" * 120
"""240 bytes in UTF-8."""

HINTS = {
    "int": int, "float": float, "bool": bool, "str": str, "Count": Count, "Side": Side, "int or none": int | None,
    "FileName": FileName, "RelativePath": RelativePath, "AnyPath": AnyPath, "list": list[int], "pair": tuple[int, int],
    "mapping": dict[str, int], "files": dict[FileName, int], "Entry": Entry, "Color": Color,
}  # fmt: skip
ALLOWED = r"""
int | 9223372036854775807
int | -9223372036854775808
float | 1
float | -0.5
bool | true
Count | 0
Side | 1
int or none | null
int or none | 3
FileName | model.layers.0
RelativePath | a/b/c
AnyPath | /
AnyPath | ../../base
AnyPath | "/\u0645\u062f\u0644\u200c\u0647\u0627/\u30e2\u30c7\u30eb\u3000\u57fa"
AnyPath | "a\u00a0b/\U0001f468\u200d\U0001f469"
list | []
mapping | {a: 1}
"""


@each_row("hint, value", ALLOWED)
def test_what_is_allowed_is_returned_as_it_is(hint, value):
    assert typed(HINTS[hint], parsed(value), "file") == parsed(value)


LARGEST = [
    (str, "x" * 10_000), (Side, MAX_SIDE), (FileName, LONG), (RelativePath, f"a/{LONG}"), (AnyPath, "/" + "a" * 255),
    (AnyPath, "/a" * 1999), (Any, {"x": [None]}),
]  # fmt: skip


def test_what_is_as_large_as_it_may_be_is_returned_as_it_is():
    for hint, value in LARGEST:
        assert typed(hint, value, "file") == value


def test_instances_are_made_of_dataclasses_enums_and_tuples():
    assert typed(Entry, {"number": 3}, "file") == Entry(3)
    assert typed(Color, "red", "file") is Color.RED
    assert typed(tuple[int, str], [1, "a"], "file") == (1, "a")
    assert typed(tuple[int, ...], [], "file") == ()


REFUSED = r"""
Count | 9223372036854775808 | below 9,223,372,036,854,775,808
int | true | a whole number
int | 1.0 | a whole number
float | false | a number
float | "1" | a number
bool | 1 | true or false
str | null | a text
Count | -1 | at least 0
Side | 0 | at least 1
int or none | "3" | number
FileName | "" | name of a file
FileName | ".." | name of a file
FileName | a/b | name of a file
FileName | "a\nb" | name of a file
RelativePath | a//b | name of a file
RelativePath | /a | name of a file
RelativePath | a/../b | name of a file
AnyPath | "" | be a path
AnyPath | "a\0b" | be a path
AnyPath | "a\x1b[2Jb" | be a path
AnyPath | "a\x9fb" | be a path
AnyPath | "a\u202eb" | be a path
AnyPath | "a\u2066b" | be a path
AnyPath | "a\u2028b" | be a path
list | "12" | a list
list | [1, "2"] | file\[1\] must be a whole number
pair | [1] | file\[1\] is missing
pair | [1, 2, 3] | at most 2 items
mapping | [] | a mapping
mapping | {a: b} | file: a must be a whole number
mapping | {"a\nb": b} | file: .*a\\nb.* must be a whole number
mapping | {a: 2024-01-02} | date is not JSON
files | {a/b: 1} | a/b.* name of a file
Entry | [] | a mapping
Entry | {} | number is missing
Entry | {nam: 1} | file: nam is unknown
Entry | {number: 13} | file: 13 is no number
Entry | {number: 1, made: 2} | file: made is unknown
Color | rad | should be 'red', got 'rad'
Color | [red] | should be 'red'
"""
TOO_MUCH = [
    (Side, MAX_SIDE + 1, "at most"),
    (FileName, LONG + "b", "too long"), (AnyPath, "/" + "a" * 256, "be a path"), (AnyPath, "/a" * 2001, "be a path"),
]  # fmt: skip
WRONG_VALUES = [
    *((HINTS[hint], parsed(value), words) for hint, value, words in rows(REFUSED)),
    *TOO_MUCH,
]


@pytest.mark.parametrize(
    "hint, value, words",
    WRONG_VALUES,
    ids=[f"{index}" for index in range(len(WRONG_VALUES))],
)
def test_what_is_refused_is_named_with_its_place(hint, value, words):
    with user_error(words) as caught:
        typed(hint, value, "file")
    assert str(caught.value).startswith("file")
    assert len(str(caught.value)) < 300


def test_a_file_has_a_maximal_size(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("\u00e4bc")
    assert read_text(path, 4) == "\u00e4bc"
    with user_error(r"a\.json is larger than 3 bytes"):
        read_text(path, 3)
    path.write_bytes(b"\xff")
    with user_error(r"a\.json is damaged"):
        read_text(path)


def test_a_line_of_any_length_or_bytes_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted, "MAX_BYTES", 4)
    path = tmp_path / "rows"
    path.write_bytes(b"ab\r\n\xff\nabcdef\n")
    assert list(lines_of(path)) == ["ab", "\ufffd", "abcd", "ef"]


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "text, words",
    [
        (nested(MAX_DEPTH + 1), "nested deeper than"),
        (nested(100_000), "nested too deeply"),
        ('{"a": ["\\ud800"]}', "which is not valid Unicode"),
        ('{"\\ud800": 1}', "which is not valid Unicode"),
        ("1" * 10_000, "digits"),
        ("", "is damaged"),
    ],
)
def test_json_that_is_refused(text, words):
    with user_error(words):
        plain_json(text, "file")


def test_json_that_is_too_large(monkeypatch):
    monkeypatch.setattr(untrusted, "MAX_BYTES", 4)
    assert plain_json("[12]", "file") == [12]
    with user_error("file is larger than 4 characters"):
        plain_json("[123]", "file")


def test_an_entry_that_is_missing_is_named():
    assert entry({"a": 1}, "a", int, "file") == 1
    with user_error("file is damaged: b is missing"):
        entry({"a": 1}, "b", int, "file")


def test_a_link_in_a_folder_is_named(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").symlink_to("inner")
    with user_error(r"a is a link to inner, and links are not followed: make a copy"):
        require_plain(tmp_path)


def test_a_folder_that_cannot_be_looked_into_is_named(tmp_path, monkeypatch):
    error = PermissionError(13, "Permission denied", str(tmp_path))
    monkeypatch.setattr(os, "scandir", mock.Mock(side_effect=error))
    with user_error(f"{tmp_path} cannot be read: Permission denied"):
        require_plain(tmp_path)


def test_json_that_is_as_deep_as_it_may_be():
    assert plain_json(nested(MAX_DEPTH), "file") == json.loads(nested(MAX_DEPTH))


UNSAFE = {
    "trust_remote_code": r"trust_remote_code(?:: bool)? ?= ?(\w+)",
    "torch.load": r"torch\.load\(([^()]*)\)",
}
"""What a default or an argument is, in the text of a module."""


def test_no_module_runs_code_that_comes_with_a_file_unasked():
    sources = [path.read_text() for path in Path(mora_ds.__file__).parent.rglob("*.py")]
    matches = {
        name: [match for text in sources for match in re.findall(rule, text)]
        for name, rule in UNSAFE.items()
    }
    assert "False" in matches["trust_remote_code"]
    assert "True" not in matches["trust_remote_code"]
    assert matches["torch.load"]
    assert all("weights_only=True" in call for call in matches["torch.load"])


def test_a_path_that_cannot_be_looked_at_is_named(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    for path, reason in (
        ("n" * 300, "File name too long"),
        (loop, "Too many levels of symbolic links"),
    ):
        with user_error(f"^--x {path}: {reason}$"):
            untrusted.expanded(path, "--x")
    with user_error(r"--x .*null byte"):
        untrusted.expanded("a\0b", "--x")
    assert untrusted.expanded("gone/x") == Path("gone/x")
