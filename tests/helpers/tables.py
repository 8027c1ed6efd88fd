"""Tables of cases in text: a row a line, its cells separated by " | ", blanks around which
align columns; lines that begin with "#" are comments.
"""

import pytest
import yaml


def rows(text):
    """The cells of every row."""
    lines = [line.strip() for line in text.splitlines()]
    return [
        tuple(map(str.strip, line.split(" | ")))
        for line in lines
        if line and not line.startswith("#")
    ]


def each_row(names, text):
    """Parametrize a test with the rows of a table."""
    return pytest.mark.parametrize(names, rows(text))


def words(*texts):
    """The words of a command line: of a text that begins with a flag, those between its
    spaces.
    """
    split = []
    for text in map(str, texts):
        split += text.split() if text.startswith("--") else [text]
    return split


def parsed(cell):
    """The value of a cell that is written as YAML, such as "{optimizer: {type:
    Lamb}}"."""
    return yaml.safe_load(cell)


def heavy(*values):
    """Values of a parametrized test that only the heavy tests take."""
    return pytest.param(*values, marks=pytest.mark.heavy)
