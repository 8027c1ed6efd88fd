"""The walks through the code in docs/contributing.md: every file and function that they name exists."""

from __future__ import annotations

import ast
import re

from tests.helpers.pages import ROOT

PAGE = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
WALKS = re.findall(r"^\*\*(A \w+)\*\*.*\n\n((?:\d+\. .*\n)+)", PAGE, re.MULTILINE)
"""(title, its numbered lines)"""
STATION = re.compile(r"`(\w[\w/]*\.py)` `([\w.]+)`")


def defined(path: str) -> set[str]:
    """The functions, methods and classes of a file: `function`, `Class`, `Class.method`."""
    names: set[str] = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
    return names


def test_there_are_three_short_walks() -> None:
    assert [title for title, _ in WALKS] == ["A step", "A merge", "A resume"]
    for title, text in WALKS:
        lines = text.splitlines()
        assert 5 <= len(lines) <= 12, title
        assert all(STATION.search(line) for line in lines), title


def test_every_station_of_a_walk_exists() -> None:
    stations = [station for _, text in WALKS for station in STATION.findall(text)]
    gone = [(path, name) for path, name in stations if name not in defined(path)]
    assert not gone
