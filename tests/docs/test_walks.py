"""What docs/contributing.md says of how to read the code: every file and function that its
walks name exists.
"""

import ast
import re

from tests.helpers.pages import ROOT

PAGE = (ROOT / "docs/contributing.md").read_text()
WALKS = re.findall(r"^\*\*(A \w+)\*\*.*\n\n((?:\d+\. .*\n)+)", PAGE, re.MULTILINE)
"""(title, its numbered lines)"""
STATION = re.compile(r"`(\w[\w/]*\.py)` `([\w.]+)`")
TO_OPEN = {
    title: (int(count), set(re.findall(r"`([\w/]+\.py)`", files)))
    for title, count, files in re.findall(
        r"^- ([\w ]+), (\d+): ((?:.+\n)+?)(?=- |\n)", PAGE, re.MULTILINE
    )
}
"""What happens -> how many files of mora_ds that takes, and which."""


def defined(path):
    """The functions, methods and classes of a file: `function`, `Class`, `Class.method`."""
    names = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}.{method.name}"
                for method in node.body
                if isinstance(method, ast.FunctionDef)
            }
    return names


def test_there_are_three_short_walks():
    assert [title for title, _ in WALKS] == ["A step", "A merge", "A resume"]
    for title, text in WALKS:
        lines = text.splitlines()
        assert 5 <= len(lines) <= 12, title
        assert all(STATION.search(line) for line in lines), title


def test_every_station_of_a_walk_exists():
    stations = [station for _, text in WALKS for station in STATION.findall(text)]
    gone = [(path, name) for path, name in stations if name not in defined(path)]
    assert not gone


def test_files_to_open_are_counted_and_exist():
    assert list(TO_OPEN) == ["a step", "a merge", "save and resume", "an export"]
    for count, files in TO_OPEN.values():
        assert len(files) == count and all(
            (ROOT / "mora_ds" / file).is_file() for file in files
        )
